"""How fast the packed product is on a CPU, against XLA and against memory."""

from collections.abc import Callable
from collections.abc import Iterator
import functools
import time
from typing import Any

import jax
from jax import numpy as jnp

from pallas_kernels import native
from pallas_kernels import packing
from pallas_kernels.packed_matmul import cpu

SHAPES = ((4096, 4096), (8192, 8192), (16384, 32768))
ROWS = (1, 4, 8)
MOST_FLOATS = 8192 * 8192  # Of a matrix that is also multiplied as floats.


def read_memory(x: jax.Array) -> jax.Array:
  """The sum, modulo 2^32, of int32 numbers, as int32 `[1]`: one read of x."""
  native.number(None)
  shape = jax.ShapeDtypeStruct((1,), jnp.int32)
  return jax.ffi.ffi_call('qat_read_memory', shape)(x)


def packed_products(rounds: int) -> Iterator[dict[str, Any]]:
  """Measures matrix-vector and small-batch products.

  Every round runs each program of a shape, so that a slow moment of the machine
  meets all of them; the time of each is its median. It runs twice in a row, and
  the second time counts: threads are awake, and what fits a cache is there.

  Args:
    rounds: how often each program is timed.

  Yields:
    For each shape, format and number of rows: 'shape', 'rows', 'format',
    'seconds', 'bytes' of the weights, their share of what memory gave ('of
    memory'; above 1 where they fit a cache), and how many times as fast it is
    as XLA with 'float32' and 'bfloat16' weights (None where not measured).

  Raises:
    ValueError: without the C++ extension.
  """
  for inputs, outputs in SHAPES:
    programs = {}
    for format in ('1bit', '2bit'):
      programs |= _of_format(format, inputs, outputs)
    size = inputs * outputs // 32  # int32 numbers, as many bytes as 1 bit.
    words = jnp.ones((size,), jnp.int32)
    programs['read', 1] = functools.partial(jax.jit(read_memory), words)
    if inputs * outputs <= MOST_FLOATS:
      for name in ('float32', 'bfloat16'):
        programs[name, 1] = _of_floats(name, inputs, outputs)
    seconds = _medians(programs, rounds)
    memory = words.nbytes / seconds['read', 1]
    for format, rows in seconds:
      if format not in packing.FORMATS:
        continue
      mine = seconds[format, rows]
      weights = inputs * outputs // packing.FORMATS[format].planes
      xla = {
        name: seconds[name, 1] / mine
        if rows == 1 and (name, 1) in seconds
        else None
        for name in ('float32', 'bfloat16')
      }
      yield {
        'shape': f'{inputs} x {outputs}',
        'rows': rows,
        'format': format,
        'seconds': mine,
        'bytes': weights,
        'memory bytes/s': memory,
        'of memory': weights / mine / memory,
        **xla,
      }


def _of_format(format: str, inputs: int, outputs: int) -> dict:
  data = jax.random.bits(
    jax.random.key(0),
    (outputs, inputs // packing.FORMATS[format].planes),
    jnp.uint8,
  )
  packed = packing.Packed(
    jax.lax.bitcast_convert_type(data, jnp.int8),
    *(jnp.ones((1, 1)), format, inputs, outputs, -1, cpu.BLOCK),
  )
  multiply = jax.jit(cpu.sums)
  return {
    (format, rows): functools.partial(
      multiply, jnp.ones((rows, inputs), jnp.int8), packed
    )
    for rows in ROWS
  }


def _of_floats(dtype: str, inputs: int, outputs: int) -> Callable[[], Any]:
  """A vector times a matrix, as XLA does it."""
  x_1K = jnp.ones((1, inputs), dtype)
  w_KN = jax.random.normal(jax.random.key(0), (inputs, outputs), dtype)
  multiply = jax.jit(
    functools.partial(jnp.dot, preferred_element_type=jnp.float32)
  )
  return functools.partial(multiply, x_1K, w_KN)


def _medians(programs: dict, rounds: int) -> dict:
  times = {name: [] for name in programs}
  for _ in range(rounds):
    for name, program in programs.items():
      jax.block_until_ready(program())
      start = time.perf_counter()
      jax.block_until_ready(program())
      times[name].append(time.perf_counter() - start)
  return {name: sorted(taken)[rounds // 2] for name, taken in times.items()}
