r"""Continues a prompt with a run's newest checkpoint; text appears as it grows.

  python scripts/generate.py --workdir runs/pquant-tiny --prompt 'It is a truth'
  python scripts/generate.py --workdir runs/pquant-tiny --prompt 'She was' \
      --temperature 0
  python scripts/generate.py --workdir runs/pquant-tiny --prompt '' --num 3
  head -c 500 letter.txt | \
      python scripts/generate.py --workdir runs/pquant-tiny --prompt -

What is not given is as in the run's config.sample. The same seed gives the same
text. An empty prompt begins a new document.
"""

from qat import launch

if __name__ == '__main__':
  launch.tune_malloc()

import argparse
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Sequence
import os
import pathlib
import sys

import tokenizers

from qat import manifest
from qat.data import progress
from qat.infer import generate
from qat.infer import load

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
  if options.num < 1:
    raise ValueError(f'--num {options.num}: at least 1.')
  prompt = sys.stdin.read() if options.prompt == '-' else options.prompt
  run = load.load_run(options.workdir)
  defaults = run.config.sample
  prompts = defaults.prompts if prompt is None else (prompt,)
  chosen = {
    name: defaults[name] if (given := getattr(options, name)) is None else given
    for name in ('tokens', 'temperature', 'top_k', 'top_p')
  }
  texts = [(p, options.seed + i) for p in prompts for i in range(options.num)]
  for number, (prompt, seed) in enumerate(texts):
    if number:
      print('-' * 20)
    # As in training: a document follows an end of text.
    eot = run.dataset.eot_id
    ids = [eot, *_encode(run.dataset.tokenizer, prompt)]
    new = generate.generate(
      run.model, run.params, ids, **chosen, seed=seed, stop=eot
    )
    for piece in pieces(run.dataset.tokenizer, ids, new):
      print(piece, end='', flush=True)
    print()


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
    help='folder of the run (qat.main --workdir)',
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
  return parser


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
