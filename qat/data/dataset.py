"""A prepared data set: what its folder holds, checked, and its token streams.

A folder that `qat.data.prepare` has finished holds

  manifest.json               what is in the others; written last
  tokenizer.json              a Hugging Face tokenizer
  train-00000-of-00004.array_record ...
  valid-00000-of-00001.array_record ...

A split is one stream of tokens: the end of text, then each document followed by
the end of text. The shards hold it in order, cut into records of
`record_tokens` little-endian unsigned integers; the last of a shard may be
shorter. A manifest is input like any other: nothing in it is believed before it
is checked, and it cannot name a file outside its folder.
"""

import dataclasses
import hashlib
import json
import pathlib
import re
import threading
from typing import Any

from array_record.python import array_record_module
import numpy as np
import tokenizers

from qat.data import tokenizer as tokenizer_lib

FORMAT = 1
# A window of a few hundred tokens reads one or two records of 4 KB.
RECORD_TOKENS = 2048
MANIFEST = 'manifest.json'
TOKENIZER = 'tokenizer.json'
SPLITS = ('train', 'valid')

_NAME = re.compile(r'[A-Za-z0-9][A-Za-z0-9._-]{0,200}')
_SHA256 = re.compile(r'[0-9a-f]{64}')
_MAX_MANIFEST_BYTES = 1 << 26
_MAX_RECORD_TOKENS = 1 << 24
# A record is read alone: threads that read ahead would read what is not wanted.
_READER_OPTIONS = 'readahead_buffer_size:0,max_parallelism:0'


@dataclasses.dataclass(frozen=True)
class Dataset:
  """An open data set.

  Attributes:
    path: its folder.
    manifest: the content of manifest.json; docs/data.md describes it.
    tokenizer: `.encode(text, add_special_tokens=False).ids`, `.decode(ids)`.
    token_bytes: int32 [V], the UTF-8 bytes a token stands for; 0 for the end
      of text.
    digest: sha256 over what a model sees: shards, tokenizer and layout.
  """

  path: pathlib.Path
  manifest: dict[str, Any]
  tokenizer: tokenizers.Tokenizer
  token_bytes: np.ndarray
  digest: str

  @property
  def vocab_size(self) -> int:
    """V: one more than the largest token id."""
    return self.manifest['vocab_size']

  @property
  def eot_id(self) -> int:
    """The token that ends a document."""
    return self.manifest['eot_id']


def open_dataset(path: str | pathlib.Path) -> Dataset:
  """Opens a prepared data set and checks all that is cheap to check.

  Args:
    path: a folder made by scripts/prepare_data.py.

  Returns:
    The data set. Its shards exist and have the sizes the manifest gives.

  Raises:
    FileNotFoundError: if there is no finished data set.
    ValueError: if manifest, tokenizer or shards are damaged or do not belong
      together.
  """
  path = pathlib.Path(path)
  file = path / MANIFEST
  if not file.is_file():
    raise FileNotFoundError(
      f'No finished data set in {str(path)!r}: {MANIFEST} is missing. Prepare'
      ' it (scripts/prepare_data.py --help); a preparation that was stopped'
      ' goes on when its command is repeated.'
    )
  if file.stat().st_size > _MAX_MANIFEST_BYTES:
    raise ValueError(f'{file}: larger than {_MAX_MANIFEST_BYTES} bytes.')
  try:
    manifest = json.loads(file.read_bytes())
    _check_manifest(manifest)
  except (ValueError, KeyError, TypeError, RecursionError) as error:
    raise ValueError(
      f'{file}: damaged: {type(error).__name__}: {error}'
    ) from error
  for split in SPLITS:
    for shard in manifest['splits'][split]['shards']:
      _check_file(path / shard['name'], shard['size'])
  tokenizer = tokenizer_lib.load(path / TOKENIZER)
  _check_digest(path / TOKENIZER, manifest['tokenizer_sha256'])
  token_bytes = tokenizer_lib.token_bytes(tokenizer)
  if len(token_bytes) != manifest['vocab_size']:
    raise ValueError(
      f'{path / TOKENIZER} has {len(token_bytes)} tokens, {MANIFEST} says'
      f' {manifest["vocab_size"]}.'
    )
  digest = hashlib.sha256(
    json.dumps(
      [manifest[key] for key in _SEEN]
      + [manifest['splits'][split]['shards'] for split in SPLITS]
    ).encode()
  ).hexdigest()
  return Dataset(path, manifest, tokenizer, token_bytes, digest)


