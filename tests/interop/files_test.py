"""Safetensors files, their sharding, and folders that appear whole."""

from hypothesis import given
from hypothesis import strategies as st
import ml_dtypes
import numpy as np
import pytest

from qat.interop import files

TENSORS = {
  'a': np.arange(6, dtype=np.float32).reshape(2, 3),
  'b/c': np.arange(6, dtype=np.float32).reshape(2, 3).T,
  'd': np.arange(4).astype(ml_dtypes.bfloat16),
  'e': np.arange(3, dtype=np.uint16),
  'scalar': np.float32(2.5),
}


def test_what_is_written_is_read(tmp_path):
  file = tmp_path / 'x.safetensors'
  files.write(file, TENSORS)
  found = files.headers(file)
  assert list(found) == sorted(TENSORS)
  assert found['d'] == files.Tensor(file, (4,), 'BF16')
  for name, x in TENSORS.items():
    back = files.read(file, name)
    assert (back.dtype, back.shape) == (x.dtype, x.shape)
    np.testing.assert_array_equal(back, x)
  # As readable as its folder.
  assert file.stat().st_mode & 0o777 == tmp_path.stat().st_mode & 0o666


def test_what_cannot_be_written_is_an_error_of_the_system(
  tmp_path, monkeypatch
):
  def save_file(*_, **__):
    raise files.safetensors.SafetensorError('No space left on device')

  monkeypatch.setattr(files.safetensors_numpy, 'save_file', save_file)
  with pytest.raises(OSError, match='could not be written: No space left'):
    files.write(tmp_path / 'x.safetensors', TENSORS)


@pytest.mark.parametrize('cut', [0, 4, 40, -1])
def test_a_damaged_file_is_named(tmp_path, cut):
  file = tmp_path / 'x.safetensors'
  files.write(file, TENSORS)
  file.write_bytes(file.read_bytes()[:cut])
  with pytest.raises(ValueError, match='x.safetensors is damaged'):
    files.headers(file)


def test_a_missing_file_is_named(tmp_path):
  with pytest.raises(FileNotFoundError, match='x.safetensors is missing'):
    files.read(tmp_path / 'x.safetensors', 'a')


@given(st.lists(st.integers(0, 20)), st.integers(1, 30))
def test_shards_keep_the_order_and_the_limit(sizes, limit):
  by_name = {str(i): size for i, size in enumerate(sizes)}
  plan = files.shards(by_name, limit)
  assert [name for shard in plan for name in shard] == list(by_name)
  for shard in plan:
    assert sum(by_name[n] for n in shard) <= limit or len(shard) == 1
  # None is cut too early.
  for shard, after in zip(plan, plan[1:], strict=False):
    assert sum(by_name[n] for n in [*shard, after[0]]) > limit


def test_a_folder_appears_whole(tmp_path):
  out = tmp_path / 'a' / 'out'
  with files.new_folder(out) as folder:
    (folder / 'x').write_text('1')
    assert not out.exists()
  assert [p.name for p in out.iterdir()] == ['x']
  assert [p.name for p in out.parent.iterdir()] == ['out']


def test_a_folder_does_not_appear_after_an_error(tmp_path):
  with (
    pytest.raises(KeyboardInterrupt),
    files.new_folder(tmp_path / 'out') as f,
  ):
    (f / 'x').write_text('1')
    raise KeyboardInterrupt
  assert not list(tmp_path.iterdir())


def test_what_a_killed_process_left_is_replaced(tmp_path):
  (tmp_path / 'out.partial').mkdir()
  (tmp_path / 'out.partial' / 'old').write_text('1')
  (tmp_path / 'out').mkdir()  # Empty: allowed.
  with files.new_folder(tmp_path / 'out') as folder:
    (folder / 'x').write_text('1')
  assert [p.name for p in tmp_path.rglob('*')] == ['out', 'x']


@pytest.mark.parametrize('kind', ['folder', 'file'])
def test_nothing_is_written_over(tmp_path, kind):
  out = tmp_path / 'out'
  if kind == 'folder':
    out.mkdir()
    (out / 'x').write_text('1')
  else:
    out.write_text('1')
  with pytest.raises(FileExistsError, match='out exists already'):
    with files.new_folder(out):
      raise AssertionError


def test_a_link_leads_to_where_the_folder_appears(tmp_path):
  (tmp_path / 'there').mkdir()
  (tmp_path / 'out').symlink_to(tmp_path / 'there')
  with files.new_folder(tmp_path / 'out') as folder:
    (folder / 'x').write_text('1')
  assert (tmp_path / 'there' / 'x').read_text() == '1'
  assert (tmp_path / 'out').is_symlink()
  with pytest.raises(FileExistsError, match='/ is a mount point'):
    files.check_new(files.pathlib.Path('/'))
