"""The restart that sets glibc's tunables, in processes of its own."""

import os
import pathlib
import platform
import subprocess
import sys

import pytest

from qat import launch

ROOT = pathlib.Path(launch.__file__).parents[1]
PROGRAM = """
import os, sys
print('begin', flush=True)
from qat import launch
launch.tune_malloc()
print(os.environ['GLIBC_TUNABLES'], *sys.argv, sep='|')
"""


glibc = pytest.mark.skipif(
  platform.libc_ver()[0] != 'glibc', reason='only glibc has tunables'
)
on_cpu = pytest.mark.skipif(
  any(pathlib.Path('/dev', name).exists() for name in launch.ACCELERATORS),
  reason='an accelerator is here',
)


def run(folder: pathlib.Path, tunables: str | None) -> list[str]:
  """The lines that PROGRAM prints, given two arguments."""
  file = folder / 'a program.py'
  file.write_text(PROGRAM)
  environment = {
    k: v for k, v in os.environ.items() if k != 'GLIBC_TUNABLES'
  } | {'PYTHONPATH': str(ROOT)}
  if tunables is not None:
    environment['GLIBC_TUNABLES'] = tunables
  done = subprocess.run(
    [sys.executable, '-u', '-X', 'utf8', str(file), 'a b', '--c=d'],
    env=environment,
    capture_output=True,
    text=True,
    check=True,
    timeout=60,
  )
  return done.stdout.splitlines()


@glibc
@on_cpu
def test_it_starts_the_program_anew_once_with_the_same_arguments(tmp_path):
  *begins, last = run(tmp_path, None)
  assert begins == ['begin', 'begin']
  file = str(tmp_path / 'a program.py')
  assert last == '|'.join([launch.MALLOC, file, 'a b', '--c=d'])


@pytest.mark.parametrize('tunables', ['', 'glibc.malloc.arena_max=2'])
def test_it_leaves_what_the_user_has_set(tmp_path, tunables):
  lines = run(tmp_path, tunables)
  assert lines[0] == 'begin' and len(lines) == 2
  assert lines[1].split('|')[0] == tunables


@pytest.mark.parametrize(
  ('libc', 'device'), [('libSystem', False), ('glibc', True)]
)
def test_it_does_nothing_elsewhere(monkeypatch, libc, device):
  def refuse(*_):
    raise AssertionError('started anew')

  monkeypatch.delenv('GLIBC_TUNABLES', raising=False)
  monkeypatch.setattr(platform, 'libc_ver', lambda: (libc, ''))
  monkeypatch.setattr(pathlib.Path, 'exists', lambda _: device)
  monkeypatch.setattr(os, 'execv', refuse)
  launch.tune_malloc()
  assert 'GLIBC_TUNABLES' not in os.environ


def test_glibc_knows_every_tunable():
  loader = pathlib.Path('/lib64/ld-linux-x86-64.so.2')
  if not loader.exists():
    pytest.skip('no glibc loader that lists its tunables')
  done = subprocess.run(
    [loader, '--list-tunables'], capture_output=True, text=True, check=False
  )
  if done.returncode:
    pytest.skip('this glibc cannot list its tunables')
  known = {line.split(':')[0] for line in done.stdout.splitlines()}
  for setting in launch.MALLOC.split(':'):
    assert setting.split('=')[0] in known


def test_factorizations_get_one_thread_unless_it_is_set(monkeypatch):
  monkeypatch.delenv('OPENBLAS_NUM_THREADS', raising=False)
  launch.one_blas_thread()
  assert os.environ['OPENBLAS_NUM_THREADS'] == '1'
  monkeypatch.setenv('OPENBLAS_NUM_THREADS', '3')
  launch.one_blas_thread()
  assert os.environ['OPENBLAS_NUM_THREADS'] == '3'


KEEPS = """
import numpy as np
from qat import launch

def resident():
  return int(open('/proc/self/statm').read().split()[1]) // 256  # MiB

pieces = [np.ones(1 << 17) for _ in range(200)]  # 1 MiB each
last = np.ones(1 << 17)  # Behind it nothing can be given back otherwise.
before = resident()
del pieces
kept = resident()
launch.trim()
print(before - kept, kept - resident())
"""


@glibc
def test_freed_memory_is_given_back():
  found = subprocess.run(
    [sys.executable, '-c', KEEPS],
    env=os.environ | {'GLIBC_TUNABLES': launch.MALLOC, 'PYTHONPATH': str(ROOT)},
    capture_output=True,
    text=True,
    check=True,
  )
  at_once, then = map(int, found.stdout.split())
  assert at_once < 20 and then > 180
