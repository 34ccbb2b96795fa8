"""Compiles a training step, or a quantization, for absent accelerators.

  python scripts/compile_check.py --config=configs/pquant.py:1.3b \
      --target=v5p:2x2x1,h200 --config.data.batch_size=16
  python scripts/compile_check.py --config=configs/bitnet.py:300m \
      --target=h200 --config.data.batch_size=4 --json | jq .
  python scripts/compile_check.py --config=configs/integer.py:1.3b \
      --config.optim.estimator=spsa --config.optim.optimizer=sgd \
      --config.optim.clip_norm=0 --target=h200 --compare
  python scripts/compile_check.py --config=configs/ptq/tacq.py \
      --model=llama3-8b --target=h200

It is the step that `python -m qat.main` would run on those devices, compiled by
the compilers of their makers. NOTHING IS RUN: memory is what the compiler laid
out, and there is no speed. Any field of the config can be set, as for qat.main;
data.batch_size is of all devices together. With --compare the loss of the same
batch alone, and the step by backpropagation with AdamW, are compiled beside it,
and its memory is a share of theirs. With --model it is what scripts/quantize.py
would run with GPTQ or TaCQ on a model of that shape, program by program, on one
device. Each target is compiled in a process of its own, because some errors of
a compiler end it.

TPUs need the Python package libtpu, GPUs the plugin of jax and nvcc; both come
from PyPI, and the command is told where they are missing.
"""

import argparse
from collections.abc import Sequence
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

from jax import errors as jax_errors
from ml_collections import ConfigDict
from rich import console as rich_console
from rich import table as rich_table

from configs import common
from qat import config as config_lib
from qat import config_file
from qat import display
from qat import flops
from qat import footprint
from qat import hlo
from qat import sharding
from qat import step as step_lib
from qat import targets
from qat.ptq import programs

# Fields of the model section, over those of `common.base('300m')`.
MODELS = {
  'llama3-8b': dict(
    vocab_size=128_256,
    d_model=4096,
    n_layers=32,
    n_heads=32,
    n_kv_heads=8,
    d_ff=14_336,
    norm_eps=1e-5,
    rope_theta=500_000.0,
    tied_embeddings=False,
    remat='none',
    scan_layers=False,
  )
}
NOTE = (
  'Nothing was run: these are the figures of the compilers, on a machine'
  ' without these devices.'
)


def main(arguments: Sequence[str]) -> int:
  """Runs the command line; returns the exit status."""
  options, fields = _parser().parse_known_args(arguments)
  try:
    config = config_file.read(options.config, fields)
    chosen = [targets.parse(name) for name in options.target.split(',')]
    if options.probe:
      if options.model:
        found = probe_walk(config, _shape(options.model), chosen[0])
      else:
        found = probe(config, chosen[0], options.compare)
      pathlib.Path(options.probe).write_text(json.dumps(found))
      return 0
    lacking = [text for t in chosen if (text := targets.missing(t))]
    if lacking:
      raise ValueError('\n'.join(dict.fromkeys(lacking)))
  except ValueError as error:
    print(f'Error: {error}', file=sys.stderr)
    return 2
  console = rich_console.Console(stderr=options.json)
  results, name = [], options.model or config.name
  for target in chosen:
    with console.status(f'Compiling {name} for {target.name}'):
      results.append(_in_a_process(target, arguments))
  if options.json:
    print(json.dumps({'note': NOTE, 'results': results}, indent=2))
  else:
    (_show_walk if options.model else _show)(console, name, results)
  return 0 if all(r['error'] is None for r in results) else 1


