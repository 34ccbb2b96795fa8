r"""Continues a prompt with a model; text appears as it grows.

  python scripts/generate.py --workdir runs/pquant-tiny --prompt 'It is a truth'
  python scripts/generate.py --workdir runs/pquant-tiny --prompt 'She was' \
      --temperature 0
  python scripts/generate.py --workdir runs/pquant-tiny --prompt '' --num 3
  head -c 500 letter.txt | \
      python scripts/generate.py --workdir runs/pquant-tiny --prompt -
  python scripts/generate.py --workdir runs/pquant-tiny --prompt 'She was' \
      --packed --num 4 --batch 4

The model is a run's newest checkpoint, or a model folder. What is not given is
as in its config.sample. The same seed gives the same text. An empty prompt
begins a new document. With --packed quantized matrices are packed first, and
multiplied as packed bytes; the text is the same, but for rounding
(docs/kernels.md).
"""

from qat import launch

if __name__ == '__main__':
  launch.tune_malloc()

import argparse
import collections
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Sequence
import os
import pathlib
import sys

import tokenizers

from qat import manifest
from qat import windows
from qat.data import progress
from qat.infer import generate
from qat.infer import load
from qat.infer import pack

# What a decoder makes of bytes that are no UTF-8, or not yet.
_UNKNOWN = '\N{REPLACEMENT CHARACTER}'


def main(arguments: Sequence[str]) -> int:
  """Runs the command line; returns the exit status."""
  options = _parser().parse_args(arguments)
  try:
    _generate(options)
  except BrokenPipeError:  # Whoever reads has enough; nothing is left to say.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
  except (ValueError, OSError, manifest.CorruptError) as error:
    progress.note(f'Error: {error}')
    return 2
  except KeyboardInterrupt:
    print()
    return 130
  return 0


def _generate(options: argparse.Namespace) -> None:
  for name in ('num', 'batch'):
    if getattr(options, name) < 1:
      raise ValueError(f'--{name} {getattr(options, name)}: at least 1.')
  prompt = sys.stdin.read() if options.prompt == '-' else options.prompt
  model = load.load_model(options.workdir, None, by_layer=not options.packed)
  if options.packed:
    model = pack.pack(model)
  defaults = model.config.sample
  prompts = defaults.prompts if prompt is None else (prompt,)
  chosen = {
    name: defaults[name] if (given := getattr(options, name)) is None else given
    for name in ('tokens', 'temperature', 'top_k', 'top_p')
  }
  begin = windows.start(model)
  texts = []
  for prompt in prompts:
    ids = begin + _encode(model.tokenizer, prompt)
    # What a tokenizer puts before a text may be nothing.
    ids = ids or [model.begin]
    texts += [(ids, options.seed + i) for i in range(options.num)]
  for number in range(0, len(texts), options.batch):
    several, seeds = zip(*texts[number : number + options.batch], strict=True)
    rows = generate.batch(
      *(model.model, model.params, several),
      **chosen,
      seeds=seeds,
      stop=model.end,
      cache=options.cache,
    )
    texts_of = zip(several, _columns(rows, len(several)), strict=True)
    for i, (ids, new) in enumerate(texts_of):
      if number + i:
        print('-' * 20)
      for piece in pieces(model.tokenizer, ids, new):
        print(piece, end='', flush=True)
      print()


def _columns(
  rows: Iterator[list[int | None]], width: int
) -> Iterator[Iterator[int]]:
  """The texts of a batch, one after the other; the first as it grows."""
  kept = [collections.deque() for _ in range(width)]

  def column(i: int) -> Iterator[int]:
    while True:
      while not kept[i]:
        row = next(rows, None)
        if row is None:
          return
        for mine, token in zip(kept, row, strict=True):
          mine.append(token)
      if (token := kept[i].popleft()) is None:
        return  # This text has ended; the others go on.
      yield token

  return map(column, range(width))


def _encode(tokenizer: tokenizers.Tokenizer, text: str) -> list[int]:
  try:
    text.encode()
  except UnicodeEncodeError:
    raise ValueError(f'The prompt {text!r} is not UTF-8.') from None
  return tokenizer.encode(text, add_special_tokens=False).ids


def pieces(
  tokenizer: tokenizers.Tokenizer, prompt: Sequence[int], new: Iterable[int]
) -> Iterator[str]:
  """Decodes ids as they come; together the pieces are the decoded text.

  A character of several tokens is held back until it is whole. Only the ids
  since the piece before the last are decoded, so the cost does not grow with
  the text; decoders that treat the first token in another way have that one
  before it.

  Args:
    tokenizer: the tokenizer.
    prompt: ids whose text comes first, as one piece.
    new: the ids that follow.

  Yields:
    Text that is not empty.
  """
  ids = list(prompt)
  text = tokenizer.decode(ids)
  if text:
    yield text
  # The text of ids[:done] is out, the last piece of it is of ids[context:done].
  context, done = 0, len(ids)
  before = text
  for token in new:
    ids.append(token)
    text = tokenizer.decode(ids[context:])
    if len(text) > len(before) and not text.endswith(_UNKNOWN):
      yield text[len(before) :]
      context, done = done, len(ids)
      before = tokenizer.decode(ids[context:])
  if rest := tokenizer.decode(ids[context:])[len(before) :]:
    yield rest


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
    help='folder of the run (qat.main --workdir), or a model folder',
  )
  add(
    '--prompt',
    metavar='TEXT',
    help="what to continue; '-' reads it from the standard input (default: each"
    ' of config.sample.prompts)',
  )
  add('--tokens', type=int, metavar='N', help='at most N new tokens')
  add(
    '--temperature',
    type=float,
    metavar='T',
    help='below 1 for likelier text, above for more varied; 0: always the'
    ' likeliest token',
  )
  add(
    '--top_k',
    type=int,
    metavar='K',
    help='sample among the K likeliest tokens; 0: all',
  )
  add(
    '--top_p',
    type=float,
    metavar='P',
    help='sample among the likeliest tokens that together have probability P;'
    ' 1: all',
  )
  add(
    '--seed',
    type=int,
    default=0,
    metavar='N',
    help='of the first text; the next has N + 1 (default: %(default)s)',
  )
  add(
    '--num',
    type=int,
    default=1,
    metavar='N',
    help='texts for each prompt (default: %(default)s)',
  )
  add(
    '--batch',
    type=int,
    default=1,
    metavar='N',
    help='texts that are computed at once; the first appears as it grows'
    ' (default: %(default)s)',
  )
  add(
    '--packed',
    action='store_true',
    help='pack the quantized matrices, unless they are, and multiply them so',
  )
  add(
    '--cache',
    choices=generate.CACHES,
    help='of keys and values; int8 has a scale for each token and head'
    ' (default: model.dot_dtype)',
  )
  return parser


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
