"""Every format and compression, and damage to each."""

from collections.abc import Callable
import gzip
import json
import lzma
import pathlib

import pyarrow as pa
from pyarrow import parquet
import pytest
import zstandard

from qat.data import sources as sources_lib

TEXTS = ['One.\n', '', 'Zwei – “drei”\r\n日本', 'x' * 3_000_000, 'last']

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
  '': bytes,
  '.gz': gzip.compress,
  '.xz': lzma.compress,
  '.zst': lambda data: pa.compress(data, 'zstd', asbytes=True),
}


def json_lines(texts: list[str], field: str = 'text') -> bytes:
  return ''.join(json.dumps({'id': 1, field: t}) + '\n' for t in texts).encode()


def write_parquet(path: pathlib.Path, texts: list[str]) -> None:
  table = pa.table({'id': list(range(len(texts))), 'text': texts})
  parquet.write_table(table, path, row_group_size=2)


def read(
  *names: str | pathlib.Path, field: str = 'text', split: str | None = None
) -> list[str]:
  return [
    document.text
    for source in sources_lib.resolve([str(name) for name in names])
    for document in sources_lib.read(source, field=field, split=split)
  ]


@pytest.mark.parametrize('suffix', COMPRESS)
@pytest.mark.parametrize('extension', ['.jsonl', '.json'])
def test_json_lines(tmp_path, extension: str, suffix: str) -> None:
  path = tmp_path / f'a{extension}{suffix}'
  path.write_bytes(COMPRESS[suffix](json_lines(TEXTS)))
  assert read(path) == TEXTS
  path.write_bytes(COMPRESS[suffix](json_lines(TEXTS, 'body').rstrip(b'\n')))
  assert read(path, field='body') == TEXTS


@pytest.mark.parametrize('suffix', COMPRESS)
@pytest.mark.parametrize('text', TEXTS)
def test_a_text_file_is_one_document(tmp_path, suffix: str, text: str) -> None:
  path = tmp_path / f'a.TXT{suffix}'
  path.write_bytes(COMPRESS[suffix](text.encode()))
  assert read(path) == [text]


def test_a_text_file_is_split_before_each_match(tmp_path) -> None:
  path = tmp_path / 'a.txt'
  path.write_text('Title\nPART 1\none\nPART 2\ntwo PART 3\n')
  assert read(path, split='^PART') == [
    'Title\n',
    'PART 1\none\n',
    'PART 2\ntwo PART 3\n',
  ]


def test_parquet(tmp_path) -> None:
  write_parquet(tmp_path / 'a.parquet', TEXTS)
  assert read(tmp_path / 'a.parquet') == TEXTS


def test_a_folder_is_its_files_by_path(tmp_path) -> None:
  (tmp_path / 'sub').mkdir()
  write_parquet(tmp_path / 'sub' / 'c.parquet', ['c'])
  (tmp_path / 'b.txt').write_text('b')
  (tmp_path / 'a.jsonl.gz').write_bytes(gzip.compress(json_lines(['a1', 'a2'])))
  (tmp_path / 'README.md').write_text('not a document')
  assert read(tmp_path, tmp_path / 'b.txt') == ['a1', 'a2', 'b', 'c', 'b']
  names = [source.name for source in sources_lib.resolve([str(tmp_path)])]
  assert names == ['a.jsonl.gz', 'b.txt', 'sub/c.parquet']


def test_the_position_ends_at_the_size_of_the_file(tmp_path) -> None:
  (tmp_path / 'a.jsonl').write_bytes(json_lines(TEXTS))
  write_parquet(tmp_path / 'b.parquet', TEXTS)
  (tmp_path / 'c.txt').write_text('text')
  for source in sources_lib.resolve([str(tmp_path)]):
    read_ = [d.read for d in sources_lib.read(source, field='text', split=None)]
    assert read_ == sorted(read_)
    assert read_[-1] == source.size


