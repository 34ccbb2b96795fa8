"""Text to a data set of token shards.

`scripts/prepare_data.py` is its command line, `qat.data.dataset` describes the
result. Reads the sources twice when a tokenizer is to be trained.
"""

from collections.abc import Iterator
from collections.abc import Sequence
import dataclasses
import json
import os
import pathlib
import re
import shutil
from typing import Any

import numpy as np
import tokenizers

from qat.data import baselines
from qat.data import dataset as dataset_lib
from qat.data import files
from qat.data import progress
from qat.data import shards
from qat.data import sources as sources_lib
from qat.data import tokenizer as tokenizer_lib

# In the folder of a data set, until that is finished.
_WORK = '.partial'
_EMBEDDED = pathlib.Path(__file__).parent / 'corpus' / 'austen.txt.xz'
# A document starts at a chapter, with the headings of the novel and the volume
# that it opens; or at a novel's title, where a preface follows.
_TITLE = r'[^\n]+\s+by\s+jane austen\s+(?:\(\d{4}\)\s+)?'
_CHAPTER = (
  rf'(?i)^(?:{_TITLE})?(?:volume [ivx]+\s+)?chapter (?:\d+|[ivxl]+)$'
  rf'|^{_TITLE}'
)

_Sources = dict[str, list[sources_lib.Source]]


@dataclasses.dataclass(frozen=True)
class Options:
  """What a data set depends on besides its sources.

  Attributes:
    vocab_size: tokens of the byte-level BPE to train; None with `tokenizer`.
    tokenizer: path of a tokenizer.json to use; None to train one.
    tokenizer_bytes: the BPE is trained on at most so many bytes of text, the
      first of the training split.
    end_of_text: the token after each document.
    field: the name of the text's field.
    split: regular expression that starts a document in a text file, or None.
    valid_fraction: share of the documents, by a hash of their text, that are
      for validation; 0 where their sources are given.
    seed: of the order of the documents.
    shard_tokens: tokens of a shard, about; so many are in memory.
  """

  vocab_size: int | None
  tokenizer: str | None
  tokenizer_bytes: int
  end_of_text: str
  field: str
  split: str | None
  valid_fraction: float
  seed: int
  shard_tokens: int


def prepare(
  sources: Sequence[str],
  out: str | os.PathLike[str],
  options: Options,
  *,
  valid: Sequence[str] = (),
  wait: bool = False,
) -> pathlib.Path:
  """Writes a data set, or goes on with one that was stopped.

  Args:
    sources: what `sources.resolve` takes.
    out: the folder; it is made. A finished data set of the same sources and
      options is left as it is.
    options: see there.
    valid: sources of the validation split; empty: a share of `sources`.
    wait: wait for another process that is preparing this folder.

  Returns:
    `out`.

  Raises:
    ValueError: options, sources or text that cannot be used, or a folder with
      something else in it.
    FileNotFoundError: a source that is not there.
    BlockingIOError: if another process prepares this folder.
  """
  _check_options(options, sources, valid)
  out = pathlib.Path(out)
  sources_lib.refuse_inside(out, (*sources, *valid))
  resolved = {
    'train': sources_lib.resolve(sources),
    'valid': sources_lib.resolve(valid),
  }
  plan = _plan(resolved, options)
  manifest = out / dataset_lib.MANIFEST
  if not manifest.exists():
    out.mkdir(parents=True, exist_ok=True)
    with files.lock(out, wait):
      # Another process may have written it since.
      if not manifest.exists():
        _begin(out, out / _WORK, plan)
        _write(out, out / _WORK, resolved, options, plan)
  if dataset_lib.open_dataset(out).manifest.get('plan') != plan:
    raise ValueError(
      f'{str(out)!r} holds a data set of other sources or options; choose'
      ' another folder, or delete it.'
    )
  # Only now: without a manifest, this is what a repetition goes on from.
  shutil.rmtree(out / _WORK, ignore_errors=True)
  return out