def probe(
  config: ConfigDict, target: targets.Target, compare: bool = False
) -> dict[str, Any]:
  """Compiles in this process; returns what the compiler tells.

  Args:
    config: a locked config.
    target: the devices; this process was started with their `environment`.
    compare: whether also to compile what the step is compared with.

  Returns:
    The figures by name, bytes of memory on each device; 'error' is None, or
    why there are none. With `compare` also peaks of `footprint.beside`.

  Raises:
    ValueError: the config cannot run on these devices.
  """
  devices = targets.devices(target)
  config_lib.check(config, devices=len(devices), platform=devices[0].platform)
  mesh = sharding.make_mesh(config.mesh, devices)
  found = _result(target) | {
    'kind': devices[0].device_kind,
    'devices': len(devices),
    'mesh': dict(mesh.shape),
  }
  start = time.monotonic()
  try:
    program = step_lib.compile_program(config, mesh)
    for name, other in (footprint.beside(program) if compare else {}).items():
      peak = other.memory_analysis().peak_memory_in_bytes
      found[f'{name}_peak_bytes'] = peak
  except jax_errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    return found | {'error': _first_line(str(error))}
  seconds = time.monotonic() - start
  compiled = program.train_step
  memory = compiled.memory_analysis()
  tokens = config.data.batch_size * config.data.seq_len
  needed = flops.train_flops_per_token(config, program.abstract.params)
  return found | {
    'compile_seconds': round(seconds, 1),
    'tokens_per_device': tokens // len(devices),
    'argument_bytes': memory.argument_size_in_bytes,
    'output_bytes': memory.output_size_in_bytes,
    'reused_bytes': memory.alias_size_in_bytes,
    'temporary_bytes': memory.temp_size_in_bytes,
    'peak_bytes': memory.peak_memory_in_bytes,
    'needed_flops': needed * tokens / len(devices),
    'compiler_flops': (compiled.cost_analysis() or {}).get('flops'),
    'collectives': {
      kind: vars(each)
      for kind, each in hlo.collectives(compiled.as_text()).items()
    },
  }


def _shape(name: str) -> ConfigDict:
  """The config of a model of the shape `name`."""
  if name not in MODELS:
    raise ValueError(f'--model={name}; one of {", ".join(MODELS)}.')
  config = common.base('300m')
  config.model.update(MODELS[name])
  return config.lock()


def probe_walk(
  ptq: ConfigDict, config: ConfigDict, target: targets.Target
) -> dict[str, Any]:
  """Compiles the programs of a quantization for the first device.

  Args:
    ptq: a config of `configs/ptq`.
    config: the model's.
    target: as for `probe`.

  Returns:
    As `probe`; 'programs' has a dict for each.
  """
  device = targets.devices(target)[0]
  found = programs.measure(config, ptq, device)
  return _result(target) | {'kind': device.device_kind} | found


def _show_walk(
  console: rich_console.Console, name: str, results: list[dict[str, Any]]
) -> None:
  for result in results:
    if result['error'] is not None:
      console.print(f'{result["target"]}: {result["error"]}', markup=False)
      continue
    table = rich_table.Table(title=f'{name} on {result["target"]}, GB')
    for column in ('', 'program', 'its temporaries', 'beside it', 'together'):
      table.add_column(column, justify='right' if column else 'left')
    for row in result['programs']:
      both = row['peak_bytes'] + row['beside_bytes']
      parts = (row['peak_bytes'], row['temporary_bytes'], row['beside_bytes'])
      cells = [f'{size / 1e9:.2f}' for size in (*parts, both)]
      table.add_row(row['name'], *cells)
    console.print(table)
    console.print(
      f'A block in float32 takes {result["block_bytes"] / 1e9:.2f} GB, the'
      ' hidden states of all calibration sequences'
      f' {result["states_bytes"] / 1e9:.2f} GB.'
    )
  console.print(NOTE)


def _result(target: targets.Target) -> dict[str, Any]:
  memory = targets.MEMORY[target.kind]
  return {'target': target.name, 'memory_bytes': memory, 'error': None}


