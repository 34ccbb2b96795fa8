"""A kernel's specification, and its TPU form for chips of both kinds."""

from collections.abc import Callable
import functools
from typing import Any

from jax._src.pallas.mosaic.interpret import interpret_pallas_call as simulator
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch

V5E = dispatch.Target('tpu', 'v5e')  # An int8 matrix unit; 7x has none.
TPU7X = dispatch.Target('tpu', 'tpu7x')


def of(reference: Callable, tpu: Callable) -> dict[str, Callable]:
  """The two as functions for a CPU, by name."""
  return {
    'reference': functools.partial(reference, target=V5E),
    'tpu v5e': functools.partial(tpu, target=V5E, interpret=True),
    'tpu tpu7x': functools.partial(tpu, target=TPU7X, interpret=True),
  }


def simulated(kernel: Callable, *arguments: Any, **options: Any) -> Any:
  """What a kernel returns in a TPU's simulator, which finds no race in it.

  Memory that nothing was written to holds NaN.
  """
  interpret = pltpu.InterpretParams(
    detect_races=True, out_of_bounds_reads='uninitialized'
  )
  found = kernel(*arguments, **options, interpret=interpret)
  assert not simulator.races.races_found
  return found
