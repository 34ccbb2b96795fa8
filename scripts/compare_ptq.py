r"""Quantizes a model by many methods, evaluates each, and makes one table.

  python scripts/compare_ptq.py --model=models/smollm2 --out=runs/ptq \
      --quantize='--dataset=data/mix --config.calibration.length=512' \
      --evaluate='--text wiki.test.txt --tasks tasks/arc_easy/rc_0shot'
  python scripts/compare_ptq.py --model=runs/fp-small --out=runs/ptq-small \
      --methods=gptq-3,tacq-3 --dry-run

Each variant is one scripts/quantize.py and one scripts/evaluate.py in processes
of their own; --quantize and --evaluate are arguments for all of them. What is
finished in --out is not done again, so a stopped comparison goes on, and more
variants can be added later. The table is printed and written to table.md and
table.json after each variant.
"""

import argparse
from collections.abc import Mapping
from collections.abc import Sequence
import json
import pathlib
import shlex
import shutil
import subprocess
import sys
from typing import Any

from qat.data import files
from qat.data import progress

ROOT = pathlib.Path(__file__).parents[1]


def _integers() -> dict[str, tuple[str, dict[str, Any]]]:
  """The methods with a choice of bits, at 4, 3 and 2."""
  made = {}
  for bits in (4, 3, 2):
    corrupted = {'quantizer_options.bits': bits}
    made |= {
      f'rtn-{bits}': ('rtn', {'method.bits': bits}),
      f'gptq-{bits}': ('gptq', {'method.bits': bits}),
      f'spqr-{bits}': ('spqr', {'method.bits': bits}),
      f'slim_llm-{bits}': ('slim_llm', {'method.bits': bits}),
      f'tacq-{bits}': ('tacq', corrupted),
    }
  # At 2 bits the default keeps 11 % of the weights in 16 bits.
  made['spqr-2'][1]['method.outlier_threshold'] = 1.0
  return made


def _matrices() -> dict[str, tuple[str, dict[str, Any]]]:
  """One scale a matrix, without calibration."""
  made = {}
  for bits in (4, 2):
    whole = {'method.bits': bits, 'method.granularity': 'tensor'}
    made[f'rtn-{bits}-tensor'] = ('rtn', whole)
    made[f'splitquant-{bits}'] = ('splitquant', {'method.bits': bits})
  return made


def _binary() -> dict[str, tuple[str, dict[str, Any]]]:
  made = {}
  for name, activation in (('a16', 'none'), ('a8', 'int8'), ('a6', 'int6')):
    for method in ('billm', 'dbellquant'):
      made[f'{method}-{name}'] = (method, {'activation': activation})
  return made


# Name -> a stem of configs/ptq, and fields of its config.
VARIANTS = {**_integers(), **_matrices(), **_binary()}
FLOAT = 'float'  # The model itself.


def main(arguments: Sequence[str]) -> int:
  """Runs the command line; returns the exit status."""
  options = _parser().parse_args(arguments)
  chosen = options.methods.split(',') if options.methods else list(VARIANTS)
  unknown = sorted(set(chosen) - set(VARIANTS))
  if unknown:
    progress.note(
      f'Error: --methods: no {", ".join(unknown)}; there are'
      f' {", ".join(VARIANTS)}.'
    )
    return 2
  status = 0
  for name in (FLOAT, *chosen):
    try:
      _variant(name, options)
    except subprocess.CalledProcessError as error:
      progress.note(f'Error: {name}: {shlex.join(map(str, error.cmd))} failed.')
      status = 1
    except ValueError as error:
      progress.note(f'Error: {error}')
      return 2
    except KeyboardInterrupt:
      progress.note('Stopped; the same command goes on.')
      return 130
    if not options.dry_run:
      _write(options.out)
  if not options.dry_run:
    print((options.out / 'table.md').read_text('utf-8'), end='')
  return status


def commands(name: str, options: argparse.Namespace) -> dict[str, list[str]]:
  """What is run for a variant: 'quantize' (not for the model) and 'evaluate'.

  Args:
    name: of `VARIANTS`, or `FLOAT`.
    options: of the command line.
  """
  model = options.model if name == FLOAT else options.out / name / 'model'
  script = [sys.executable, str(ROOT / 'scripts')]
  evaluate = [script[0], f'{script[1]}/evaluate.py', '--json']
  evaluate += [f'--model={model}', *shlex.split(options.evaluate)]
  if name == FLOAT:
    return {'evaluate': evaluate}
  stem, fields = VARIANTS[name]
  return {
    'quantize': [
      script[0],
      f'{script[1]}/quantize.py',
      f'--config={ROOT}/configs/ptq/{stem}.py',
      f'--model={options.model}',
      f'--out={model}',
      '--no-eval',
      *(f'--config.{field}={value}' for field, value in fields.items()),
      *shlex.split(options.quantize),
    ],
    'evaluate': evaluate,
  }


