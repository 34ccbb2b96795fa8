"""Tests of qat.main: what a user may get wrong ends with a message."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
TINY = '--config=configs/pquant.py:tiny'

# Arguments, and what the message must contain.
WRONG = {
  'misspelt field': (
    [TINY, '--config.optim.peek_lr=1'],
    ['peek_lr', 'peak_lr'],
  ),
  'wrong type': ([TINY, '--config.train.steps=abc'], ['train.steps', 'abc']),
  'no such size': (['--config=configs/pquant.py:huge'], ['huge', '300m']),
  'no such file': (['--config=configs/nope.py'], ['configs/nope.py']),
  'impossible': (
    [TINY, '--config.model.n_heads=5'],
    ['model.d_model=192', 'model.n_heads=5'],
  ),
  'branch at paper size': (
    ['--config=configs/pquant.py:1.3b', '--config.model.branch_width=100'],
    ['branch_width=100', '128'],
  ),
  'devices': ([TINY, '--config.mesh.data=3'], ['mesh.data=3']),
  'argument': ([TINY, 'surplus'], ['surplus']),
  'no such model': (
    [TINY, '--config.init.model=runs/nope'],
    ['config.init.model', 'runs/nope', 'scripts/import_model.py'],
  ),
}


# What is wrong with values is told in this process, too: config_test.
SLOW = ('wrong type', 'no such file', 'impossible', 'branch at paper size')


@pytest.mark.parametrize(
  'name',
  [
    pytest.param(name, marks=pytest.mark.slow if name in SLOW else ())
    for name in WRONG
  ],
)
def test_a_mistake_is_named_before_anything_is_written(name, tmp_path):
  arguments, parts = WRONG[name]
  done = subprocess.run(
    [
      sys.executable,
      '-m',
      'qat.main',
      f'--workdir={tmp_path / "w"}',
      *arguments,
    ],
    cwd=ROOT,
    env=dict(os.environ, XLA_FLAGS='', GLIBC_TUNABLES=''),
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    timeout=120,
    check=False,
  )
  assert done.returncode == 2, done.stdout
  assert 'Traceback' not in done.stdout
  for part in parts:
    assert part in done.stdout
  assert not (tmp_path / 'w').exists()
