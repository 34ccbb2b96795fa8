"""Reading a data set, damage to it, and hostile manifests."""

import json
import pathlib
import pickle
import shutil
import tempfile
from typing import Any

import hypothesis
from hypothesis import strategies as st
import numpy as np
import pytest

from qat.data import dataset as dataset_lib


@pytest.fixture
def copy(prepared: pathlib.Path, tmp_path) -> pathlib.Path:
  """A data set that a test may damage."""
  return pathlib.Path(shutil.copytree(prepared, tmp_path / 'copy'))


def edit(folder: pathlib.Path, *path: Any, value: Any) -> None:
  """Sets one field of the manifest."""
  file = folder / dataset_lib.MANIFEST
  manifest = json.loads(file.read_text())
  inner = manifest
  for key in path[:-1]:
    inner = inner[key]
  inner[path[-1]] = value
  file.write_text(json.dumps(manifest))


def whole(folder: pathlib.Path, split: str) -> np.ndarray:
  stream = dataset_lib.Stream(dataset_lib.open_dataset(folder), split)
  return stream.read(0, len(stream))


def test_the_splits_hold_the_documents(
  prepared: pathlib.Path, texts: list[str]
) -> None:
  opened = dataset_lib.open_dataset(prepared)
  found = []
  for split in dataset_lib.SPLITS:
    tokens = whole(prepared, split)
    assert tokens.dtype == np.int32
    assert tokens[0] == tokens[-1] == opened.eot_id
    assert len(tokens) == opened.manifest['splits'][split]['tokens'] + 1
    ends = np.flatnonzero(tokens == opened.eot_id)
    found += [
      opened.tokenizer.decode(tokens[start + 1 : end].tolist())
      for start, end in zip(ends[:-1], ends[1:], strict=True)
    ]
  assert sorted(found) == sorted(texts)
  assert found != texts


def test_bytes_of_the_tokens_are_the_bytes_of_the_text(
  prepared: pathlib.Path, texts: list[str]
) -> None:
  opened = dataset_lib.open_dataset(prepared)
  total = 0
  for split in dataset_lib.SPLITS:
    size = opened.token_bytes[whole(prepared, split)].sum()
    assert size == opened.manifest['splits'][split]['bytes']
    total += size
  assert total == sum(len(text.encode()) for text in texts)
  assert opened.token_bytes.dtype == np.int32
  assert opened.token_bytes.shape == (opened.vocab_size,)


def test_any_range_can_be_read(prepared: pathlib.Path) -> None:
  opened = dataset_lib.open_dataset(prepared)
  shards = opened.manifest['splits']['train']['shards']
  assert len(shards) > 1 and shards[0]['records'] > 1
  tokens = whole(prepared, 'train')
  stream = dataset_lib.Stream(opened, 'train')
  stream = pickle.loads(pickle.dumps(stream))
  border = shards[0]['tokens']
  edges = [0, 1, 2047, 2048, 2049, border - 1, border, border + 1]
  edges += [border + 2048, len(tokens) - 1, len(tokens)]
  for start in edges:
    for stop in edges:
      if start <= stop:
        np.testing.assert_array_equal(
          stream.read(start, stop), tokens[start:stop]
        )
  for start, stop in ((-1, 1), (2, 1), (0, len(tokens) + 1)):
    with pytest.raises(IndexError):
      stream.read(start, stop)


def test_an_unfinished_folder_says_what_to_do(tmp_path) -> None:
  with pytest.raises(FileNotFoundError, match='goes on when its command is re'):
    dataset_lib.open_dataset(tmp_path)


@pytest.mark.parametrize(
  'name', ['../x', '/etc/passwd', 'a/b', '..', '.hidden', 'a\x00b', '', 'a\n']
)
def test_names_that_leave_the_folder_are_refused(copy, name: str) -> None:
  edit(copy, 'splits', 'train', 'shards', 0, 'name', value=name)
  with pytest.raises(ValueError, match='not the name of a shard'):
    dataset_lib.open_dataset(copy)


def test_links_out_of_the_folder_are_refused(copy, tmp_path) -> None:
  name = dataset_lib.open_dataset(copy).manifest['splits']['train']['shards'][0]
  shard = copy / name['name']
  shard.rename(tmp_path / 'outside')
  shard.symlink_to(tmp_path / 'outside')
  with pytest.raises(ValueError, match='not a plain file'):
    dataset_lib.open_dataset(copy)