def ensure_embedded(
  cache_dir: str | os.PathLike[str], vocab_size: int
) -> pathlib.Path:
  """The embedded corpus, prepared on first use; processes may race.

  Args:
    cache_dir: where the folder `austen-<vocab_size>` is, or is made.
    vocab_size: tokens of its BPE.

  Returns:
    The folder of the data set.

  Raises:
    ValueError: if the vocabulary is too small or too large for the corpus, or
      the folder was made by a version with another corpus or options.
  """
  options = Options(
    vocab_size=vocab_size,
    tokenizer=None,
    tokenizer_bytes=1 << 30,
    end_of_text=tokenizer_lib.END_OF_TEXT,
    field='text',
    split=_CHAPTER,
    valid_fraction=0.06,
    seed=0,
    shard_tokens=1 << 20,
  )
  out = pathlib.Path(cache_dir) / f'austen-{vocab_size}'
  return prepare([str(_EMBEDDED)], out, options, wait=True)


def _check_options(
  options: Options, sources: Sequence[str], valid: Sequence[str]
) -> None:
  if not sources:
    raise ValueError('No source is given.')
  if (options.vocab_size is None) == (options.tokenizer is None):
    raise ValueError(
      'Give either the vocabulary size of a tokenizer to train'
      ' (--vocab-size) or a tokenizer.json (--tokenizer).'
    )
  if valid and options.valid_fraction:
    raise ValueError(
      'Validation sources are given: the fraction must be 0'
      f' (--valid-fraction), not {options.valid_fraction}.'
    )
  if not valid and not 0 < options.valid_fraction < 1:
    raise ValueError(
      f'The validation fraction {options.valid_fraction} is not between 0'
      ' and 1 (--valid-fraction), and no sources are given (--valid).'
    )
  try:
    re.compile(options.split or '')
  except re.error as error:
    raise ValueError(
      f'{options.split!r} is not a regular expression (--split): {error}'
    ) from error
  for name in ('tokenizer_bytes', 'shard_tokens'):
    if getattr(options, name) < 1:
      raise ValueError(f'{name} {getattr(options, name)} is not positive.')


def _plan(resolved: _Sources, options: Options) -> dict[str, Any]:
  """All that the result depends on, as JSON; no paths of this machine."""
  plan = dataclasses.asdict(options)
  if options.tokenizer is not None:
    tokenizer_lib.load(options.tokenizer)
    plan['tokenizer'] = dataset_lib.file_digest(pathlib.Path(options.tokenizer))
  plan['sources'] = {
    split: [{'name': s.name, 'digest': s.digest, 'size': s.size} for s in found]
    for split, found in resolved.items()
  }
  return plan


def _begin(out: pathlib.Path, work: pathlib.Path, plan: dict[str, Any]) -> None:
  """Leaves in `work` only what belongs to `plan` and is complete."""
  file = work / 'plan.json'
  if file.exists() and json.loads(file.read_bytes()) == plan:
    files.remove_unfinished(work)
    return
  if shards.runs(work):
    raise ValueError(
      f'{str(out)!r} was begun with other sources or options; repeat that'
      ' command, choose another folder, or delete it.'
    )
  others = [p.name for p in out.iterdir() if p.name not in ('.lock', work.name)]
  if others:
    raise ValueError(
      f'{str(out)!r} is not empty and not a data set: it holds {others[:3]}.'
    )
  shutil.rmtree(work, ignore_errors=True)
  work.mkdir()
  files.write(file, json.dumps(plan).encode())


