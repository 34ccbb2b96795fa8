"""Tests of qat.train: whole runs, their ends, and that nothing is lost."""

import json
import os
import re
import signal
import time

import jax
import numpy as np
import pytest

from configs import pquant
from qat import config as config_lib
from qat import evaluate
from qat import flops
from qat import guard
from qat import lock
from qat import manifest
from qat import metrics
from qat import sharding
from qat import step as step_lib
from qat import train
from qat.data import prepare
from qat.infer import generate
from qat.infer import load
from tests import outcomes

STEPS = 8


@pytest.fixture(scope='module')
def cache_dir(tmp_path_factory):
  folder = tmp_path_factory.mktemp('data')
  prepare.ensure_embedded(folder, 512)
  return folder


@pytest.fixture(scope='module', autouse=True)
def one_program_per_config():
  """Compiles a config once for all tests of this file."""
  programs = {}
  original = step_lib.compile_program

  def cached(config, mesh, described):
    key = config_lib.to_json(config)
    if key not in programs:
      programs[key] = original(config, mesh, described)
    return programs[key]

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(step_lib, 'compile_program', cached)
    patch.setattr(flops, 'measured_peak', lambda: 1e12)
    yield


@pytest.fixture(autouse=True)
def one_device(request, monkeypatch):
  """Most runs use the first device alone: the others would only cost time."""
  if 'all_devices' not in request.keywords:
    monkeypatch.setattr(sharding, 'make_mesh', on_one_device)


def on_one_device(config, devices=None, make_mesh=sharding.make_mesh):
  del devices
  return make_mesh(config, jax.devices()[:1])


def small(cache_dir, module=pquant, **changes):
  config = module.get_config('tiny').unlock()
  config.model.update(
    d_model=32,
    n_heads=2,
    n_kv_heads=2,
    n_layers=2,
    d_ff=48,
    branch_width=16,
    vocab_size=512,
  )
  config.data.update(seq_len=16, batch_size=8, cache_dir=str(cache_dir))
  config.train.update(steps=STEPS, log_every=1, health_every=4)
  config.optim.warmup_steps = 2
  config.eval.update(every=4, batch_size=8, batches=4)
  config.checkpoint.update(every=3, keep_last=2)
  config.sensitivity.sequences = 2
  config.sample.tokens = 4
  config.update_from_flattened_dict(changes)
  return config.lock()


@pytest.fixture(scope='module')
def complete(cache_dir, tmp_path_factory):
  """A run that was never interrupted."""
  workdir = tmp_path_factory.mktemp('runs') / 'complete'
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sharding, 'make_mesh', on_one_device)
    assert train.run(small(cache_dir), workdir) == 0
  return workdir


def stop_at(monkeypatch, stop: int) -> None:
  monkeypatch.setattr(
    train,
    '_stop_requested',
    lambda _, step: 'SIGTERM' if step == stop else None,
  )


def test_a_run_leaves_its_files(complete):
  for name in (
    'config.json',
    'metrics.jsonl',
    'summary.json',
    'samples.jsonl',
    'report.html',
    f'sensitivity/{STEPS}.json',
    f'checkpoints/{STEPS}/manifest.json',
  ):
    assert (complete / name).stat().st_size > 0
  assert any((complete / 'tensorboard').iterdir())


def test_a_run_logs_what_it_should(complete):
  rows = metrics.read(complete)
  keys = {key for row in rows for key in row}
  for key in (
    'train/loss',
    'train/lr',
    'train/weight_decay',
    'train/grad_norm',
    'train/param_norm',
    'train/tokens_per_s',
    'train/flops_share',
    'eval/bits_per_byte',
    'health/flips/block_0/attn/q',
    'health/scale/block_1/ffn/narrow/down',
    'health/alpha/block_0',
    'health/beta/block_1',
    'sensitivity/latent/gini/block_0/attn/q',
    'sensitivity/quantized/top1/block_1/ffn/wide/up',
  ):
    assert key in keys, key
  steps = [row['step'] for row in rows if 'train/loss' in row]
  assert steps == list(range(1, STEPS + 1))
  summary = json.loads((complete / 'summary.json').read_text())
  assert 0 < summary['eval/bits_per_byte'] < 9
  assert summary['baseline/gzip_bits_per_byte'] > 1
  assert summary['tokens'] == STEPS * 8 * 16


