"""Compiles one kernel for a device that is not there; runs nothing.

  python -m qat.kernel_probe --target=v5e:2x2 --probe=answer.json \
      --case='packed_matmul tpu 1bit int8 16x2000x600'

is one of the processes of `scripts/compile_check.py --what=kernels`.
"""

import argparse
from collections.abc import Sequence
import dataclasses
import os
import pathlib
import re
import sys
import tempfile
import time
from typing import Any

import jax

from pallas_kernels import cases
from qat import probe
from qat import schedule
from qat import targets

_REGISTERS = re.compile(r'Used (\d+) registers')
_SPILLED = re.compile(r'(\d+) bytes spill stores')


def measure(target: targets.Target, name: str) -> dict[str, Any]:
  """Compiles in this process; returns what the compiler tells.

  Args:
    target: this process was started with its `environment`.
    name: of a `cases.Case`.

  Returns:
    `probe.result` with 'case', 'compile_seconds', bytes of 'argument', 'output'
    and 'temporary', and 'needed_flops'; of a TPU 'schedules', a dict of
    `schedule.Schedule` for each kernel; of a GPU 'registers' of a thread and
    'spilled_bytes', the most of any kernel.

  Raises:
    ValueError: there is no such case for the target.
  """
  found = [c for c in cases.cases(target.kernels) if c.name == name]
  if not found:
    raise ValueError(f'No case {name!r} for {target.name}.')
  (case,) = found
  with tempfile.TemporaryDirectory() as folder:
    written = pathlib.Path(folder)
    _write_to(target, written)
    there = jax.sharding.SingleDeviceSharding(targets.devices(target)[0])
    function, arguments = case.call()
    arguments = jax.tree.map(
      lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=there),
      arguments,
    )
    start = time.monotonic()
    compiled = jax.jit(function).lower(*arguments).compile()
    seconds = time.monotonic() - start
    if target.is_gpu:
      told = _registers(written)
    else:
      schedules = schedule.of_kernels(written, compiled.as_text())
      told = {
        'schedules': {k: dataclasses.asdict(s) for k, s in schedules.items()}
      }
  memory = compiled.memory_analysis()
  return probe.result(target) | {
    'case': name,
    'compile_seconds': round(seconds, 1),
    'argument_bytes': memory.argument_size_in_bytes,
    'output_bytes': memory.output_size_in_bytes,
    'temporary_bytes': memory.temp_size_in_bytes,
    'needed_flops': case.flops,
    **told,
  }


def _write_to(target: targets.Target, folder: pathlib.Path) -> None:
  """Lets the compiler, which was not called yet, write down what it does."""
  if target.is_gpu:
    os.environ['MOSAIC_GPU_DUMP_TO'] = str(folder)
  else:
    flags = os.environ.get('LIBTPU_INIT_ARGS', '')
    flags = f'{flags} {schedule.flags(folder)}'.strip()
    os.environ['LIBTPU_INIT_ARGS'] = flags


def _registers(folder: pathlib.Path) -> dict[str, int]:
  """What ptxas says of the kernels that it assembled.

  Raises:
    FileNotFoundError: it was not called.
  """
  texts = [path.read_text('utf-8') for path in folder.glob('*.ptxas')]
  if not texts:
    raise FileNotFoundError(f'Mosaic GPU wrote no *.ptxas to {folder}.')
  text = '\n'.join(texts)
  return {
    'registers': max(map(int, _REGISTERS.findall(text))),
    'spilled_bytes': max(map(int, _SPILLED.findall(text))),
  }


def main(arguments: Sequence[str]) -> int:
  """Runs the command line; returns the exit status."""
  parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
  for name in ('target', 'case', 'probe'):
    parser.add_argument(f'--{name}', required=True)
  options = parser.parse_args(arguments)
  try:
    found = measure(targets.parse(options.target), options.case)
  except ValueError as error:
    print(f'Error: {error}', file=sys.stderr)
    return 2
  probe.answer(options.probe, found)
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
