"""Where documents come from: files, folders and Hugging Face data sets.

A source is given by name. A file is text (`.txt`), JSON lines (`.jsonl`,
`.json`) or Parquet (`.parquet`); text and JSON lines may be compressed
(`.gz`, `.xz`, `.zst`). A folder stands for all such files in it, sorted by
path. `org/name:config:split` is a data set of the Hugging Face hub, streamed.

Everything is read in order and in memory bounded by one document (or one row
group of a Parquet file). Damage is an error that names the file and the place.
"""

from collections.abc import Iterator
from collections.abc import Sequence
import dataclasses
import gzip
import hashlib
import itertools
import json
import lzma
import pathlib
import re
from typing import IO
from typing import Any
from typing import NamedTuple
import zlib

import pyarrow
from pyarrow import parquet

_FORMATS = ('.txt', '.jsonl', '.json', '.parquet')
_COMPRESSIONS = ('.gz', '.xz', '.zst')
_SUPPORTED = (
  '.txt, .jsonl, .json (a JSON object a line), each also with .gz, .xz or'
  ' .zst, and .parquet'
)
# Dataset, config, split. Without a config it could be a mistyped path.
_HUB = re.compile(r'([\w.-]+/[\w.-]+):([\w.-]+)(?::([\w.-]+))?')


class Document(NamedTuple):
  """A text, and how many bytes of its file have been read to get it."""

  text: str
  read: int


@dataclasses.dataclass(frozen=True)
class Source:
  """One file, or one data set of the hub.

  Attributes:
    name: as the manifest has it: never with a folder of this machine.
    digest: sha256 of a file; what `datasets` identifies its version by.
    size: bytes of the file as it lies; 0 where unknown.
    path: the file; None for a data set of the hub.
    hub: name, config and split of a data set; None for a file.
  """

  name: str
  digest: str
  size: int
  path: pathlib.Path | None
  hub: tuple[str, str, str] | None


def resolve(names: Sequence[str]) -> list[Source]:
  """The sources that `names` stand for, in order, with their digests.

  Args:
    names: files, folders, or `org/name:config[:split]`.

  Returns:
    At least one source.

  Raises:
    FileNotFoundError: a path that does not exist.
    ValueError: an unknown extension, or a folder without any known file.
  """
  found = []
  for name in names:
    path = pathlib.Path(name)
    if path.is_dir():
      found += _folder(path)
    elif path.exists():
      if _format(path) is None:
        raise ValueError(
          f'{name!r}: unknown extension {"".join(path.suffixes[-2:])!r};'
          f' supported are {_SUPPORTED}.'
        )
      found.append(_file(path, path.name))
    elif match := _HUB.fullmatch(name):
      dataset, config, split = match.groups()
      found.append(_hub(dataset, config, split or 'train'))
    else:
      raise FileNotFoundError(
        f'No file or folder {name!r}, and it does not look like a Hugging'
        ' Face data set (org/name:config, org/name:config:split).'
      )
  return found


def read(
  source: Source, *, field: str, split: str | None
) -> Iterator[Document]:
  """The documents of a source, in order; empty ones too.

  Args:
    source: from `resolve`.
    field: the name of the text's field in JSON lines, Parquet and data sets.
    split: of a text file: a regular expression (multi-line); a document starts
      at each match. None: the file is one document.

  Yields:
    Documents. All can be encoded as UTF-8.

  Raises:
    ValueError: damage, a missing field or one that is not text, with its place.
  """
  if source.path is None:
    rows = _hub_rows(source)
  elif _format(source.path) == '.parquet':
    rows = _parquet_rows(source.path, field)
  elif _format(source.path) == '.txt':
    rows = _texts(source.path, field, split)
  else:
    rows = _json_rows(source.path)
  for place, row, position in rows:
    yield Document(_text(source, place, row, field), position)


# One item of every reader below: the place for an error, the row, and how many
# bytes of the file have been read.
_Row = tuple[str, Any, int]


def _text(source: Source, place: str, row: Any, field: str) -> str:
  where = f'{source.path or source.name}, {place}'
  if not isinstance(row, dict):
    raise ValueError(f'{where}: not an object but {type(row).__name__}.')
  if field not in row:
    raise ValueError(
      f'{where}: no field {field!r}, there are {sorted(row)}; choose one'
      ' (--field).'
    )
  text = row[field]
  if not isinstance(text, str):
    raise ValueError(
      f'{where}: field {field!r} is {type(text).__name__}, not text.'
    )
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise ValueError(f'{where}: not valid Unicode: {error}.') from error
  return text


def refuse_inside(out: pathlib.Path, names: Sequence[str]) -> None:
  """Raises a ValueError where `out` would become a part of a source."""
  for name in names:
    path = pathlib.Path(name)
    if path.is_dir() and out.resolve().is_relative_to(path.resolve()):
      raise ValueError(
        f'{str(out)!r} lies in the source {name!r}, of whose files it would'
        ' become a part; choose a folder elsewhere.'
      )


