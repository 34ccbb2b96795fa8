"""The external sort: its order, and that a stop changes nothing."""

from collections.abc import Callable
import pathlib
import signal
import subprocess
import sys

import pytest

from qat.data import dataset as dataset_lib
from qat.data import prepare
from qat.data import shards
from qat.data import tokenizer as tokenizer_lib

ROOT = pathlib.Path(__file__).parents[2]

Make = Callable[..., prepare.Options]


def files(folder: pathlib.Path) -> dict[str, bytes]:
  return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


def test_documents_are_ordered_by_their_keys(
  prepared: pathlib.Path, texts: list[str]
) -> None:
  opened = dataset_lib.open_dataset(prepared)
  found = {}
  for split in dataset_lib.SPLITS:
    stream = dataset_lib.Stream(opened, split)
    text = opened.tokenizer.decode(
      stream.read(1, len(stream)).tolist(), skip_special_tokens=False
    )
    found[split] = text.split('<|endoftext|>')[:-1]
  keys = {
    text: shards.hash64(f'0/{i}'.encode()) for i, text in enumerate(texts)
  }
  for split, documents in found.items():
    moved = {t for t in texts if shards.hash64(t.encode()) < 0.1 * 2**64}
    chosen = moved if split == 'valid' else set(texts) - moved
    assert documents == sorted(chosen, key=keys.__getitem__)


def test_the_hash_does_not_change_with_versions() -> None:
  assert shards.hash64(b'') == 0xE4A6A0577479B2B4


def test_neither_runs_nor_batches_change_the_data(
  tmp_path,
  prepared: pathlib.Path,
  jsonl: pathlib.Path,
  options: Make,
  monkeypatch,
) -> None:
  monkeypatch.setattr(shards, 'RUN_BYTES', 9_000)
  monkeypatch.setattr(shards, '_BATCH_BYTES', 2_000)
  out = prepare.prepare([str(jsonl)], tmp_path / 'out', options())
  assert files(out) == files(prepared)


# Runs in another process, which kills itself just before or after the k-th
# time that something gets its name.
KILLED = """
import os, signal, sys
from qat.data import files, prepare, shards
source, out, k, before = sys.argv[1:]
shards.RUN_BYTES = 30_000
rename, calls = files.rename, [0]
def killed(source, target):
  calls[0] += 1
  if calls[0] == int(k) and before == 'before':
    os.kill(os.getpid(), signal.SIGKILL)
  rename(source, target)
  if calls[0] == int(k):
    os.kill(os.getpid(), signal.SIGKILL)
files.rename = killed
prepare.prepare([source], out, prepare.Options(
  280, None, 1 << 30, '<|endoftext|>', 'text', None, 0.1, 0, 12_000))
"""


def run_killed(*arguments: object) -> bool:
  """Whether it killed itself before it was through."""
  process = subprocess.run(
    [sys.executable, '-c', KILLED, *map(str, arguments)],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=60,
  )
  assert process.returncode in (0, -signal.SIGKILL), process.stderr
  return process.returncode != 0


def test_killed_and_repeated_it_writes_the_same_bytes(
  tmp_path, prepared: pathlib.Path, jsonl: pathlib.Path, options: Make
) -> None:
  # One folder is killed again and again, each time after at least two steps.
  out = tmp_path / 'out'
  kills = 0
  while run_killed(jsonl, out, 3, ('before', 'after')[kills % 2]):
    kills += 1
  assert kills >= 5
  assert files(out) == files(prepared)
  assert not (out / '.partial').exists()


def test_what_is_finished_is_not_done_again(
  tmp_path, jsonl: pathlib.Path, options: Make, monkeypatch
) -> None:
  monkeypatch.setattr(shards, 'RUN_BYTES', 30_000)
  out = tmp_path / 'out'
  real = shards._write_shard

  def fail_at_the_second(*arguments: object) -> object:
    if 'train-00001' in str(arguments[2]):
      raise OSError('no space')
    return real(*arguments)

  monkeypatch.setattr(shards, '_write_shard', fail_at_the_second)
  with pytest.raises(OSError, match='no space'):
    prepare.prepare([str(jsonl)], out, options())
  kept = {p: p.stat().st_mtime_ns for p in out.rglob('*') if p.is_file()}
  monkeypatch.setattr(shards, '_write_shard', real)
  tokenized = []
  monkeypatch.setattr(tokenizer_lib, 'encode', lambda *a: tokenized.append(a))
  prepare.prepare([str(jsonl)], out, options())
  assert not tokenized
  shard = next(out.glob('train-00000*'))
  assert shard.stat().st_mtime_ns == kept[shard]