def _in_a_process(
  target: targets.Target, arguments: Sequence[str]
) -> dict[str, Any]:
  """What `probe` returns, from a process of its own."""
  with tempfile.TemporaryDirectory() as folder:
    answer = pathlib.Path(folder) / 'answer.json'
    child = subprocess.run(
      [
        sys.executable,
        __file__,
        *arguments,
        f'--probe={answer}',
        f'--target={target.name}',
      ],
      env=targets.environment(target, os.environ),
      stdin=subprocess.DEVNULL,
      capture_output=True,
      text=True,
      check=False,
    )
    if child.returncode == 0:
      return json.loads(answer.read_text())
  lines = (child.stdout + child.stderr).strip().splitlines()
  message = '\n'.join(lines[-8:])
  if child.returncode < 0:
    name = signal.Signals(-child.returncode).name
    message = f'The compiler ended its process with {name}. {message}'
  return _result(target) | {'error': message.removeprefix('Error: ')}


def _first_line(text: str) -> str:
  return text.strip().splitlines()[0]


def _show(
  console: rich_console.Console, name: str, results: list[dict[str, Any]]
) -> None:
  good = [result for result in results if result['error'] is None]
  table = rich_table.Table(title=name)
  table.add_column('on each device')
  for result in good:
    table.add_column(result['target'], justify='right')

  def size(key: str):
    return lambda r: f'{r[key] / 1e9:.2f} GB'

  def share(key: str):
    return lambda r: f'{r["peak_bytes"] / r[key]:.3f}'

  def row(label, text):
    table.add_row(label, *map(text, good))

  row('devices of the mesh', lambda r: ' x '.join(map(str, r['mesh'].values())))
  row('compile time', lambda r: f'{r["compile_seconds"]:.0f} s')
  row('tokens of a step', lambda r: f'{r["tokens_per_device"]:,}')
  row('arguments', size('argument_bytes'))
  row('outputs', size('output_bytes'))
  row('  in the place of arguments', size('reused_bytes'))
  row('temporaries', size('temporary_bytes'))
  row('peak', size('peak_bytes'))
  row('  of its memory', size('memory_bytes'))
  row(
    '', lambda r: 'fits' if r['peak_bytes'] < r['memory_bytes'] else 'NO ROOM'
  )
  for name, label in (
    ('forward', 'of a forward pass alone'),
    ('backprop', 'of backpropagation with AdamW'),
  ):
    if good and all(f'{name}_peak_bytes' in r for r in good):
      row(f'peak {label}', size(f'{name}_peak_bytes'))
      row("  this step's share of it", share(f'{name}_peak_bytes'))
  row('FLOPs that a step needs', lambda r: display.count(r['needed_flops']))
  row('FLOPs, loops counted once', lambda r: _count(r['compiler_flops']))
  for kind in hlo.KINDS:
    if any(kind in r['collectives'] for r in good):
      row(kind, lambda r, kind=kind: _exchange(r['collectives'].get(kind)))
  if good:
    console.print(table)
  for result in results:
    if result['error'] is not None:
      console.print(f'{result["target"]}: {result["error"]}', markup=False)
  console.print(NOTE)


def _count(number: float | None) -> str:
  return 'not told' if number is None else display.count(number)


def _exchange(found: dict[str, int] | None) -> str:
  if found is None:
    return '-'
  some = ' or more' if found['unknown'] else ''
  return f'{found["bytes"] / 1e6:,.1f} MB{some} in {found["count"]}'


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  parser.add_argument(
    '--config', required=True, help='config file, with a size'
  )
  parser.add_argument(
    '--target',
    required=True,
    help='comma-separated: slices of TPUs as v5p:2x2x1; h200, or h200:8',
  )
  parser.add_argument(
    '--model',
    help='of a configs/ptq: the shape of the model, one of'
    f' {", ".join(MODELS)}',
  )
  parser.add_argument(
    '--compare',
    action='store_true',
    help='also compile a forward pass and a step by backpropagation',
  )
  parser.add_argument(
    '--json', action='store_true', help='print the figures as JSON, in bytes'
  )
  parser.add_argument('--probe', help=argparse.SUPPRESS)
  return parser


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
