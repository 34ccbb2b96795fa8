"""Tests of qat.train from outside: signals, and kill -9 at any moment."""

import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time

import pytest

from qat import manifest
from tests import outcomes
from tests import tiny


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  return tiny.dataset(tmp_path_factory.mktemp('data'))


def command(workdir, *changes) -> list[str]:
  return [
    sys.executable,
    '-m',
    'qat.main',
    '--config=configs/pquant.py:tiny',
    f'--workdir={workdir}',
    *(f'--config.{change}' for change in changes),
  ]


@pytest.fixture(scope='module')
def environment():
  """One device, and the root of the project as the working folder."""
  flags = os.environ['XLA_FLAGS'].split()
  flags = [flag for flag in flags if 'device_count' not in flag]
  variables = dict(os.environ, XLA_FLAGS=' '.join(flags))
  root = pathlib.Path(__file__).parent.parent
  return dict(env=variables, cwd=root, text=True, capture_output=True)


def test_sigterm_saves_and_leaves_with_143(data, tmp_path, environment):
  environment = {k: v for k, v in environment.items() if k != 'capture_output'}
  changes = (f'data.dataset={data}', 'model.vocab_size=280')
  process = subprocess.Popen(
    command(tmp_path, *changes, 'model.n_layers=1', 'train.log_every=1'),
    **environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
  )
  for line in process.stdout:
    if 'step   3' in line:
      process.send_signal(signal.SIGTERM)
      break
  rest = process.communicate(timeout=60)[0]
  assert process.returncode == 143, rest
  saved = manifest.steps(tmp_path / 'checkpoints')
  assert saved
  assert f'step {saved[-1]} is saved' in rest


@pytest.mark.slow
def test_killed_ten_times_equals_uninterrupted(data, tmp_path, environment):
  changes = (
    f'data.dataset={data}',
    'model.vocab_size=280',
    'train.steps=60',
    'train.log_every=1',
    'checkpoint.every=2',
    'data.batch_size=8',
    'sensitivity.sequences=1',
    'optim.warmup_steps=10',
  )
  whole, killed = tmp_path / 'whole', tmp_path / 'killed'
  done = subprocess.run(command(whole, *changes), **environment, check=False)
  assert done.returncode == 0, done.stderr
  rng = random.Random(0)
  environment = {k: v for k, v in environment.items() if k != 'capture_output'}
  at = sorted(rng.sample(range(2, 58), 10))
  for step in at:
    process = subprocess.Popen(
      command(killed, *changes),
      **environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
    )
    log = ''
    for line in process.stdout:
      log += line
      found = re.match(r'step +(\d+)/', line)
      if found and int(found[1]) >= step:
        time.sleep(rng.random() * 0.3)  # Into the next step, or a save.
        process.kill()
        break
    process.communicate()
    assert process.returncode == -signal.SIGKILL, log
  done = subprocess.run(
    command(killed, *changes), **environment, capture_output=True, check=False
  )
  assert done.returncode == 0, done.stderr
  assert outcomes.outcome(killed) == outcomes.outcome(whole)