def verify(path: str | pathlib.Path) -> None:
  """Reads every shard and compares its sha256 with the manifest's.

  Raises:
    ValueError: names all the shards that differ.
  """
  dataset = open_dataset(path)
  damaged = []
  for split in SPLITS:
    for shard in dataset.manifest['splits'][split]['shards']:
      try:
        _check_digest(dataset.path / shard['name'], shard['sha256'])
      except ValueError as error:
        damaged.append(str(error))
  if damaged:
    raise ValueError('\n'.join(damaged))


def file_digest(path: pathlib.Path) -> str:
  """sha256 of a file's bytes, in hexadecimal."""
  with path.open('rb') as stream:
    return hashlib.file_digest(stream, 'sha256').hexdigest()


class Stream:
  """The tokens of a split, by position; safe for threads, can be pickled."""

  def __init__(self, dataset: Dataset, split: str):
    manifest = dataset.manifest
    self._path = dataset.path
    self._shards = manifest['splits'][split]['shards']
    self._record_tokens = manifest['record_tokens']
    self._dtype = np.dtype(manifest['dtype']).newbyteorder('<')
    self._vocab_size = manifest['vocab_size']
    # Where each shard begins in the stream, and where the last one ends.
    self._starts = np.cumsum([0] + [s['tokens'] for s in self._shards])
    self._readers = {}
    self._lock = threading.Lock()

  def __len__(self) -> int:
    return int(self._starts[-1])

  def __getstate__(self) -> dict[str, Any]:
    return self.__dict__ | {'_readers': {}, '_lock': None}

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(state, _lock=threading.Lock())

  def read(self, start: int, stop: int) -> np.ndarray:
    """The tokens of [start, stop).

    Args:
      start: first position, 0 <= start <= stop.
      stop: one past the last, at most `len(self)`.

    Returns:
      int32 [stop - start].

    Raises:
      IndexError: if the range is not in the stream.
      ValueError: if a record is damaged; names shard and record.
    """
    if not 0 <= start <= stop <= len(self):
      raise IndexError(f'[{start}, {stop}) is not in [0, {len(self)}).')
    parts = [np.zeros(0, np.int32)]
    while start < stop:
      index = int(np.searchsorted(self._starts, start, side='right')) - 1
      base = int(self._starts[index])
      end = min(stop, int(self._starts[index + 1]))
      parts.append(self._read_shard(index, start - base, end - base))
      start = end
    return np.concatenate(parts)

  def _read_shard(self, index: int, start: int, stop: int) -> np.ndarray:
    """Tokens [start, stop), start < stop, of one shard."""
    shard = self._shards[index]
    first, last = (
      start // self._record_tokens,
      (stop - 1) // self._record_tokens,
    )
    try:
      records = self._reader(index).read(first, last + 1)
    except (RuntimeError, IndexError, ValueError) as error:
      raise ValueError(
        f'{self._path / shard["name"]}, records {first} to {last}: {error}'
      ) from error
    tokens = []
    for number, record in enumerate(records, start=first):
      # A shard that was cut while open gives empty records without an error.
      left = shard['tokens'] - number * self._record_tokens
      size = min(self._record_tokens, left) * self._dtype.itemsize
      place = f'{self._path / shard["name"]}, record {number}'
      if len(record) != size:
        raise ValueError(
          f'{place}: {len(record)} bytes, {size} expected; the shard is'
          ' damaged.'
        )
      ids = np.frombuffer(record, self._dtype)
      # An index past the embedding would silently read its last row.
      if (largest := int(ids.max())) >= self._vocab_size:
        raise ValueError(
          f'{place}: token {largest}, the vocabulary has {self._vocab_size};'
          ' the shard is damaged.'
        )
      tokens.append(ids)
    offset = first * self._record_tokens
    return np.concatenate(tokens)[start - offset : stop - offset].astype(
      np.int32
    )

  def _reader(self, index: int) -> Any:
    with self._lock:
      if index not in self._readers:
        shard = self._shards[index]
        reader = array_record_module.ArrayRecordReader(
          str(self._path / shard['name']), _READER_OPTIONS
        )
        if not reader.ok() or reader.num_records() != shard['records']:
          raise ValueError(
            f'{reader.num_records()} records can be read,'
            f' {shard["records"]} expected; the shard is damaged.'
          )
        self._readers[index] = reader
      return self._readers[index]


