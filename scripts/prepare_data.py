r"""Prepares a data set for training: text to tokens to shards.

  python scripts/prepare_data.py books/ --out data/books --vocab-size 8192
  python scripts/prepare_data.py train.jsonl.zst --valid valid.jsonl.zst \
      --out data/mix --vocab-size 32000
  python scripts/prepare_data.py allenai/c4:en --out data/c4 \
      --tokenizer llama/tokenizer.json --end-of-text '</s>'
  python scripts/prepare_data.py --verify data/books

A command that was stopped goes on when it is repeated. docs/data.md says more.
"""

import argparse
from collections.abc import Sequence
import sys

from qat.data import dataset
from qat.data import prepare
from qat.data import progress
from qat.data import tokenizer


def main(arguments: Sequence[str]) -> int:
  """Runs the command line; returns the exit status."""
  parser = _parser()
  options = parser.parse_args(arguments)
  try:
    if options.verify is not None:
      dataset.verify(options.verify)
      print(f'{options.verify}: all shards are as they were written.')
      return 0
    if not options.sources or options.out is None:
      parser.error('sources and --out are needed (or --verify DIR).')
    fraction = options.valid_fraction
    if fraction is None:
      fraction = 0.0 if options.valid else 0.005
    out = prepare.prepare(
      options.sources,
      options.out,
      prepare.Options(
        vocab_size=options.vocab_size,
        tokenizer=options.tokenizer,
        tokenizer_bytes=options.tokenizer_mb * 1_000_000,
        end_of_text=options.end_of_text,
        field=options.field,
        split=options.split,
        valid_fraction=fraction,
        seed=options.seed,
        shard_tokens=options.shard_tokens,
      ),
      valid=options.valid,
    )
  except (ValueError, OSError, ImportError) as error:
    progress.note(f'Error: {error}')
    return 2 if options.verify is None else 1
  except KeyboardInterrupt:
    progress.note('Stopped; repeat the command to go on.')
    return 130
  _show(dataset.open_dataset(out))
  return 0


def _show(prepared: dataset.Dataset) -> None:
  for split, found in prepared.manifest['splits'].items():
    print(
      f'{split}: {found["documents"]:,} documents,'
      f' {found["tokens"]:,} tokens, {found["bytes"]:,} bytes,'
      f' {len(found["shards"])} shards'
    )
  valid = prepared.manifest['splits']['valid']
  print(
    'bits per byte of the validation text:'
    f' {valid["gzip_bits_per_byte"]:.3f} with gzip -9,'
    f' {valid["unigram_bits_per_byte"]:.3f} with token frequencies'
  )
  print(
    f'{prepared.path}: vocabulary of {prepared.vocab_size:,};'
    f' train with --config.data.dataset={prepared.path}'
    f' --config.model.vocab_size={prepared.vocab_size}'
  )


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add(
    'sources',
    nargs='*',
    metavar='SOURCE',
    help='files (.txt, .jsonl, .json, .parquet; the first three also .gz, .xz'
    ' or .zst), folders of them, or Hugging Face data sets'
    ' (org/name:config, org/name:config:split; the split is train unless'
    ' given), which are streamed',
  )
  add('--out', metavar='DIR', help='the folder to make')
  add(
    '--vocab-size',
    type=int,
    metavar='N',
    help='train a byte-level BPE of N tokens (at least 257) on the text',
  )
  add(
    '--tokenizer',
    metavar='FILE',
    help='or use this Hugging Face tokenizer.json (byte-level, or with byte'
    ' fallback)',
  )
  add(
    '--end-of-text',
    default=tokenizer.END_OF_TEXT,
    metavar='TOKEN',
    help='the token that ends a document (default: %(default)s)',
  )
  add(
    '--tokenizer-mb',
    type=int,
    default=500,
    metavar='N',
    help='train the BPE on the first N MB of the training text (default:'
    ' %(default)s)',
  )
  add(
    '--field',
    default='text',
    metavar='NAME',
    help='the field of a JSON object or a Parquet row that holds the document'
    ' (default: %(default)s)',
  )
  add(
    '--split',
    metavar='REGEX',
    help='start a document of a .txt file wherever this matches (^ and $ match'
    " at lines; '^CHAPTER '); without it a file is one document",
  )
  add(
    '--valid',
    nargs='+',
    default=(),
    metavar='SOURCE',
    help='the sources of the validation split',
  )
  add(
    '--valid-fraction',
    type=float,
    metavar='X',
    help='without --valid: the share of the documents that become the'
    ' validation split, chosen by a hash of their text (default: 0.005)',
  )
  add(
    '--seed',
    type=int,
    default=0,
    metavar='N',
    help='of the order of the documents (default: %(default)s)',
  )
  add(
    '--shard-tokens',
    type=int,
    default=1 << 26,
    metavar='N',
    help='tokens of a shard, about; one shard at a time is in memory, at'
    ' 2 or 4 bytes a token (default: %(default)s)',
  )
  add(
    '--verify',
    metavar='DIR',
    help='only compare every shard of DIR with its checksum',
  )
  return parser


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