def _write(
  out: pathlib.Path,
  work: pathlib.Path,
  resolved: _Sources,
  options: Options,
  plan: dict[str, Any],
) -> None:
  total = sum(s.size for found in resolved.values() for s in found)
  tokenizer = _tokenizer(work / dataset_lib.TOKENIZER, resolved, options, total)
  token_bytes_V = tokenizer_lib.token_bytes(tokenizer)
  vocab_size = len(token_bytes_V)
  codec = shards.Codec(
    tokenizer,
    tokenizer_lib.end_of_text_id(tokenizer, options.end_of_text),
    vocab_size,
    np.dtype('<u2' if vocab_size <= 1 << 16 else '<u4'),
  )
  with progress.bar('Tokenizing', total) as report:
    items = _items(resolved, options)
    shards.write_runs(work, items, codec, options.seed, report)
  runs = shards.runs(work)
  splits = {s: shards.statistics(runs, s) for s in dataset_lib.SPLITS}
  try:
    _check_splits(splits, options)
  except ValueError:
    # Nothing to go on from: with these options it cannot be finished.
    shutil.rmtree(work)
    raise
  counts = {s: shards.counts(runs, s) for s in dataset_lib.SPLITS}
  for split, found in splits.items():
    found['token_bytes'] = int(counts[split] @ token_bytes_V)
    if found['token_bytes'] != found['bytes']:
      progress.note(
        f'Warning: the tokens of {split} stand for {found["token_bytes"]}'
        f' bytes and its text has {found["bytes"]}: this tokenizer does not'
        ' keep text as it is, and bits per byte are only about right.'
      )
    n_shards = -(-found['tokens'] // options.shard_tokens)
    with progress.bar(f'Writing {split} shards', n_shards) as report:
      found['shards'] = shards.write_shards(
        out, work, split, n_shards, codec, report
      )
  size = splits['valid']['bytes']
  splits['valid']['gzip_bits_per_byte'] = (
    baselines.gzip_bits(shards.valid_text(runs)) / size
  )
  splits['valid']['unigram_bits_per_byte'] = (
    baselines.unigram_bits(counts['train'], counts['valid']) / size
  )
  tokenizer_json = (work / dataset_lib.TOKENIZER).read_bytes()
  files.write(out / dataset_lib.TOKENIZER, tokenizer_json)
  manifest = {
    'format': dataset_lib.FORMAT,
    'plan': plan,
    'tokenizer_sha256': dataset_lib.file_digest(out / dataset_lib.TOKENIZER),
    'vocab_size': vocab_size,
    'eot_id': codec.eot_id,
    'dtype': codec.dtype.name,
    'record_tokens': dataset_lib.RECORD_TOKENS,
    'splits': splits,
  }
  files.write(
    out / dataset_lib.MANIFEST, json.dumps(manifest, indent=1).encode()
  )


def _tokenizer(
  file: pathlib.Path, resolved: _Sources, options: Options, total: int
) -> tokenizers.Tokenizer:
  """Trains or copies the tokenizer to `file`, unless it is there."""
  if not file.exists():
    if options.tokenizer is not None:
      content = pathlib.Path(options.tokenizer).read_bytes()
    else:
      with progress.bar('Training the tokenizer', total) as report:
        texts = _tokenizer_texts(resolved, options, report)
        tokenizer = tokenizer_lib.train(
          texts, options.vocab_size, options.end_of_text
        )
      content = tokenizer.to_str().encode()
    files.write(file, content)
  # Read back in any case: what is used is what is written.
  return tokenizer_lib.load(file)


def _tokenizer_texts(
  resolved: _Sources, options: Options, report: shards.Report
) -> Iterator[str]:
  """The first `options.tokenizer_bytes` of the training text, about."""
  done = 0
  for item in _items(resolved, options):
    if done >= options.tokenizer_bytes:
      break
    if item.split == 'train':
      done += item.size
      report(item.read, f'{done / 1e6:,.1f} MB of text')
      yield item.text
  if not done:
    raise ValueError('The sources have no text to train on.')


def _items(resolved: _Sources, options: Options) -> Iterator[shards.Item]:
  """All documents in order, the same at every call."""
  before = 0
  for split, found in resolved.items():
    for source in found:
      for text, read in sources_lib.read(
        source, field=options.field, split=options.split
      ):
        data = text.encode()
        # By the text, so that neither order nor neighbours move a document
        # over and its copies go with it. A fraction of 0 moves none.
        moved = shards.hash64(data) < options.valid_fraction * 2.0**64
        yield shards.Item(
          'valid' if moved else split, text, len(data), before + read
        )
      before += source.size


def _check_splits(splits: dict[str, dict[str, int]], options: Options) -> None:
  for split, found in splits.items():
    if not found['documents']:
      way_out = 'The sources have no text.'
      if split == 'valid' and options.valid_fraction:
        way_out = (
          f'{splits["train"]["documents"]} documents are too few for a'
          f' fraction of {options.valid_fraction} (--valid-fraction). A text'
          ' file is one document unless it is split (--split).'
        )
      raise ValueError(f'The {split} split is empty. {way_out}')