def _variant(name: str, options: argparse.Namespace) -> None:
  """Does what is not done yet."""
  folder = options.out / name
  answer, record = folder / 'evaluation.json', folder / 'commands.json'
  run = commands(name, options)
  if record.is_file() and json.loads(record.read_text('utf-8')) != run:
    raise ValueError(
      f'{folder} was made by other commands ({record}): another model, or other'
      ' arguments. Take another --out, or remove the folder.'
    )
  if answer.is_file():
    return
  if options.dry_run:
    print(*map(shlex.join, run.values()), sep='\n')
    return
  folder.mkdir(parents=True, exist_ok=True)
  files.write(record, json.dumps(run, indent=2).encode())
  report = folder / 'report.json'
  if 'quantize' in run and not report.is_file():
    shutil.rmtree(folder / 'model', ignore_errors=True)
    progress.note(f'{name}: quantizing')
    subprocess.run(run['quantize'], check=True, stdout=subprocess.DEVNULL)
    files.write(report, (folder / 'model' / 'report.json').read_bytes())
  progress.note(f'{name}: evaluating')
  done = subprocess.run(run['evaluate'], check=True, stdout=subprocess.PIPE)
  json.loads(done.stdout)  # Whole, or an error here.
  files.write(answer, done.stdout)
  if not options.keep:
    shutil.rmtree(folder / 'model', ignore_errors=True)


def _write(out: pathlib.Path) -> None:
  rows = []
  for name in (FLOAT, *VARIANTS):
    folder = out / name
    if not (folder / 'evaluation.json').is_file():
      continue
    evaluation = json.loads((folder / 'evaluation.json').read_text('utf-8'))
    report = {}
    if name != FLOAT:
      report = json.loads((folder / 'report.json').read_text('utf-8'))
    rows.append(row(name, report, evaluation))
  (out / 'table.json').write_text(json.dumps(rows, indent=2) + '\n')
  (out / 'table.md').write_text(markdown(rows), 'utf-8')


def row(
  name: str, report: Mapping[str, Any], evaluation: Mapping[str, Any]
) -> dict[str, Any]:
  """The numbers of a variant, in the order of the table's columns.

  Args:
    name: of the variant.
    report: report.json of scripts/quantize.py; empty for the model itself.
    evaluation: what scripts/evaluate.py --json printed.
  """
  found: dict[str, Any] = {'variant': name}
  totals = report.get('totals', {})
  found['bits'] = totals.get('bits_per_weight')
  found['seconds'] = totals.get('seconds')
  if 'eval/perplexity' in evaluation:
    found['held-out perplexity'] = evaluation['eval/perplexity']
    found['held-out bits per byte'] = evaluation['eval/bits_per_byte']
  for text in evaluation.get('texts', ()):
    stem = pathlib.Path(text['text']).name
    found[f'{stem} perplexity'] = text['perplexity']
    found[f'{stem} bits per byte'] = text['bits_per_byte']
  for task in evaluation.get('tasks', ()):
    found[f'{task["task"]} {task["variant"]}'] = task['acc']
  return found


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
  """A Markdown table; a column for every number that some row has."""
  columns = list(dict.fromkeys(key for row in rows for key in row))
  lines = [columns, ['---'] * len(columns)]
  lines += [[_cell(row.get(key)) for key in columns] for row in rows]
  return ''.join(f'| {" | ".join(line)} |\n' for line in lines)


def _cell(value: Any) -> str:
  if value is None:
    return ''
  if isinstance(value, str):
    return value
  if value >= 10_000:
    return f'{value:.1e}'
  return f'{value:.1f}' if value >= 100 else f'{value:.3f}'


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add(
    '--model',
    type=pathlib.Path,
    required=True,
    metavar='DIR',
    help='folder of a run, or a model folder, of full precision',
  )
  add(
    '--out',
    type=pathlib.Path,
    required=True,
    metavar='DIR',
    help='folder of the comparison',
  )
  add(
    '--methods',
    metavar='NAMES',
    help=f'comma-separated, of {", ".join(VARIANTS)} (default: all)',
  )
  add(
    '--quantize',
    default='',
    metavar='ARGS',
    help='arguments for every scripts/quantize.py',
  )
  add(
    '--evaluate',
    default='',
    metavar='ARGS',
    help='arguments for every scripts/evaluate.py',
  )
  add('--keep', action='store_true', help='keep the quantized models')
  add('--dry-run', action='store_true', help='print the commands alone')
  return parser


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
