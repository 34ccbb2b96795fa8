"""Whole runs without a backward pass: ended and resumed, gone wrong."""

import json

import jax
import pytest

from qat import flops
from qat import guard
from qat import manifest
from qat import metrics
from qat import sharding
from qat import train
from qat.data import prepare
from qat.infer import generate
from qat.infer import load
from tests import outcomes
from tests import tiny

pytestmark = pytest.mark.slow

FIELDS = {
  'model.vocab_size': 512,
  'model.n_layers': 2,
  'model.scan_layers': True,
  'model.remat': 'block',
  'optim.estimator': 'spsa',
  'optim.optimizer': 'sgd',
  'optim.clip_norm': 0.0,
  'optim.warmup_steps': 1,
  'zo.perturbed': r'.*/kernel',
  'zo.master': 'bfloat16',
  'train.steps': 5,
  'train.log_every': 1,
  'train.health_every': 2,
  'eval.every': 4,
  'eval.batches': 2,
  'checkpoint.every': 2,
  'sensitivity.sequences': 2,
  'sample.tokens': 4,
}


@pytest.fixture(scope='module')
def cache_dir(tmp_path_factory):
  folder = tmp_path_factory.mktemp('data')
  prepare.ensure_embedded(folder, 512)
  return folder


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
  make_mesh = sharding.make_mesh
  monkeypatch.setattr(
    sharding,
    'make_mesh',
    lambda config, devices=None: make_mesh(
      config, (devices or jax.devices())[:1]
    ),
  )
  monkeypatch.setattr(flops, 'measured_peak', lambda: 1e12)


def configured(cache_dir, **changes):
  fields = {**FIELDS, 'data.cache_dir': str(cache_dir), **changes}
  return tiny.config('integer', fields)


def stopped_at(patch, stop):
  patch.setattr(
    train,
    '_stop_requested',
    lambda _, step: 'SIGTERM' if step == stop else None,
  )
  patch.setattr(guard.Interrupts, 'exit_code', lambda _: 143)


def test_a_stopped_and_resumed_run_equals_an_uninterrupted_one(
  cache_dir, tmp_path, monkeypatch
):
  config = configured(cache_dir)
  whole, parts = tmp_path / 'whole', tmp_path / 'parts'
  with tiny.compiled_quickly():
    assert train.run(config, whole) == 0
    with monkeypatch.context() as patch:
      stopped_at(patch, 3)
      assert train.run(config, parts) == 143
    assert train.run(config, parts) == 0
  assert outcomes.outcome(parts) == outcomes.outcome(whole)
  rows = metrics.read(whole)
  keys = {key for row in rows for key in row}
  logged = {'train/loss', 'train/slope', 'train/clipped', 'train/lr'}
  assert logged | {'eval/loss', 'health/flips/block_1/attn/q'} <= keys
  assert 'train/grad_norm' not in keys
  assert len({row['train/slope'] for row in rows if 'train/slope' in row}) == 5
  assert 'Slope along' in (whole / 'report.html').read_text()
  assert json.loads((whole / 'summary.json').read_text())['eval/loss'] < 8
  run = load.load_run(whole)
  options = dict(temperature=0.0, top_k=0, top_p=1.0, seed=0, stop=-1)
  tokens = generate.generate(run.model, run.params, [1], tokens=3, **options)
  assert len(list(tokens)) == 3


def test_a_loss_that_is_not_finite_stops_the_run(cache_dir, tmp_path):
  changes = {'zo.clip': 0.0, 'optim.peak_lr': 1e36, 'zo.master': 'float32'}
  config = configured(cache_dir, **changes, **{'checkpoint.every': 1})
  with (
    tiny.compiled_quickly(),
    pytest.raises(
      train.NonFiniteError, match=r'slope nan\..*lower config\.zo\.eps'
    ),
  ):
    train.run(config, tmp_path)
  assert manifest.steps(tmp_path / 'checkpoints')