def _format(path: pathlib.Path) -> str | None:
  """The extension without compression, or None when it is unknown."""
  suffix = path.suffix.lower()
  compressed = suffix in _COMPRESSIONS
  if compressed:
    suffix = path.with_suffix('').suffix.lower()
  if suffix not in _FORMATS or (compressed and suffix == '.parquet'):
    return None
  return suffix


def _folder(folder: pathlib.Path) -> list[Source]:
  paths = sorted(p for p in folder.rglob('*') if p.is_file() and _format(p))
  if not paths:
    raise ValueError(
      f'No text in the folder {str(folder)!r}; supported are {_SUPPORTED}.'
    )
  return [_file(path, path.relative_to(folder).as_posix()) for path in paths]


def _file(path: pathlib.Path, name: str) -> Source:
  with path.open('rb') as stream:
    digest = hashlib.file_digest(stream, 'sha256').hexdigest()
  return Source(name, digest, path.stat().st_size, path, None)


def _open(path: pathlib.Path, raw: IO[bytes]) -> IO[bytes]:
  """The decompressed bytes of `raw`."""
  suffix = path.suffix.lower()
  if suffix == '.gz':
    return gzip.open(raw)
  if suffix == '.xz':
    return lzma.open(raw)
  if suffix == '.zst':
    # Arrow reports a cut file; zstandard's reader takes it for the end.
    return pyarrow.input_stream(raw, compression='zstd')
  return raw


def _blocks(path: pathlib.Path) -> Iterator[tuple[bytes, int]]:
  """(decompressed bytes, bytes of the file read so far)."""
  done = 0
  with path.open('rb') as raw:
    try:
      with _open(path, raw) as stream:
        while block := stream.read(1 << 20):
          done += len(block)
          yield block, raw.tell()
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
      raise ValueError(
        f'{path}: damaged after byte {done} of its text: {error}'
      ) from error


def _lines(path: pathlib.Path) -> Iterator[tuple[int, bytes, int]]:
  """(number from 1, line without its end, bytes of the file read so far)."""
  number = 0
  parts = []
  position = 0
  for block, position in _blocks(path):
    *lines, last = block.split(b'\n')
    for line in lines:
      number += 1
      yield number, b''.join([*parts, line]), position
      parts = []
    parts.append(last)
  yield number + 1, b''.join(parts), position


def _json_rows(path: pathlib.Path) -> Iterator[_Row]:
  for number, line, position in _lines(path):
    if not line.strip():
      continue
    yield f'line {number}', json_row(path, number, line), position


def json_row(path: pathlib.Path, number: int, line: bytes) -> Any:
  """What a line of a JSON Lines file holds, or a ValueError that names it."""
  try:
    return json.loads(line)
  except (ValueError, RecursionError) as error:
    raise ValueError(
      f'{path}, line {number}: not JSON (one object a line): {error}'
    ) from error


def _texts(path: pathlib.Path, field: str, split: str | None) -> Iterator[_Row]:
  blocks, positions = zip(*_blocks(path), (b'', 0), strict=True)
  data = b''.join(blocks)
  try:
    text = data.decode()
  except UnicodeDecodeError as error:
    line = data.count(b'\n', 0, error.start) + 1
    raise ValueError(f'{path}, line {line}: not UTF-8: {error}') from error
  starts = {0}
  if split is not None:
    starts.update(m.start() for m in re.finditer(split, text, re.MULTILINE))
  bounds = [*sorted(starts), len(text)]
  for start, end in itertools.pairwise(bounds):
    yield f'character {start}', {field: text[start:end]}, max(positions)


def _parquet_rows(path: pathlib.Path, field: str) -> Iterator[_Row]:
  group = 0
  try:
    with parquet.ParquetFile(path) as file:
      names = file.schema_arrow.names
      columns = [field] if field in names else names
      size = path.stat().st_size
      for group in range(file.num_row_groups):
        table = file.read_row_group(group, columns=columns)
        position = size * (group + 1) // file.num_row_groups
        for index, row in enumerate(table.to_pylist()):
          yield f'row group {group}, row {index}', row, position
  except (OSError, pyarrow.ArrowException) as error:
    raise ValueError(
      f'{path}: damaged Parquet, row group {group}: {error}'
    ) from error


def _hub(dataset: str, config: str, split: str) -> Source:
  # The hash is the commit of the data set's repository, or of local files.
  digest = _builder(dataset, config).hash
  name = ':'.join([dataset, config, split])
  return Source(name, digest, 0, None, (dataset, config, split))


def _hub_rows(source: Source) -> Iterator[_Row]:
  dataset, config, split = source.hub
  builder = _builder(dataset, config)
  if builder.hash != source.digest:
    raise ValueError(f'{source.name}: the data set changed while it was read.')
  for index, row in enumerate(builder.as_streaming_dataset(split=split)):
    yield f'row {index}', row, 0


def _builder(dataset: str, config: str) -> Any:
  try:
    # Large, and only for this kind of source.
    import datasets
  except ImportError as error:
    raise ImportError(
      f'{dataset}:{config} needs the library that reads Hugging Face data'
      " sets: pip install -e '.[hf]'"
    ) from error
  return datasets.load_dataset_builder(dataset, config)