@pytest.mark.parametrize('stop', [pytest.param(1, marks=pytest.mark.slow), 4])
def test_stopped_and_resumed_equals_uninterrupted(
  stop, complete, cache_dir, tmp_path, monkeypatch
):
  config = small(cache_dir)
  with monkeypatch.context() as patch:
    stop_at(patch, stop)
    patch.setattr(guard.Interrupts, 'exit_code', lambda _: 143)
    assert train.run(config, tmp_path / 'run') == 143
  assert train.run(config, tmp_path / 'run') == 0
  assert outcomes.outcome(tmp_path / 'run') == outcomes.outcome(complete)


@pytest.mark.slow
def test_a_run_with_scanned_layers_leaves_what_others_leave(
  complete, cache_dir, tmp_path, monkeypatch
):
  changes = {'model.scan_layers': True, 'model.remat': 'dots'}
  config = small(cache_dir, **changes)
  with monkeypatch.context() as patch:
    stop_at(patch, 4)
    patch.setattr(guard.Interrupts, 'exit_code', lambda _: 143)
    assert train.run(config, tmp_path) == 143
  assert train.run(config, tmp_path) == 0
  keys, expected = (
    {key for row in metrics.read(run) for key in row}
    for run in (tmp_path, complete)
  )
  assert keys == expected and 'health/flips/block_1/attn/q' in keys
  names = (f'sensitivity/{STEPS}.json', 'samples.jsonl', 'report.html')
  assert all((tmp_path / name).exists() for name in names)
  rows, others = (
    json.loads((run / names[0]).read_text()) for run in (tmp_path, complete)
  )
  assert list(rows) == list(others)
  run = load.load_run(tmp_path)
  assert not run.config.model.scan_layers and run.step == STEPS
  assert 'block_1' in run.params and 'blocks' not in run.params
  options = dict(temperature=0.0, top_k=0, top_p=1.0, seed=0, stop=-1)
  assert (
    len(
      list(generate.generate(run.model, run.params, [1], tokens=3, **options))
    )
    == 3
  )


def test_a_finished_run_can_be_started_again(complete):
  before = outcomes.outcome(complete)
  config = config_lib.load(complete)
  (complete / 'summary.json').unlink()
  assert train.run(config, complete) == 0
  assert outcomes.outcome(complete) == before
  assert (complete / 'summary.json').exists()


def test_another_config_is_refused_with_a_diff(complete, cache_dir):
  changed = small(cache_dir, **{'optim.peak_lr': 0.5, 'train.log_every': 2})
  with pytest.raises(config_lib.ConfigError, match='optim.peak_lr') as error:
    train.run(changed, complete)
  assert 'log_every:' not in str(error.value)
  assert '0.5' in str(error.value)


def test_a_damaged_checkpoint_falls_back(
  complete, cache_dir, tmp_path, monkeypatch
):
  config = small(cache_dir)
  with monkeypatch.context() as patch:
    stop_at(patch, 7)
    patch.setattr(guard.Interrupts, 'exit_code', lambda _: 143)
    train.run(config, tmp_path)
  damaged = tmp_path / 'checkpoints/7/manifest.json'
  damaged.write_text(damaged.read_text()[:-9])
  assert train.run(config, tmp_path) == 0
  assert outcomes.outcome(tmp_path) == outcomes.outcome(complete)
  assert (tmp_path / 'checkpoints/7.corrupt').exists()


@pytest.mark.parametrize(
  'scan', [pytest.param(False, marks=pytest.mark.slow), True]
)
def test_a_loss_that_is_not_finite_stops_the_run(cache_dir, tmp_path, scan):
  changes = {'optim.peak_lr': 1e38, 'checkpoint.every': 1}
  config = small(cache_dir, **changes, **{'model.scan_layers': scan})
  with pytest.raises(train.NonFiniteError, match='The first that') as error:
    train.run(config, tmp_path)
  bad = int(re.search(r'Step (\d+)', str(error.value))[1])
  steps = manifest.steps(tmp_path / 'checkpoints')
  assert steps
  assert max(steps) < bad


