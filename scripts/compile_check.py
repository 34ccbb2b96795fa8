r"""Compiles what runs on accelerators for ones that are not there.

  python scripts/compile_check.py --config=configs/pquant.py:1.3b \
      --target=v5p:2x2x1,h200 --config.data.batch_size=16
  python scripts/compile_check.py --config=configs/bitnet.py:300m \
      --target=h200 --config.data.batch_size=4 --json | jq .
  python scripts/compile_check.py --config=configs/integer.py:1.3b \
      --config.optim.estimator=spsa --config.optim.optimizer=sgd \
      --config.optim.clip_norm=0 --target=h200 --compare
  python scripts/compile_check.py --what=decode --target=v5p:2x2x1,h200 \
      --config=configs/pquant.py:1.3b --config.data.batch_size=1
  python scripts/compile_check.py --what=kernels --target=v5e:2x2,h200 \
      --only='packed_matmul.* (1|128)x'
  python scripts/compile_check.py --config=configs/ptq/tacq.py \
      --model=llama3-8b --target=h200

It is the step that `python -m qat.main` would run on those devices, compiled by
the compilers of their makers. NOTHING IS RUN: memory is what the compiler laid
out, and there is no speed. Any field of the config can be set, as for qat.main;
data.batch_size is of all devices together. With --compare the loss of a
micro-batch alone, and the step by backpropagation with AdamW, are compiled
beside it, and its memory is a share of theirs.

With --what=decode it is a step of generation from packed weights, on one
device: the next token of data.batch_size texts with room for data.seq_len
tokens each.

With --what=kernels it is every kernel of pallas_kernels that is written for a
target, at sizes of generation and of training; of TPUs the instructions are
counted that the compiler packed for a step of the grid, and in parentheses
those of each condition in it; of GPUs the registers of a thread. With --model
it is what scripts/quantize.py would run with GPTQ or TaCQ on a model of that
shape, program by program, on one device.

Each probe has a process of its own and --limit seconds, because some errors of
a compiler end it, or never end. TPUs need the Python package libtpu, GPUs the
plugin of jax and nvcc; both come from PyPI, and the command is told where they
are missing. The status is 0 if everything compiled, 1 if something did not, 2
for a wrong argument.
"""

import argparse
from collections.abc import Sequence
import json
import re
import sys
from typing import Any

from ml_collections import ConfigDict
from rich import console as rich_console

from configs import common
from pallas_kernels import cases
from qat import config_file
from qat import display
from qat import probe
from qat import probe_tables
from qat import step_probe
from qat import targets

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
  console = display.console(stderr=options.json)
  try:
    chosen = [targets.parse(name) for name in options.target.split(',')]
    if options.what == 'kernels':
      commands = _of_kernels(options, fields, chosen)
      name = 'kernels'
    else:
      config = _config(options, fields)
      if options.probe:
        probe.answer(options.probe, _measured(options, config, chosen[0]))
        return 0
      commands = [(t, [__file__, *arguments], {}) for t in chosen]
      name = options.model or config.name
    lacking = [text for t in chosen if (text := targets.missing(t))]
    if lacking:
      raise ValueError('\n'.join(dict.fromkeys(lacking)))
  except ValueError as error:
    print(f'Error: {error}', file=sys.stderr)
    return 2
  results = []
  with console.status('') as status:
    for i, (target, command, about) in enumerate(commands, 1):
      what = about.get('case', name)
      status.update(f'{i} of {len(commands)}: {what} for {target.name}')
      found = probe.ask(target, command, options.limit)
      results.append(found | about)
  if options.json:
    print(json.dumps({'note': NOTE, 'results': results}, indent=2))
  else:
    _show(console, options, name, results)
  return 0 if all(r['error'] is None for r in results) else 1


def _of_kernels(
  options: argparse.Namespace,
  fields: Sequence[str],
  chosen: Sequence[targets.Target],
) -> list[tuple[targets.Target, list[str], dict[str, str]]]:
  """A command for each case: target, arguments of Python, what it is."""
  if fields or options.config or options.compare or options.model:
    given = options.config or options.model or ' '.join(fields) or '--compare'
    raise ValueError(f'--what=kernels takes no config: {given}.')
  try:
    wanted = re.compile(options.only)
  except re.error as error:
    raise ValueError(f'--only={options.only!r}: {error}.') from error
  found = [
    (
      target,
      ['-m', 'qat.kernel_probe', f'--case={case.name}'],
      {'case': case.name},
    )
    for target in chosen
    for case in cases.cases(target.kernels)
    if wanted.search(case.name)
  ]
  if not found:
    raise ValueError(
      f'--only={options.only!r} leaves no case; one is'
      f' {cases.cases(chosen[0].kernels)[0].name!r}.'
    )
  return found


def _config(options: argparse.Namespace, fields: Sequence[str]) -> ConfigDict:
  if not options.config:
    raise ValueError(f'--what={options.what} needs a --config.')
  if options.only:
    raise ValueError(f'--only={options.only!r} is for --what=kernels.')
  if options.what == 'decode' and (options.compare or options.model):
    raise ValueError('--what=decode goes without --compare and --model.')
  return config_file.read(options.config, fields)


def _measured(
  options: argparse.Namespace, config: ConfigDict, target: targets.Target
) -> dict[str, Any]:
  """The answer of this process, which is a probe's."""
  if options.model:
    return step_probe.walk(config, _shape(options.model), target)
  if options.what == 'decode':
    return step_probe.decode_step(config, target)
  return step_probe.train_step(config, target, options.compare)


def _shape(name: str) -> ConfigDict:
  """The config of a model of the shape `name`."""
  if name not in MODELS:
    raise ValueError(f'--model={name}; one of {", ".join(MODELS)}.')
  config = common.base('300m')
  config.model.update(MODELS[name])
  return config.lock()


def _show(
  console: rich_console.Console,
  options: argparse.Namespace,
  name: str,
  results: list[dict[str, Any]],
) -> None:
  if options.what == 'kernels':
    for target in dict.fromkeys(r['target'] for r in results):
      mine = [r for r in results if r['target'] == target]
      probe_tables.kernels(console, mine)
  elif options.model:
    probe_tables.walks(console, name, results)
  else:
    probe_tables.steps(console, name, results)
  console.print(NOTE)


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  parser.add_argument(
    '--what',
    choices=('train_step', 'decode', 'kernels'),
    default='train_step',
    help='what is compiled (default: %(default)s)',
  )
  parser.add_argument('--config', help='config file, with a size')
  parser.add_argument(
    '--target',
    required=True,
    help='comma-separated: slices of TPUs as v5p:2x2x1; h200, or h200:8',
  )
  parser.add_argument(
    '--only',
    default='',
    metavar='REGEX',
    help='of the kernels: cases with this in their name',
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
    '--limit',
    type=float,
    default=1800,
    metavar='SECONDS',
    help='that a probe may take (default: %(default)s)',
  )
  parser.add_argument(
    '--json', action='store_true', help='print the figures as JSON, in bytes'
  )
  parser.add_argument('--probe', help=argparse.SUPPRESS)
  return parser


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
