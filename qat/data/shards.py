"""The external sort of documents: runs of sorted tokens, merged into shards.

Memory is bounded whatever the size of the corpus. Each document has a random
64-bit key from the seed and its number:

1. Documents are tokenized in order. About `RUN_BYTES` of text at a time, they
   are sorted by key and written as a run: a folder.
2. Shard s of n holds the documents with keys in [s, s + 1) / n * 2**64, sorted;
   in each run they lie together. One shard at a time is in memory.

A run or a shard that has its name is complete, and nothing depends on where
runs end: stopped and repeated, the result has the same bytes.
"""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Sequence
import hashlib
import itertools
import json
import os
import pathlib
from typing import Any
from typing import NamedTuple

from array_record.python import array_record_module
import numpy as np
import tokenizers

from qat.data import dataset as dataset_lib
from qat.data import files
from qat.data import tokenizer as tokenizer_lib

RUN_BYTES = 1 << 27
# Text that is tokenized at once: bounds the memory of the tokenizer's objects.
_BATCH_BYTES = 1 << 20
_RUNS = 'run-' + '[0-9]' * 6

Report = Callable[[int, str], None]


class Item(NamedTuple):
  """A document on its way.

  Attributes:
    split: 'train' or 'valid'.
    text: the document.
    size: its bytes in UTF-8.
    read: bytes of the sources read up to here.
  """

  split: str
  text: str
  size: int
  read: int


class Codec(NamedTuple):
  """How documents become tokens."""

  tokenizer: tokenizers.Tokenizer
  eot_id: int
  vocab_size: int
  dtype: np.dtype


def runs(work: pathlib.Path) -> list[pathlib.Path]:
  """The complete runs, in order."""
  return sorted(work.glob(_RUNS))


def write_runs(
  work: pathlib.Path,
  items: Iterable[Item],
  codec: Codec,
  seed: int,
  report: Report,
) -> None:
  """Step 1; goes on after the runs that are there.

  Args:
    work: the folder of the runs.
    items: all documents from the first; the same at every call.
    codec: how documents become tokens.
    seed: of the keys.
    report: is called with (bytes of the sources read, words).
  """
  found = runs(work)
  done = _meta(found[-1])['stop'] if found else 0
  rest = itertools.islice(enumerate(items), done, None)
  bytes_done = sum(_meta(run)['read_bytes'] for run in found)
  for number, numbered in enumerate(
    _groups(rest, RUN_BYTES, lambda pair: pair[1].size), start=len(found)
  ):
    tokens = []
    for batch in _groups(numbered, _BATCH_BYTES, lambda pair: pair[1].size):
      texts = [item.text for _, item in batch]
      for ids in tokenizer_lib.encode(codec.tokenizer, texts):
        tokens.append(np.append(ids, codec.eot_id).astype(codec.dtype))
      bytes_done += sum(item.size for _, item in batch)
      report(
        batch[-1][1].read,
        f'{batch[-1][0] + 1:,} documents, {bytes_done / 1e6:,.1f} MB of text',
      )
    _write_run(work / f'run-{number:06d}', numbered, tokens, codec, seed)


def _groups(
  items: Iterable[Any], limit: int, size: Callable[[Any], int]
) -> Iterator[list[Any]]:
  """Lists of consecutive items of which all but the last stay below `limit`."""
  group, total = [], 0
  for item in items:
    group.append(item)
    total += size(item)
    if total >= limit:
      yield group
      group, total = [], 0
  if group:
    yield group


def _write_run(
  path: pathlib.Path,
  numbered: Sequence[tuple[int, Item]],
  tokens: Sequence[np.ndarray],
  codec: Codec,
  seed: int,
) -> None:
  temporary = files.unfinished(path)
  temporary.mkdir()
  meta = {
    'stop': numbered[-1][0] + 1,
    'read_bytes': sum(item.size for _, item in numbered),
  }
  for split in dataset_lib.SPLITS:
    # An empty document would only be a second end of text.
    chosen = [
      (_key(seed, index), ids, item)
      for (index, item), ids in zip(numbered, tokens, strict=True)
      if item.split == split and item.text
    ]
    chosen.sort(key=lambda triple: triple[0])
    lengths = np.array([len(ids) for _, ids, _ in chosen], np.int64)
    stream = np.concatenate(
      [np.zeros(0, codec.dtype)] + [ids for _, ids, _ in chosen]
    )
    arrays = {
      'keys': np.array([key for key, _, _ in chosen], np.uint64),
      'starts': np.cumsum(np.append(0, lengths)),
      'tokens': stream,
      'counts': np.bincount(stream, minlength=codec.vocab_size),
    }
    for name, array in arrays.items():
      with (temporary / f'{split}-{name}.npy').open('wb') as file:
        np.save(file, array)
        files.sync(file)
    meta[split] = {
      'documents': len(chosen),
      'empty_documents': sum(
        item.split == split and not item.text for _, item in numbered
      ),
      'tokens': len(stream),
      'bytes': sum(item.size for _, _, item in chosen),
    }
  text = ''.join(item.text for _, item in numbered if item.split == 'valid')
  files.write(temporary / 'valid.txt', text.encode())
  files.write(temporary / 'meta.json', json.dumps(meta).encode())
  files.rename(temporary, path)


