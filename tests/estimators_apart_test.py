"""Clipping trained by slopes of its own, beside the step of the weights."""

import functools

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from qat import evaluate
from qat import objective as objective_lib
from qat import step as step_lib
from qat.zo import perturb
from qat.zo import spsa
from tests import tiny

CLIPPED = {
  **tiny.EXACT,
  'optim.estimator': 'spsa',
  'optim.optimizer': 'sgd',
  'optim.clip_norm': 0.0,
  'optim.schedule': 'constant',
  'optim.warmup_steps': 0,
  'optim.peak_lr': 1e-3,
  'model.n_layers': 2,
  'zo.eps': 1e-3,
  'zo.clip': 0.0,
  'zo.quantizer_eps': 0.1,
  'quant.specs.integer.weight': 'lwc4',
  'zo.perturbed': '.*kernel',
  'zo.quantizer_lr': 5e-2,
  'optim.scales': '.*/clip_(high|low)',
}


@pytest.fixture(autouse=True, scope='module')
def quickly():
  with tiny.compiled_quickly():
    yield


@functools.cache
def program_of(fields=()):
  config = tiny.config('integer', {**CLIPPED, **dict(fields)})
  return step_lib.compile_program(config, tiny.mesh(config))


def after_one_step(program, state=None):
  """State and metrics, on the host."""
  batch = evaluate.put(tiny.batch(program.config), program.mesh)
  state = tiny.state(program) if state is None else state
  return jax.device_get(program.train_step(state, batch))


def by_path(tree):
  return {
    perturb.path_name(keys): leaf
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


@pytest.mark.slow
@pytest.mark.parametrize('scanned', [False, True])
def test_quantizers_have_slopes_of_their_own(scanned):
  """Both are measured where the step began, along their own directions."""
  form = (('model.scan_layers', scanned),)
  program = program_of(form)
  alone = program_of((*form, ('zo.quantizer_eps', 0.0)))
  first = tiny.state(program)
  before, rng = jax.device_get((first.params, first.rng))
  state, measured = after_one_step(program, first)
  other, without = after_one_step(alone)
  after, kept = by_path(state.params), by_path(other.params)
  start = by_path(before)
  names = {path for path in after if 'clip_' in path}
  # Of the others' step nothing changes, apart from the order of sums.
  assert measured['train/loss'] == pytest.approx(without['train/loss'], 1e-6)
  for path, leaf in after.items():
    if path in names:
      np.testing.assert_array_equal(kept[path], start[path])
    else:
      np.testing.assert_allclose(leaf, kept[path], rtol=0, atol=2e-5)
  # By whole trees.
  key = jax.random.fold_in(perturb.wrap_key(rng), 0)
  key = jax.random.fold_in(key, 2**32 - 2)
  (own,) = spsa.direction_keys(key, 1)
  z = by_path(perturb.direction(before, own, '.*/clip_(high|low)'))

  @jax.jit
  def loss(params):
    total, _ = objective_lib.loss_sum(
      program.model, program.config, program.mesh, params, batch
    )
    return total / batch['targets'].size

  batch = tiny.batch(program.config)
  two = [
    float(
      loss(
        jax.tree_util.tree_map_with_path(
          lambda keys, w, s=s: w + s * 0.1 * z[perturb.path_name(keys)], before
        )
      )
    )
    for s in (1, -1)
  ]
  slope = (two[0] - two[1]) / 0.2
  assert slope and measured['train/quantizer_slope'] == pytest.approx(
    abs(slope), rel=0.02
  )
  for path in names:
    expected = start[path] - 5e-2 * slope * z[path]
    moved = np.abs(expected - start[path]).max()
    np.testing.assert_allclose(after[path], expected, atol=0.02 * moved + 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize('broken', [True, False])
def test_nothing_moves_in_a_state_that_is_not_healthy(broken):
  """Nor where a loss is not finite."""
  program = program_of((('model.scan_layers', True),))
  state = tiny.state(program)
  if broken:
    params = jax.tree_util.tree_map_with_path(
      lambda keys, w: (
        w * jnp.nan if perturb.path_name(keys) == 'embed/embedding' else w
      ),
      state.params,
    )
    state = state._replace(params=params)
  else:
    state = state._replace(healthy=jnp.zeros_like(state.healthy))
  before = jax.device_get(state.params)
  after, measured = after_one_step(program, state)
  assert not measured['healthy'] and not after.step
  jax.tree.map(np.testing.assert_array_equal, after.params, before)