# What `Dataset.digest` covers besides the shards.
_SEEN = (
  'format',
  'tokenizer_sha256',
  'vocab_size',
  'eot_id',
  'dtype',
  'record_tokens',
)


def _check_manifest(manifest: dict[str, Any]) -> None:
  """Raises a ValueError, KeyError or TypeError if a field is not sound."""
  if manifest['format'] != FORMAT:
    raise ValueError(
      f'format {manifest["format"]!r}, this program reads {FORMAT};'
      ' prepare the data again.'
    )
  if manifest['dtype'] not in ('uint16', 'uint32'):
    raise ValueError(f'dtype is {manifest["dtype"]!r}, not uint16 or uint32.')
  most = min(np.iinfo(manifest['dtype']).max + 1, tokenizer_lib.MAX_VOCAB_SIZE)
  _check_integer(manifest, 'vocab_size', 1, most)
  _check_integer(manifest, 'eot_id', 0, manifest['vocab_size'] - 1)
  _check_integer(manifest, 'record_tokens', 1, _MAX_RECORD_TOKENS)
  _check_sha256(manifest['tokenizer_sha256'])
  names = set()
  for split in SPLITS:
    for field in ('documents', 'tokens', 'bytes'):
      _check_integer(manifest['splits'][split], field, 0, 1 << 62)
    shards = manifest['splits'][split]['shards']
    for shard in shards:
      if not _NAME.fullmatch(shard['name']):
        raise ValueError(f'{shard["name"]!r} is not the name of a shard here.')
      if shard['name'] in names:
        raise ValueError(f'shard {shard["name"]!r} is listed twice.')
      names.add(shard['name'])
      _check_sha256(shard['sha256'])
      for field in ('tokens', 'records', 'size'):
        _check_integer(shard, field, 1, 1 << 62)
      if shard['records'] != -(-shard['tokens'] // manifest['record_tokens']):
        raise ValueError(
          f'shard {shard["name"]!r}: {shard["records"]} records cannot hold'
          f' {shard["tokens"]} tokens.'
        )
    tokens = sum(shard['tokens'] for shard in shards)
    # The stream begins with an end of text that nothing predicts.
    if tokens != manifest['splits'][split]['tokens'] + 1:
      raise ValueError(f'the shards of {split!r} hold {tokens} tokens.')


def _check_integer(fields: Any, name: str, least: int, most: int) -> None:
  value = fields[name]
  if type(value) is not int or not least <= value <= most:
    raise ValueError(f'{name} is {value!r}, not in {least}..{most}.')


def _check_sha256(value: Any) -> None:
  if not isinstance(value, str) or not _SHA256.fullmatch(value):
    raise ValueError(f'{value!r} is not a sha256.')


def _check_file(path: pathlib.Path, size: int) -> None:
  if path.is_symlink() or not path.is_file():
    raise ValueError(f'{path}: missing, or not a plain file.')
  if path.stat().st_size != size:
    raise ValueError(
      f'{path}: {path.stat().st_size} bytes, {size} expected; the shard is'
      ' damaged.'
    )


def _check_digest(path: pathlib.Path, expected: str) -> None:
  found = file_digest(path)
  if found != expected:
    raise ValueError(
      f'{path}: sha256 {found[:16]}..., {expected[:16]}... expected; the file'
      ' is damaged or was replaced.'
    )
