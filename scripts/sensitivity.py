r"""Compares the sensitivities of single weights in several finished runs.

  python scripts/sensitivity.py runs/fp runs/bitnet runs/pquant --out=s.html
  python scripts/sensitivity.py runs/fp runs/pquant --out=s.html --json=s.json
  python scripts/sensitivity.py runs/a runs/b --out=s.html --sequences=32
  python scripts/sensitivity.py runs/a runs/b --out=s.html --layer='.*/attn/o'
  python scripts/sensitivity.py runs/a runs/b --out=s.html --dataset=data/other

The newest checkpoints of all runs read one calibration batch, and every linear
layer is analysed: its latent weights, its quantized ones if it has any, and
weights of one size, which the inputs alone make unequal. The page shows the
chosen layers in detail (by default the down projections of the last block's
feed-forward layer, as pQuant's figures 2 and 5a do) and all layers by depth. It
needs no network.
"""

from qat import launch

if __name__ == '__main__':
  launch.tune_malloc()

import argparse
from collections.abc import Sequence
import json
import pathlib
import sys

from rich import table as rich_table
from rich import text as rich_text

from qat import display
from qat import manifest
from qat import metrics
from qat import sensitivity_page
from qat import sensitivity_study
from qat.data import progress


def main(arguments: Sequence[str]) -> int:
  """Runs the command line; returns the exit status."""
  options = _parser().parse_args(arguments)
  try:
    made = _study(options)
    _write(options.out, sensitivity_page.page(made))
    if options.json is not None:
      content = sensitivity_study.to_json(made)
      _write(options.json, json.dumps(content, allow_nan=False) + '\n')
  except (ValueError, OSError, manifest.CorruptError) as error:
    progress.note(f'Error: {error}')
    return 2
  except KeyboardInterrupt:
    return 130
  _show(made)
  progress.note(f'Page: {options.out}')
  return 0


def _study(options: argparse.Namespace) -> sensitivity_study.Study:
  for path in (options.out, options.json):
    if path is not None and not path.parent.is_dir():
      raise FileNotFoundError(
        f'{path} cannot be written: there is no folder {path.parent}. Make it,'
        ' or name another.'
      )
  with progress.bar('Sensitivity', total=100) as bar:
    return sensitivity_study.study(
      options.workdirs,
      layer=options.layer,
      dataset=options.dataset,
      sequences=options.sequences,
      seed=options.seed,
      damping=options.damping,
      show=lambda done, total, words: bar(100 * done // total, words),
    )


def _write(path: pathlib.Path, text: str) -> None:
  with metrics.replacing(path) as file:
    file.write(text.encode())


def _show(made: sensitivity_study.Study) -> None:
  c = made.calibration
  table = rich_table.Table(
    title=rich_text.Text(
      f'{c.sequences} x {c.seq_len} tokens of {display.printable(c.dataset)},'
      f' damping {c.damping:g}'
    )
  )
  table.add_column('run', overflow='fold')
  table.add_column('layer', overflow='fold')
  for kind in sensitivity_page.KINDS:
    table.add_column(f'{kind}\nGini', justify='right')
    table.add_column('\ntop 1 %', justify='right')
  for label, layer, kinds in sensitivity_page.rows(made.runs):
    cells = []
    for kind in sensitivity_page.KINDS:
      if kind in kinds:
        gini, top1 = kinds[kind]
        cells += [f'{gini:.3f}', f'{100 * top1:.1f} %']
      else:
        cells += ['-', '-']
    names = (rich_text.Text(display.printable(name)) for name in (label, layer))
    table.add_row(*names, *cells)
  display.console().print(table)


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add(
    'workdirs',
    type=pathlib.Path,
    nargs='+',
    metavar='WORKDIR',
    help='folders of the runs (qat.main --workdir), in the order to show them',
  )
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
    help='where the numbers of all layers are written, if at all',
  )
  add(
    '--layer',
    metavar='REGEX',
    help='whole paths of the layers to show in detail, such as block_0/attn/q'
    " (default: down projections of each run's last block); without a number at"
    ' its end, a path stands for all experts',
  )
  add(
    '--dataset',
    metavar='DIR',
    help='a data set (scripts/prepare_data.py) with the tokenizer of the runs'
    ' to calibrate on (default: their own, if it is one and the same)',
  )
  add(
    '--sequences',
    type=int,
    metavar='N',
    help="calibration sequences (default: the first run's"
    ' config.sensitivity.sequences)',
  )
  add(
    '--damping',
    type=float,
    metavar='SHARE',
    help='of the mean diagonal of X^T X, added before its inversion (default:'
    " the first run's config.sensitivity.damping)",
  )
  add(
    '--seed',
    type=int,
    metavar='N',
    help="of the calibration batch (default: one more than the first run's"
    ' config.seed, on whose batch the run has studied itself)',
  )
  return parser


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
