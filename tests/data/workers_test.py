"""What reader processes do when their program ends, in whatever way."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[2]

MAIN = """
import os, signal, sys, time
from qat.data import loader

if __name__ == '__main__':
  train = loader.TrainLoader(
    sys.argv[1], seq_len=100, batch_size=4, seed=0, process_index=0,
    process_count=1, workers=2, threads=1)
  for _ in range(8):
    next(train)
  print('ready', flush=True)
  if sys.argv[2] == 'sleep':
    time.sleep(60)
  if sys.argv[2] == 'ignore':
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.killpg(0, signal.SIGTERM)
    for _ in range(100):
      next(train)
    print('done', flush=True)
"""


def start(prepared: pathlib.Path, tmp_path, mode: str) -> subprocess.Popen:
  script = tmp_path / 'main.py'
  script.write_text(MAIN)
  return subprocess.Popen(
    [sys.executable, str(script), str(prepared), mode],
    env=os.environ | {'PYTHONPATH': str(ROOT)},
    stdout=subprocess.PIPE,
    text=True,
    start_new_session=True,
  )


def group(leader: int) -> list[str]:
  """The processes of a group that are alive, without zombies."""
  alive = []
  for file in pathlib.Path('/proc').glob('[0-9]*/stat'):
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
      name, _, fields = file.read_text().rpartition(') ')
      state, _, pgrp = fields.split()[:3]
      if int(pgrp) == leader and state != 'Z':
        alive.append(name)
  return alive


def wait_until_gone(leader: int) -> None:
  deadline = time.monotonic() + 10
  while alive := group(leader):
    assert time.monotonic() < deadline, alive
    time.sleep(0.05)


needs_proc = pytest.mark.skipif(
  not pathlib.Path('/proc/self/stat').exists(), reason='reads /proc'
)


@needs_proc
def test_readers_end_with_a_killed_program(prepared, tmp_path) -> None:
  memory = set(os.listdir('/dev/shm'))
  with start(prepared, tmp_path, 'sleep') as process:
    assert process.stdout.readline() == 'ready\n'
    assert len(group(process.pid)) >= 3
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    wait_until_gone(process.pid)
  assert set(os.listdir('/dev/shm')) <= memory


@needs_proc
def test_a_program_that_forgets_to_close_ends(prepared, tmp_path) -> None:
  with start(prepared, tmp_path, 'forget') as process:
    assert process.wait(30) == 0
    wait_until_gone(process.pid)


def test_a_signal_to_all_leaves_the_readers_to_the_program(
  prepared, tmp_path
) -> None:
  with start(prepared, tmp_path, 'ignore') as process:
    assert process.stdout.read() == 'ready\ndone\n'
    assert process.wait(30) == 0
