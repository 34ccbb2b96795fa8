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


@pytest.fixture(scope='module')
def answers(tmp_path_factory):
  """Runs all of `WRONG`, two at a time: most of a run is importing."""
  folder = tmp_path_factory.mktemp('main')
  variables = dict(os.environ, XLA_FLAGS='', GLIBC_TUNABLES='')
  found, left = {}, dict(WRONG)
  while left:
    pair = [left.popitem() for _ in range(min(2, len(left)))]
    processes = [
      subprocess.Popen(
        [sys.executable, '-m', 'qat.main', f'--workdir={folder / name}', *args],
        cwd=ROOT,
        env=variables,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
      )
      for name, (args, _) in pair
    ]
    for (name, _), process in zip(pair, processes, strict=True):
      output = process.communicate(timeout=120)[0]
      found[name] = process.returncode, output, (folder / name).exists()
  return found


@pytest.mark.parametrize('name', WRONG)
def test_a_mistake_is_named_before_anything_is_written(name, answers):
  code, output, exists = answers[name]
  assert code == 2, output
  assert 'Traceback' not in output
  for part in WRONG[name][1]:
    assert part in output
  assert not exists