def test_a_hugging_face_data_set(tmp_path, monkeypatch) -> None:
  pytest.importorskip('datasets')
  folder = tmp_path / 'org' / 'name'
  folder.mkdir(parents=True)
  (folder / 'train.jsonl').write_bytes(json_lines(TEXTS))
  (folder / 'validation.jsonl').write_bytes(json_lines(['v']))
  monkeypatch.chdir(tmp_path)
  assert read('org/name:default') == TEXTS
  assert read('org/name:default:validation') == ['v']
  (source,) = sources_lib.resolve(['org/name:default'])
  assert source.name == 'org/name:default:train'
  (folder / 'train.jsonl').write_bytes(json_lines(TEXTS[:2]))
  assert sources_lib.resolve(['org/name:default'])[0].digest != source.digest
  with pytest.raises(ValueError, match='changed while it was read'):
    list(sources_lib.read(source, field='text', split=None))
  with pytest.raises(ValueError, match='nope'):
    read('org/name:default:nope')
  with pytest.raises(ValueError, match="row 0: no field 'body'"):
    read('org/name:default', field='body')


def test_a_hugging_face_data_set_without_the_library(monkeypatch) -> None:
  monkeypatch.setitem(__import__('sys').modules, 'datasets', None)
  with pytest.raises(ImportError, match=r"pip install -e '.\[hf\]'"):
    sources_lib.resolve(['allenai/c4:en'])


def test_names_that_are_nothing(tmp_path) -> None:
  for name in ('no/such', str(tmp_path / 'a.txt'), 'a', ''):
    if name:
      with pytest.raises(FileNotFoundError, match='No file or folder'):
        sources_lib.resolve([name])
  with pytest.raises(ValueError, match='No text in the folder'):
    sources_lib.resolve([str(tmp_path)])
  for name in ('a.doc', 'a.parquet.gz', 'a', 'a.gz'):
    (tmp_path / name).write_text('text')
    with pytest.raises(ValueError, match='unknown extension.*supported are'):
      sources_lib.resolve([str(tmp_path / name)])


@pytest.mark.parametrize('suffix', ['.gz', '.xz', '.zst'])
@pytest.mark.parametrize('damage', ['cut', 'flip', 'garbage'])
def test_damage_names_the_file(tmp_path, suffix: str, damage: str) -> None:
  lines = [f'{i * 7919 % 100_003}' for i in range(30_000)]
  data = bytearray(COMPRESS[suffix](json_lines(lines)))
  if suffix == '.zst':
    # With a checksum, as the command line tool writes it and Arrow does not.
    checked = zstandard.ZstdCompressor(write_checksum=True)
    data = bytearray(checked.compress(json_lines(lines)))
  if damage == 'cut':
    del data[-100:]
  elif damage == 'flip':
    data[len(data) // 2] ^= 0x40
  else:
    data = b'garbage' * 100
  path = tmp_path / f'a.jsonl{suffix}'
  path.write_bytes(data)
  with pytest.raises(ValueError, match=r'a\.jsonl.*(damaged after|not JSON)'):
    read(path)


def test_damaged_parquet_names_file_and_place(tmp_path) -> None:
  path = tmp_path / 'a.parquet'
  write_parquet(path, [f'{i}' * 100 for i in range(100)])
  data = path.read_bytes()
  path.write_bytes(data[:-10])
  with pytest.raises(ValueError, match=r'a\.parquet: damaged Parquet'):
    read(path)
  path.write_bytes(data[:4] + b'\xff' * 400 + data[404:])
  with pytest.raises(ValueError, match=r'a\.parquet: damaged.*row group 0'):
    read(path)


@pytest.mark.parametrize(
  ('line', 'message'),
  [
    (b'{"text": "a"', 'line 2: not JSON'),
    (b'["text"]', 'line 2: not an object but list'),
    (b'{"body": "a", "id": 1}', r"line 2: no field 'text'.*'body', 'id'.*--f"),
    (b'{"text": 3}', "line 2: field 'text' is int"),
    (b'{"text": null}', "line 2: field 'text' is NoneType"),
    (b'{"text": "\\ud800"}', 'line 2: not valid Unicode'),
    (b'{"text": "\xff"}', 'line 2: not JSON'),
    (b'[' * 200_000, 'line 2: not JSON'),
  ],
)
def test_bad_lines_name_their_place(
  tmp_path, line: bytes, message: str
) -> None:
  path = tmp_path / 'a.jsonl'
  path.write_bytes(json_lines(['good']) + line + b'\n')
  with pytest.raises(ValueError, match=r'a\.jsonl, ' + message):
    read(path)


def test_text_that_is_not_utf8_names_its_line(tmp_path) -> None:
  (tmp_path / 'a.txt').write_bytes(b'one\ntwo\n\xff\n')
  with pytest.raises(ValueError, match=r'a\.txt, line 3: not UTF-8'):
    read(tmp_path / 'a.txt')
