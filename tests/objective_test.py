"""The loss of choices against a textbook softmax, with its gradient."""

import functools

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from qat import objective
from qat import sharding
from qat import step as step_lib
from qat.nn import transformer
from tests import tiny

FIELDS = {
  **tiny.EXACT,
  'data.task': 'some',
  'data.task_choices': 3,
  'data.batch_size': 12,
  'optim.warmup_steps': 0,
  'optim.weight_decay': 0.0,
}
DOCUMENTS = 4


@pytest.fixture(autouse=True, scope='module')
def quickly():
  with tiny.compiled_quickly():
    yield


def make_batch(config):
  """Four documents; the last two have two choices."""
  rng = np.random.default_rng(0)
  batch = tiny.batch(config)
  weights = np.zeros(batch['tokens'].shape, np.float32)
  for row in weights:
    scored = int(rng.integers(1, 6))
    row[9 - scored : 9] = 1 / scored
  right = np.zeros((3, DOCUMENTS), np.float32)
  right[[1, 0, 1, 0], range(DOCUMENTS)] = 1
  weights[-2:] = 0
  return {**batch, 'weights': weights, 'right': right.reshape(-1)}


def slow(model, batch, params):
  """Log-softmax of logits, means of continuations, log-softmax of these."""
  logits, _ = model.apply({'params': params}, batch['tokens'], method='logits')
  log_p = jax.nn.log_softmax(logits)
  losses = []
  for d in range(DOCUMENTS):
    means = []
    for c in range(3):
      row = c * DOCUMENTS + d
      scored = np.flatnonzero(batch['weights'][row])
      if scored.size:
        targets = batch['targets'][row][scored]
        means.append(jnp.mean(log_p[row, scored, targets]))
      if batch['right'][row]:
        right = c
    losses.append(-jax.nn.log_softmax(jnp.stack(means))[right])
  return jnp.mean(jnp.stack(losses))


@functools.cache
def expected():
  config = tiny.config('fp', FIELDS)
  model = transformer.build(config, 'cpu', 1)
  params = jax.jit(step_lib.initial_state(config, model))().params
  # Apart from log 3: as if something had been learnt.
  params = jax.tree.map(lambda w: 3 * w, params)
  batch = make_batch(config)
  value_and_grad = jax.value_and_grad(functools.partial(slow, model, batch))
  return params, batch, *jax.jit(value_and_grad)(params)


@pytest.mark.parametrize('devices', [1, 2])
def test_a_softmax_over_choices_and_its_gradient(devices):
  params, batch, value, slow_grads = expected()
  config = tiny.config('fp', FIELDS)
  mesh = tiny.mesh(config, devices)
  model = transformer.build(config, 'cpu', devices)
  with jax.set_mesh(mesh):
    minimized = objective.make(config, model, mesh)
    (number, (loss, _)), grads = jax.jit(
      jax.value_and_grad(lambda p: minimized(p, batch, None), has_aux=True)
    )(params)
  np.testing.assert_allclose(loss, value, rtol=1e-5)
  np.testing.assert_allclose(number, value, rtol=1e-5)
  assert abs(value - np.log(3)) > 0.05
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      a, b, rtol=2e-3, atol=1e-5 * np.abs(b).max() + 1e-9
    ),
    jax.device_get(grads),
    jax.device_get(slow_grads),
  )


@pytest.mark.parametrize(
  ('estimator', 'micro_batches'),
  [
    ('backprop', 2),
    pytest.param('spsa', 1, marks=pytest.mark.slow),
    ('spsa', 4),
  ],
)
def test_a_step_reports_the_loss_of_choices(estimator, micro_batches):
  params, batch, value, _ = expected()
  fields = {'optim.estimator': estimator, 'optim.accumulate': micro_batches}
  if estimator == 'spsa':
    fields |= {'optim.optimizer': 'sgd', 'optim.clip_norm': 0.0}
    fields |= {'zo.eps': 1e-5}  # The mean to both sides is that of no move.
  config = tiny.config('fp', {**FIELDS, **fields})
  model = transformer.build(config, 'cpu', 1)
  mesh = tiny.mesh(config)
  with jax.set_mesh(mesh):
    state = jax.jit(step_lib.initial_state(config, model))()
    state = state._replace(params=params)
    step = jax.jit(step_lib.make_train_step(config, model, mesh))
    after, measured = step(state, batch)
  np.testing.assert_allclose(measured['train/loss'], value, rtol=1e-4)
  assert measured['healthy']
  names = {k: v.shape for k, v in step_lib.abstract_batch(config, mesh).items()}
  assert names == {k: v.shape for k, v in batch.items()}
  moved = jax.tree.map(lambda a, b: np.any(a != b), after.params, params)
  assert any(jax.tree.leaves(moved))


def test_rows_are_computed_where_they_are():
  config = tiny.config('fp', {})
  mesh = tiny.mesh(config, 4)
  rows = np.arange(8.0, dtype=np.float32)
  double = sharding.over_batch(mesh, lambda a: 2 * a, (True,), summed=False)
  with jax.set_mesh(mesh):
    np.testing.assert_array_equal(jax.jit(double)(rows), 2 * rows)
