r"""Forward passes against backpropagation, for quantized models and for runs.

  python scripts/zo_study.py --out=zo.html --dataset=data/wiki \
      --models models/zeroqat-w4a4 models/smollm2 --eps 5e-4 1e-3
  python scripts/zo_study.py --out=zo.html --json=zo.json \
      --runs runs/zeroqat-w4a4 runs/ste-w4a4

Of models, all on the same batch and along the same directions: slopes of the
quantized loss beside those of the straight-through gradient, and cosines of
estimates from 1, 4, 16, ... directions and that gradient. A full-precision
model tells what rounding of floats alone does to these numbers. A model is a
run's workdir (its newest checkpoint) or a model folder.

Of runs: their losses at equal steps, and at equal seconds of training.

docs/methods/zeroqat.md says what the numbers mean. The page needs no network.
"""

from qat import launch

if __name__ == '__main__':
  launch.tune_malloc()

import argparse
from collections.abc import Sequence
import json
import math
import pathlib
import sys
from typing import Any

import jax
import numpy as np
from rich import table as rich_table
from rich import text as rich_text

from qat import display
from qat import manifest
from qat import metrics
from qat import zo_curves
from qat import zo_study
from qat import zo_study_page
from qat.data import dataset as dataset_lib
from qat.data import loader
from qat.data import progress
from qat.infer import load


def main(arguments: Sequence[str]) -> int:
  """Runs the command line; returns the exit status."""
  options = _parser().parse_args(arguments)
  try:
    _check(options)
    curves = [zo_curves.read(workdir) for workdir in options.runs]
    studies = {name: _study(options, name) for name in options.models}
    _write(options.out, zo_study_page.page(studies, curves))
    if options.json is not None:
      content = _content(options, studies, curves)
      _write(options.json, json.dumps(content, allow_nan=False) + '\n')
  except (ValueError, OSError, manifest.CorruptError) as error:
    progress.note(f'Error: {error}')
    return 2
  except KeyboardInterrupt:
    return 130
  for heads, rows in (
    zo_study_page.study_lines(studies),
    zo_study_page.run_lines(curves),
  ):
    if rows:
      _show(heads, rows)
  progress.note(f'Page: {options.out}')
  return 0


def _check(options: argparse.Namespace) -> None:
  for path in (options.out, options.json):
    if path is not None and not path.parent.is_dir():
      raise FileNotFoundError(
        f'{path} cannot be written: there is no folder {path.parent}. Make it,'
        ' or name another.'
      )
  if not options.models and not options.runs:
    raise ValueError('Nothing to compare; give --models, --runs, or both.')
  if options.models and options.dataset is None:
    raise ValueError('--models needs --dataset: text to measure losses on.')
  zo_study.check(options.eps, options.groups, options.directions)


def _study(options: argparse.Namespace, name: str) -> zo_study.Study:
  model = load.load_model(name, None)
  dataset = dataset_lib.open_dataset(options.dataset)
  if dataset.tokenizer.to_str() != model.tokenizer.to_str():
    raise ValueError(
      f'{options.dataset} has another tokenizer than {name}. Prepare the text'
      ' with the tokenizer of the model (scripts/prepare_data.py --tokenizer).'
    )
  window_BT = loader.calibration_batch(
    options.dataset,
    seq_len=options.length + 1,
    sequences=options.sequences,
    seed=options.seed,
  )
  batch = {'tokens': window_BT[:, :-1], 'targets': window_BT[:, 1:]}
  with jax.set_mesh(model.mesh), progress.bar(name, total=100) as bar:
    return zo_study.study(
      zo_study.loss_of(model, batch),
      model.params,
      pattern=options.perturbed,
      eps=options.eps,
      groups=options.groups,
      directions=options.directions,
      seed=options.seed,
      show=lambda done, total: bar(
        100 * done // total, f'{done} of {total} losses'
      ),
    )


def _content(
  options: argparse.Namespace,
  studies: dict[str, zo_study.Study],
  curves: Sequence[zo_curves.Curve],
) -> dict[str, Any]:
  """What the page shows, as JSON."""
  rows = zo_curves.compare(curves) if curves else []
  fields = ('dataset', 'sequences', 'length', 'seed', 'perturbed')
  return {
    'options': {field: getattr(options, field) for field in fields},
    'models': {name: _plain(made) for name, made in studies.items()},
    'runs': [_plain(row) for row in rows],
    'curves': [_plain(curve) for curve in curves],
  }


def _plain(value: Any) -> Any:
  """Named tuples as objects, arrays as lists, NaN as null."""
  if hasattr(value, '_asdict'):
    return {k: _plain(v) for k, v in value._asdict().items()}
  if isinstance(value, dict):
    return {str(k): _plain(v) for k, v in value.items()}
  if isinstance(value, np.ndarray):
    value = value.tolist()
  if isinstance(value, list):
    return [_plain(v) for v in value]
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value


def _write(path: pathlib.Path, text: str) -> None:
  with metrics.replacing(path) as file:
    file.write(text.encode())


def _show(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
  table = rich_table.Table()
  for i, head in enumerate(heads):
    table.add_column(head, justify='right' if i else 'left', overflow='fold')
  for row in rows:
    table.add_row(*(rich_text.Text(display.printable(cell)) for cell in row))
  display.console().print(table)


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add(
    '--out',
    type=pathlib.Path,
    required=True,
    metavar='FILE',
    help='where the page is written',
  )
  add(
    '--json',
    type=pathlib.Path,
    metavar='FILE',
    help='where all numbers are written, if at all',
  )
  add(
    '--runs',
    type=pathlib.Path,
    nargs='+',
    default=[],
    metavar='WORKDIR',
    help='folders of runs (qat.main --workdir) whose losses are compared',
  )
  add = parser.add_argument_group('models').add_argument
  add(
    '--models',
    nargs='+',
    default=[],
    metavar='DIR',
    help='workdirs of runs, or model folders; all of one tokenizer',
  )
  add('--dataset', metavar='DIR', help='a data set with their tokenizer')
  add(
    '--eps',
    type=float,
    nargs='+',
    default=[1e-3],
    metavar='E',
    help='distances to both sides; estimates are made with the first (default:'
    ' %(default)s)',
  )
  add(
    '--directions',
    type=int,
    default=64,
    metavar='N',
    help='random directions, of two losses for each distance (default:'
    ' %(default)s)',
  )
  add(
    '--groups',
    type=int,
    nargs='+',
    default=[1, 4, 16, 64],
    metavar='Q',
    help='directions of an estimate (default: %(default)s)',
  )
  add(
    '--perturbed',
    default=r'.*(kernel|embedding|head|positions)',
    metavar='REGEX',
    help='whole paths of the parameters that are trained (default:'
    ' %(default)s)',
  )
  add(
    '--sequences',
    type=int,
    default=4,
    metavar='N',
    help='of the batch (default: %(default)s)',
  )
  add(
    '--length',
    type=int,
    default=256,
    metavar='T',
    help='tokens of a sequence (default: %(default)s)',
  )
  add(
    '--seed',
    type=int,
    default=0,
    metavar='N',
    help='of batch and directions (default: %(default)s)',
  )
  return parser


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