def _key(seed: int, index: int) -> int:
  return hash64(f'{seed}/{index}'.encode())


def hash64(data: bytes) -> int:
  """A hash in [0, 2**64), the same everywhere and for ever."""
  return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), 'big')


def statistics(found: Sequence[pathlib.Path], split: str) -> dict[str, int]:
  """Sums over runs: documents, empty_documents, tokens, bytes.

  Raises:
    ValueError: there are no runs.
  """
  if not found:
    raise ValueError('The sources have no text.')
  metas = [_meta(run)[split] for run in found]
  return {key: sum(meta[key] for meta in metas) for key in metas[0]}


def counts(found: Sequence[pathlib.Path], split: str) -> np.ndarray:
  """How often each token occurs in a split: int64 [V]."""
  return sum(np.load(run / f'{split}-counts.npy') for run in found)


def valid_text(found: Sequence[pathlib.Path]) -> Iterator[bytes]:
  """The validation text in the order it was read, a run at a time."""
  return ((run / 'valid.txt').read_bytes() for run in found)


def write_shards(
  out: pathlib.Path,
  work: pathlib.Path,
  split: str,
  n_shards: int,
  codec: Codec,
  report: Report,
) -> list[dict[str, Any]]:
  """Step 2, for one split; keeps the shards that are there.

  Args:
    out: the folder of the shards.
    work: the folder of the runs; notes on finished shards go there too.
    split: 'train' or 'valid'.
    n_shards: in how many shards, of about the same size.
    codec: how documents became tokens.
    report: is called with (shards done, words).

  Returns:
    name, records, tokens, size (bytes) and sha256 of each shard that holds
    anything, in the order of the stream.
  """
  found = runs(work)
  listed = []
  for index in range(n_shards):
    name = f'{split}-{index:05d}-of-{n_shards:05d}.array_record'
    note = work / f'{name}.json'
    if not note.exists():
      tokens = _gather(found, split, index, n_shards)
      if index == 0:
        # Nothing precedes the first document; every token is to be predicted.
        tokens = np.append(codec.eot_id, tokens).astype(codec.dtype)
      files.write(
        note, json.dumps(_write_shard(out, work, name, tokens)).encode()
      )
    shard = json.loads(note.read_bytes())
    if shard is not None:
      listed.append(shard)
    report(index + 1, f'{index + 1} of {n_shards}')
  return listed


def _gather(
  found: Sequence[pathlib.Path], split: str, index: int, n_shards: int
) -> np.ndarray:
  """The tokens of a shard's documents, sorted by key."""
  keys, documents = [], []
  low, high = ((i << 64) // n_shards for i in (index, index + 1))
  for run in found:
    run_keys = np.load(run / f'{split}-keys.npy', mmap_mode='r')
    starts = np.load(run / f'{split}-starts.npy', mmap_mode='r')
    first = np.searchsorted(run_keys, np.uint64(low))
    # 2**64 itself is not a uint64, and every key is below it.
    last = len(run_keys)
    if index + 1 < n_shards:
      last = np.searchsorted(run_keys, np.uint64(high))
    if first == last:
      continue
    bounds = np.asarray(starts[first : last + 1])
    tokens = np.load(run / f'{split}-tokens.npy', mmap_mode='r')
    mine = np.asarray(tokens[bounds[0] : bounds[-1]])
    keys.append(np.asarray(run_keys[first:last]))
    documents += np.split(mine, bounds[1:-1] - bounds[0])
  if not documents:
    return np.zeros(0, np.int64)
  order = np.argsort(np.concatenate(keys), kind='stable')
  return np.concatenate([documents[i] for i in order])


def _write_shard(
  out: pathlib.Path, work: pathlib.Path, name: str, tokens: np.ndarray
) -> dict[str, Any] | None:
  """Writes one shard and describes it; None if there is nothing to write."""
  if not len(tokens):
    return None
  temporary = files.unfinished(work / name)
  records = -(-len(tokens) // dataset_lib.RECORD_TOKENS)
  try:
    writer = array_record_module.ArrayRecordWriter(
      str(temporary), 'group_size:1'
    )
    for start in range(0, len(tokens), dataset_lib.RECORD_TOKENS):
      writer.write(tokens[start : start + dataset_lib.RECORD_TOKENS].tobytes())
    writer.close()
    with temporary.open('rb') as file:
      os.fsync(file.fileno())
    reader = array_record_module.ArrayRecordReader(str(temporary))
    # The library can report a failed write late or not at all.
    if not reader.ok() or reader.num_records() != records:
      raise RuntimeError('records are missing')
    reader.close()
  except RuntimeError as error:
    raise OSError(
      f'{temporary}: could not be written ({error}); is the disk full?'
    ) from error
  description = {
    'name': name,
    'records': records,
    'tokens': len(tokens),
    'size': temporary.stat().st_size,
    'sha256': dataset_lib.file_digest(temporary),
  }
  files.rename(temporary, out / name)
  return description


def _meta(run: pathlib.Path) -> dict[str, Any]:
  return json.loads((run / 'meta.json').read_bytes())
