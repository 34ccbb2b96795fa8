"""Durable files and the lock."""

import pathlib
import subprocess
import sys

import pytest

from qat.data import files

ROOT = pathlib.Path(__file__).parents[2]


def test_a_file_is_replaced_as_a_whole(tmp_path, monkeypatch) -> None:
  path = tmp_path / 'a'
  files.write(path, b'old')

  def full(file: object) -> None:
    raise OSError('no space')

  monkeypatch.setattr(files, 'sync', full)
  with pytest.raises(OSError, match='no space'):
    files.write(path, b'new')
  assert path.read_bytes() == b'old'
  (files.unfinished(tmp_path / 'run')).mkdir()
  files.remove_unfinished(tmp_path)
  assert [p.name for p in tmp_path.iterdir()] == ['a']


def test_a_lock_ends_with_its_process(tmp_path) -> None:
  code = (
    'import os, pathlib, sys; from qat.data import files\n'
    'with files.lock(pathlib.Path(sys.argv[1]), wait=False):\n'
    '  print("locked", flush=True); sys.stdin.read()'
  )
  with subprocess.Popen(
    [sys.executable, '-c', code, str(tmp_path)],
    cwd=ROOT,
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  ) as process:
    assert process.stdout.readline() == 'locked\n'
    with pytest.raises(BlockingIOError, match='Another process is writing'):
      with files.lock(tmp_path, wait=False):
        raise AssertionError('two have the lock')
    process.kill()
    with files.lock(tmp_path, wait=True):
      pass