def test_a_second_writer_is_refused(cache_dir, tmp_path):
  config = small(cache_dir)
  with lock.hold(tmp_path), pytest.raises(lock.LockedError):
    train.run(config, tmp_path)


def test_a_vocabulary_too_small_is_refused(cache_dir, tmp_path):
  data = cache_dir / 'austen-512'
  config = small(
    cache_dir, **{'data.dataset': str(data), 'model.vocab_size': 300}
  )
  with pytest.raises(config_lib.ConfigError, match='512'):
    train.run(config, tmp_path / 'run')


@pytest.mark.slow
def test_ternary_layers_log_their_zeros(cache_dir, tmp_path):
  from configs import bitnet_b158

  config = small(cache_dir, bitnet_b158, **{'train.steps': 4})
  assert train.run(config, tmp_path) == 0
  zeros = [
    value
    for row in metrics.read(tmp_path)
    for key, value in row.items()
    if key.startswith('health/zeros/')
  ]
  assert zeros
  assert all(0 < share < 1 for share in zeros)


@pytest.mark.slow
@pytest.mark.all_devices
def test_parameters_may_be_split(cache_dir, tmp_path):
  changes = {'train.steps': 4, 'mesh.data': 4, 'mesh.fsdp': 2}
  assert train.run(small(cache_dir, **changes), tmp_path) == 0
  assert (tmp_path / 'report.html').exists()


def test_a_signal_during_an_evaluation_saves_at_once(
  complete, cache_dir, tmp_path, monkeypatch
):
  evaluate_fully = evaluate.evaluate

  def interrupted(*args):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.5)
    return evaluate_fully(*args)

  config = small(cache_dir)
  with monkeypatch.context() as patch:
    patch.setattr(evaluate, 'evaluate', interrupted)
    assert train.run(config, tmp_path) == 143
  assert manifest.steps(tmp_path / 'checkpoints')[-1] == 4
  assert not any('eval/loss' in row for row in metrics.read(tmp_path))
  # What it kept from being measured is measured first; again it may come.
  with monkeypatch.context() as patch:
    patch.setattr(evaluate, 'evaluate', interrupted)
    assert train.run(config, tmp_path) == 143
  assert manifest.steps(tmp_path / 'checkpoints')[-1] == 4
  assert train.run(config, tmp_path) == 0
  assert outcomes.outcome(tmp_path) == outcomes.outcome(complete)


def test_a_run_cannot_become_shorter_than_it_is(
  cache_dir, tmp_path, monkeypatch
):
  with monkeypatch.context() as patch:
    stop_at(patch, 5)
    patch.setattr(guard.Interrupts, 'exit_code', lambda _: 143)
    assert train.run(small(cache_dir), tmp_path) == 143
  shorter = small(cache_dir, **{'train.steps': 4})
  with pytest.raises(config_lib.ConfigError, match='stands at step 5'):
    train.run(shorter, tmp_path)


@pytest.mark.slow
def test_experts_log_their_load(cache_dir, tmp_path):
  changes = {'train.steps': 4, 'model.n_experts': 2}
  assert train.run(small(cache_dir, **changes), tmp_path) == 0
  rows = [row for row in metrics.read(tmp_path) if _LOAD in row]
  assert rows
  for row in rows:
    other = row[_LOAD[:-1] + '1']
    assert row[_LOAD] + other == pytest.approx(1)
    assert 0 <= row['health/router_entropy/block_0'] <= np.log(2) + 1e-6


_LOAD = 'health/expert_load/block_0/0'


def test_data_that_do_not_fit_are_the_users_to_mend(cache_dir, tmp_path):
  config = small(cache_dir, **{'data.batch_size': 8 * 10**6})
  with pytest.raises(config_lib.ConfigError, match='8000000'):
    train.run(config, tmp_path)
