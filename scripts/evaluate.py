r"""Evaluates a run's newest checkpoint on validation text.

  python scripts/evaluate.py --workdir runs/pquant-tiny
  python scripts/evaluate.py --workdir runs/pquant-tiny --batches 10
  python scripts/evaluate.py --workdir runs/pquant-tiny --dataset data/other
  python scripts/evaluate.py --workdir runs/pquant-tiny --json | jq .

Bits per byte compare between tokenizers, perplexity per token does not. The
baselines need no neural network: gzip -9, and the frequencies of single tokens.
"""

from qat import launch

if __name__ == '__main__':
  launch.tune_malloc()

import argparse
from collections.abc import Sequence
import json
import pathlib
import sys
from typing import Any

from rich import console as rich_console
from rich import table as rich_table

from qat import evaluate
from qat import manifest
from qat.data import dataset as dataset_lib
from qat.data import progress
from qat.infer import load


def main(arguments: Sequence[str]) -> int:
  """Runs the command line; returns the exit status."""
  options = _parser().parse_args(arguments)
  try:
    found = _evaluate(options)
  except (ValueError, OSError, manifest.CorruptError) as error:
    progress.note(f'Error: {error}')
    return 2
  except KeyboardInterrupt:
    return 130
  if options.json:
    print(json.dumps(found, indent=2))
  else:
    _show(found)
  return 0


def _evaluate(options: argparse.Namespace) -> dict[str, Any]:
  run = load.load_run(options.workdir)
  dataset = run.dataset
  if options.dataset is not None:
    dataset = dataset_lib.open_dataset(options.dataset)
    _refuse_other_tokenizer(run.dataset, dataset)
  config = run.config
  if options.batches is not None:
    config = config.copy_and_resolve_references()
    config.eval.batches = options.batches
  eval_step = evaluate.make_eval_step(config, run.model, run.mesh)
  valid = dataset.manifest['splits']['valid']
  return {
    'workdir': str(options.workdir),
    'step': run.step,
    'dataset': str(dataset.path),
    **evaluate.evaluate(eval_step, run.params, config, dataset, run.mesh),
    'baseline/gzip_bits_per_byte': valid['gzip_bits_per_byte'],
    'baseline/unigram_bits_per_byte': valid['unigram_bits_per_byte'],
  }


def _refuse_other_tokenizer(
  own: dataset_lib.Dataset, other: dataset_lib.Dataset
) -> None:
  if own.manifest['tokenizer_sha256'] != other.manifest['tokenizer_sha256']:
    raise ValueError(
      f'{other.path} has another tokenizer than the run, so its token ids mean'
      ' something else. Prepare the text with the tokenizer of the run:'
      f' --tokenizer {own.path / dataset_lib.TOKENIZER}'
      ' (scripts/prepare_data.py --help).'
    )


def _show(found: dict[str, Any]) -> None:
  table = rich_table.Table(
    title=f'{found["workdir"]}, step {found["step"]}, on {found["dataset"]}'
  )
  for name in ('', 'model', 'unigram', 'gzip -9'):
    table.add_column(name, justify='right' if name else 'left')
  table.add_row('loss (nats per token)', f'{found["eval/loss"]:.4f}', '', '')
  table.add_row('perplexity', f'{found["eval/perplexity"]:.2f}', '', '')
  table.add_row(
    'bits per byte',
    f'{found["eval/bits_per_byte"]:.4f}',
    f'{found["baseline/unigram_bits_per_byte"]:.4f}',
    f'{found["baseline/gzip_bits_per_byte"]:.4f}',
  )
  rich_console.Console().print(table)


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add(
    '--workdir',
    type=pathlib.Path,
    required=True,
    metavar='DIR',
    help='folder of the run (qat.main --workdir)',
  )
  add(
    '--dataset',
    metavar='DIR',
    help='a data set (scripts/prepare_data.py) with the same tokenizer, instead'
    " of the run's own",
  )
  add(
    '--batches',
    type=int,
    metavar='N',
    help='at most N batches of config.eval.batch_size sequences, 0 for all'
    " (default: the run's config.eval.batches); the baselines are always of the"
    ' whole split',
  )
  add('--json', action='store_true', help='print JSON instead of a table')
  return parser


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
