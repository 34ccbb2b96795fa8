"""Perplexity and bits per byte of models whose loss is known."""

import math

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from qat import evaluate
from qat.data import dataset as dataset_lib
from qat.data import loader
from qat.nn import transformer
from tests import tiny

FIELDS = {**tiny.EXACT, 'model.vocab_size': 300}  # More than the tokenizer's.


@pytest.fixture(scope='module')
def dataset(tmp_path_factory):
  folder = tmp_path_factory.mktemp('data')
  return dataset_lib.open_dataset(tiny.dataset(folder))


@pytest.fixture(autouse=True, scope='module')
def quickly():
  with tiny.compiled_quickly():
    yield


def make(method, fields=None, devices=1):
  """Config, mesh, model, parameters, eval step."""
  config = tiny.config(method, {**FIELDS, **(fields or {})})
  mesh = tiny.mesh(config, devices)
  model = transformer.build(config, 'cpu', devices)
  with jax.set_mesh(mesh):
    params = tiny.params(model)
  return (
    config,
    mesh,
    model,
    params,
    evaluate.make_eval_step(config, model, mesh),
  )


def valid_batches(config, dataset):
  return list(
    loader.EvalBatches(
      dataset.path,
      seq_len=config.data.seq_len,
      batch_size=config.eval.batch_size,
      batches=config.eval.batches,
      process_index=0,
      process_count=1,
    )
  )


def test_a_uniform_model_has_the_bits_of_its_vocabulary(dataset):
  config, mesh, _, params, eval_step = make('bitnet')
  # All logits are 0.
  params['embed']['embedding'] = jnp.zeros_like(params['embed']['embedding'])
  found = evaluate.evaluate(eval_step, params, config, dataset, mesh)
  valid = dataset.manifest['splits']['valid']
  expected = valid['tokens'] * math.log2(300) / valid['bytes']
  np.testing.assert_allclose(found['eval/loss'], math.log(300), rtol=1e-6)
  np.testing.assert_allclose(found['eval/perplexity'], 300, rtol=1e-5)
  np.testing.assert_allclose(found['eval/bits_per_byte'], expected, rtol=1e-6)


def test_the_loss_is_the_mean_over_every_token_once(dataset):
  config, mesh, model, params, eval_step = make('pquant')
  logits = jax.jit(
    lambda tokens: model.apply({'params': params}, tokens, method='logits')[0]
  )
  nats, tokens, size = 0.0, 0, 0
  for batch in valid_batches(config, dataset):
    log_p = jax.nn.log_softmax(np.asarray(logits(batch['tokens']), np.float64))
    for row in range(8):
      for t in range(16):
        if batch['weights'][row, t]:
          target = batch['targets'][row, t]
          nats -= float(log_p[row, t, target])
          tokens += 1
          size += int(dataset.token_bytes[target])
  assert tokens == dataset.manifest['splits']['valid']['tokens']
  assert tokens % (8 * 16), 'No padding: this test sees less than it should.'
  found = evaluate.evaluate(eval_step, params, config, dataset, mesh)
  np.testing.assert_allclose(found['eval/loss'], nats / tokens, rtol=1e-5)
  np.testing.assert_allclose(
    found['eval/bits_per_byte'], nats / math.log(2) / size, rtol=1e-5
  )


def test_what_has_no_weight_does_not_count(dataset):
  config, mesh, _, params, eval_step = make('fp')
  token_bytes = jnp.asarray(dataset.token_bytes, jnp.float32)
  batch = valid_batches(config, dataset)[0]
  batch['weights'][3:] = 0
  batch['weights'][:, 10:] = 0
  other = {name: rows.copy() for name, rows in batch.items()}
  rng = np.random.default_rng(0)
  for name in ('tokens', 'targets'):  # Later tokens do not change earlier ones.
    other[name][3:] = rng.integers(0, 280, (5, 16))
    other[name][:, 10:] = rng.integers(0, 280, (8, 6))
  sums, others = (
    eval_step(params, evaluate.put(b, mesh), token_bytes)
    for b in (batch, other)
  )
  np.testing.assert_allclose(sums, others, rtol=1e-6)
  assert sums.tokens == 30
  targets = batch['targets'][:3, :10]
  assert sums.bytes == dataset.token_bytes[targets].sum()


@pytest.mark.parametrize('batches', [1, 2, 10_000])
def test_batches_bound_the_evaluation(dataset, batches):
  config, mesh, _, params, _ = make('fp', {'eval.batches': batches})
  seen = []

  def eval_step(params, batch, token_bytes):
    del params, token_bytes
    seen.append(jax.device_get(batch['tokens']))
    return evaluate.Sums(*map(jnp.float32, (1.0, 1.0, 1.0)))

  evaluate.evaluate(eval_step, params, config, dataset, mesh)
  every = valid_batches(tiny.config('fp', FIELDS), dataset)
  assert len(seen) == min(batches, len(every))
  for found, expected in zip(seen, every, strict=False):
    np.testing.assert_array_equal(found, expected['tokens'])


@pytest.mark.parametrize(
  'fields',
  [
    pytest.param({'mesh.data': 8}, marks=pytest.mark.slow),
    {'mesh.data': 2, 'mesh.fsdp': 4},
  ],
)
def test_a_mesh_finds_what_one_device_finds(dataset, fields):
  config, mesh, _, params, eval_step = make('bitnet')
  expected = evaluate.evaluate(eval_step, params, config, dataset, mesh)
  config, mesh, _, params, eval_step = make('bitnet', fields, devices=8)
  found = evaluate.evaluate(eval_step, params, config, dataset, mesh)
  assert found.keys() == expected.keys()
  for key, value in expected.items():
    # A code on the edge may round to its other side, see step_test.
    np.testing.assert_allclose(found[key], value, rtol=1e-4, err_msg=key)


def test_the_progress_tells_the_time_left(dataset, capsys, monkeypatch):
  config, mesh, _, params, eval_step = make('fp', {'eval.batches': 3})
  monkeypatch.setattr(evaluate.progress, 'LINE_EVERY_S', 0.0)
  expected = evaluate.evaluate(eval_step, params, config, dataset, mesh)
  assert not capsys.readouterr().err
  found = evaluate.evaluate(
    eval_step, params, config, dataset, mesh, label='held-out'
  )
  assert found == expected
  first, second, third, last = capsys.readouterr().err.splitlines()
  assert first.startswith('held-out:  33%, 1 of 3 batches, ')
  assert second.startswith('held-out:  67%, 2 of 3 batches, ')
  assert second.endswith(' left')
  assert third == 'held-out: 100%, 3 of 3 batches'
  assert last.startswith(third)


def test_a_hopeless_model_has_a_finite_perplexity(dataset):
  config, mesh, _, params, _ = make('fp')
  step = lambda *_: evaluate.Sums(*map(jnp.float32, (1e6, 1, 1)))  # noqa: E731
  found = evaluate.evaluate(step, params, config, dataset, mesh)
  assert math.isfinite(found['eval/perplexity'])