@pytest.mark.parametrize(
  ('path', 'value', 'message'),
  [
    (['format'], 2, 'prepare the data again'),
    (['dtype'], 'int8', 'not uint16'),
    (['dtype'], [1], 'not uint16'),
    (['vocab_size'], 2**31, 'vocab_size is 2147483648'),
    (['vocab_size'], 281, 'has 280 tokens'),
    (['eot_id'], 280, 'eot_id is 280'),
    (['eot_id'], True, 'eot_id is True'),
    (['record_tokens'], 2**40, 'record_tokens'),
    (['record_tokens'], 1.5, 'record_tokens is 1.5'),
    (['tokenizer_sha256'], 'x', 'not a sha256'),
    (['tokenizer_sha256'], '0' * 64, 'was replaced'),
    (['splits'], {}, "KeyError: 'train'"),
    (['splits', 'train'], None, 'TypeError'),
    (['splits', 'train', 'shards'], [], 'hold 0 tokens'),
    (['splits', 'train', 'shards', 0, 'tokens'], 1, 'cannot hold'),
    (['splits', 'train', 'shards', 0, 'size'], -1, 'size is -1'),
    (['splits', 'train', 'shards', 0, 'size'], 5, '5 expected'),
    (['splits', 'train', 'tokens'], 7, 'hold'),
  ],
)
def test_a_manifest_that_is_not_sound_is_refused(
  copy, path: list[Any], value: Any, message: str
) -> None:
  edit(copy, *path, value=value)
  with pytest.raises(ValueError, match=message):
    dataset_lib.open_dataset(copy)


@pytest.mark.parametrize(
  'content', ['', '[]', '{}', '[' * 100_000, '\xff', '1']
)
def test_a_manifest_that_is_none_is_refused(copy, content: str) -> None:
  (copy / dataset_lib.MANIFEST).write_text(content, 'latin-1')
  with pytest.raises(ValueError, match=r'manifest\.json: damaged'):
    dataset_lib.open_dataset(copy)


@hypothesis.given(data=st.data())
def test_any_change_of_a_manifest_gives_a_readable_error(
  prepared: pathlib.Path, data: st.DataObject
) -> None:
  with tempfile.TemporaryDirectory() as folder:
    copy = pathlib.Path(shutil.copytree(prepared, folder, dirs_exist_ok=True))
    file = copy / dataset_lib.MANIFEST
    content = bytearray(file.read_bytes())
    start = data.draw(st.integers(0, len(content) - 1))
    length = data.draw(st.integers(0, 40))
    content[start : start + length] = data.draw(
      st.binary(max_size=8)
      | st.sampled_from(
        [b'null', b'"', b'}', b'],', b'1e999', b'-1', b'[[', b'']
      )
    )
    file.write_bytes(content)
    try:
      opened = dataset_lib.open_dataset(copy)
      dataset_lib.Stream(opened, 'train').read(0, 10)
    except ValueError as error:
      assert str(copy) in str(error)


def shard(folder: pathlib.Path) -> tuple[pathlib.Path, dict[str, Any]]:
  manifest = json.loads((folder / dataset_lib.MANIFEST).read_text())
  found = manifest['splits']['train']['shards'][0]
  return folder / found['name'], found


def test_missing_and_cut_shards_are_found_at_once(copy) -> None:
  path, _ = shard(copy)
  with path.open('r+b') as file:
    file.truncate(path.stat().st_size // 2)
  with pytest.raises(ValueError, match=f'{path.name}.*expected'):
    dataset_lib.open_dataset(copy)
  path.unlink()
  with pytest.raises(ValueError, match=f'{path.name}: missing'):
    dataset_lib.open_dataset(copy)


def test_a_flipped_bit_is_never_silent(copy) -> None:
  tokens = whole(copy, 'train')
  dataset_lib.verify(copy)
  path, _ = shard(copy)
  original = path.read_bytes()
  errors = 0
  for offset in range(5, len(original), len(original) // 29):
    data = bytearray(original)
    data[offset] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f'{path.name}: sha256'):
      dataset_lib.verify(copy)
    try:
      np.testing.assert_array_equal(whole(copy, 'train'), tokens)
    except ValueError as error:
      assert path.name in str(error)
      errors += 1
  assert errors


def test_a_shard_cut_while_it_is_open_is_an_error(copy) -> None:
  stream = dataset_lib.Stream(dataset_lib.open_dataset(copy), 'train')
  path, found = shard(copy)
  stream.read(0, 1)
  with path.open('r+b') as file:
    file.truncate(0)
  last = found['records'] - 1
  with pytest.raises(ValueError, match=f'{path.name}, record.* {last}'):
    stream.read(found['tokens'] - 1, found['tokens'])


def test_tokens_outside_the_vocabulary_are_an_error(copy) -> None:
  opened = dataset_lib.open_dataset(copy)
  # The shards of 280 tokens, read as if there were fewer.
  opened.manifest['vocab_size'] = 200
  with pytest.raises(
    ValueError, match=r'record 0: token 2\d\d, the vocabulary'
  ):
    dataset_lib.Stream(opened, 'train').read(0, 1)
