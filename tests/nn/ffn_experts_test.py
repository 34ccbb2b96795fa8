"""Layers with experts: routing, what it learns from, and its two forms."""

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from tests import ffn_layers


@pytest.mark.parametrize('gate_probability', [False, True])
def test_equal_experts_are_one_branch(gate_probability):
  module, params, x_BTD = ffn_layers.layer(n_experts=1)
  many, _, _ = ffn_layers.layer(n_experts=8, gate_probability=gate_probability)
  stacked = {
    name: {**linear, 'kernel': jnp.stack([linear['kernel']] * 8)}
    for name, linear in params['narrow'].items()
  }
  router = jnp.asarray(ffn_layers.normal(32, 8))
  y_many = ffn_layers.run(
    many, {**params, 'narrow': stacked, 'router': router}, x_BTD
  )
  if not gate_probability:
    expected = ffn_layers.run(module, params, x_BTD)
  else:
    # Scaled by p: the rest of the layer is what alpha = 0 leaves.
    wide = ffn_layers.run(module, {**params, 'alpha': jnp.zeros(())}, x_BTD)
    narrow = ffn_layers.run(module, {**params, 'beta': jnp.zeros(())}, x_BTD)
    p_BTE = ffn_layers.router_of({**params, 'router': router}, x_BTD)
    expected = wide + narrow * p_BTE.max(-1, keepdims=True)
  np.testing.assert_allclose(y_many, expected, rtol=1e-4, atol=1e-5)


def test_a_token_reads_its_expert_and_no_other():
  module, params, x_BTD = ffn_layers.layer(n_experts=4)
  expert_BT = ffn_layers.router_of(params, x_BTD).argmax(-1)
  y = ffn_layers.run(module, params, x_BTD)
  for i in range(4):
    changed = jax.tree.map(lambda p: p, params)
    for linear in changed['narrow'].values():
      linear['kernel'] = linear['kernel'].at[i].multiply(-3)
    moved = np.any(ffn_layers.run(module, changed, x_BTD) != y, axis=-1)
    np.testing.assert_array_equal(moved, expert_BT == i)
  assert len(np.unique(expert_BT)) > 1


def test_an_expert_learns_from_its_tokens_alone():
  module, params, x_BTD = ffn_layers.layer(n_experts=4)
  expert_BT = ffn_layers.router_of(params, x_BTD).argmax(-1)
  used, unused = expert_BT[0, 0], set(range(4)) - set(np.ravel(expert_BT))
  dy = ffn_layers.normal(*x_BTD.shape, seed=9)
  whole, mine, others = (
    ffn_layers.gradients(module, params, x_BTD, dy * tokens[..., None])[
      'narrow'
    ]
    for tokens in (expert_BT >= 0, expert_BT == used, expert_BT != used)
  )
  for name in ('gate', 'up', 'down'):
    kernel = whole[name]['kernel']
    size = np.abs(kernel[used]).max()
    assert size > 0
    np.testing.assert_allclose(
      kernel[used], mine[name]['kernel'][used], atol=1e-6 * size
    )
    np.testing.assert_array_equal(others[name]['kernel'][used], 0)
    for i in unused:
      np.testing.assert_array_equal(kernel[i], 0)


def test_the_router_learns_by_its_probability_alone():
  for gate_probability in (True, False):
    module, params, x_BTD = ffn_layers.layer(
      n_experts=4, gate_probability=gate_probability
    )
    dy = ffn_layers.normal(*x_BTD.shape, seed=9)
    gradient = ffn_layers.gradients(module, params, x_BTD, dy)['router']
    assert bool(jnp.any(gradient != 0)) == gate_probability


def test_the_router_gradient_is_that_of_the_chosen_probability():
  module, params, x_BTD = ffn_layers.layer(n_experts=4)
  # alpha * p * y is linear in p: y at p = 1 is the layer without the gate.
  ungated, _, _ = ffn_layers.layer(n_experts=4, gate_probability=False)
  narrow = ffn_layers.run(ungated, {**params, 'beta': jnp.zeros(())}, x_BTD)
  dy = ffn_layers.normal(*x_BTD.shape, seed=9)
  dp_BT = np.float64(narrow * dy).sum(-1)
  p_BTE = ffn_layers.router_of(params, x_BTD)
  hit_BTE = np.eye(4)[p_BTE.argmax(-1)]
  p_BT1 = p_BTE.max(-1, keepdims=True)
  dlogits = dp_BT[..., None] * p_BT1 * (hit_BTE - p_BTE)
  x = ffn_layers.slow_norm(np.float64(x_BTD), jax.tree.map(np.float64, params))
  expected = np.einsum('btd,bte->de', x, dlogits)
  np.testing.assert_allclose(
    ffn_layers.gradients(module, params, x_BTD, dy)['router'],
    expected,
    rtol=1e-3,
    atol=1e-4,
  )


def test_what_the_router_sows():
  module, params, x_BTD = ffn_layers.layer(n_experts=4)
  found = ffn_layers.sown(module, params, x_BTD)
  p_BTE = ffn_layers.router_of(params, x_BTD)
  expert_BT = p_BTE.argmax(-1)
  (load,) = found['router']['load']
  share = np.bincount(expert_BT.ravel(), minlength=4) / expert_BT.size
  np.testing.assert_allclose(load, share, rtol=1e-6)
  assert load.sum() == pytest.approx(1)
  (entropy,) = found['router']['entropy']
  slow_entropy = -(p_BTE * np.log(p_BTE)).sum(-1).mean()
  assert float(entropy) == pytest.approx(slow_entropy, rel=1e-5)
  (balance,) = found['router']['balance']
  slow_balance = 4 * (share * p_BTE.mean((0, 1))).sum()
  assert float(balance) == pytest.approx(slow_balance, rel=1e-5)
  (chosen,) = found['inputs']['chosen']
  np.testing.assert_array_equal(chosen, np.eye(4, dtype=bool)[expert_BT])
  assert 'dropped' not in found['router']


def test_two_experts_a_token_share_its_load():
  module, params, x_BTD = ffn_layers.layer(n_experts=4, experts_per_token=2)
  found = ffn_layers.sown(module, params, x_BTD)
  p_BTE = ffn_layers.router_of(params, x_BTD)
  best_BT2 = np.argsort(-p_BTE, -1)[..., :2]
  (load,) = found['router']['load']
  share = np.bincount(best_BT2.ravel(), minlength=4) / best_BT2.size
  np.testing.assert_allclose(load, share, rtol=1e-6)
  (chosen,) = found['inputs']['chosen']
  np.testing.assert_array_equal(chosen, np.eye(4)[best_BT2].any(2))


def everything(module, params, x_BTD, dy_BTD):
  """The output, and the gradients of the parameters and of the input."""

  @jax.jit
  def both(params, x_BTD):
    y_BTD, backward = jax.vjp(
      lambda p, x: module.apply({'params': p}, x), params, x_BTD
    )
    return y_BTD, backward(dy_BTD)

  return both(params, x_BTD)


def with_load(params, load):
  """Sends every token to expert 0, or none to expert 2; or leaves it."""
  router = params['router']
  if load == 'one':
    router = jnp.zeros_like(router)  # The first of equals.
  elif load == 'empty':
    # Expert 2 is never above both of two that are each other's opposite.
    router = router.at[:, 2].set(-1e3 * router[:, 3]).at[:, 3].multiply(1e4)
    router = router.at[:, 1].set(-router[:, 3])
  return {**params, 'router': router}


QUICK_FORMS = [
  dict(n_experts=4, expert_tile=5, load='empty'),
  dict(n_experts=4, experts_per_token=2, expert_tile=3),
  dict(n_experts=4, capacity_factor=0.7, expert_tile=2),
  dict(n_experts=2, feature_scaling=False, dtype='bfloat16'),
]
SLOW_FORMS = [
  dict(n_experts=4),
  dict(n_experts=4, expert_tile=5, load='one'),
  dict(n_experts=4, norm_shared=False),
  dict(n_experts=2, experts_per_token=2, gate_probability=False),
  dict(n_experts=4, experts_per_token=2, capacity_factor=0.7),
]


@pytest.mark.parametrize(
  'fields',
  QUICK_FORMS
  + [pytest.param(form, marks=pytest.mark.slow) for form in SLOW_FORMS],
  ids=str,
)
def test_grouped_experts_compute_what_dense_ones_do(fields):
  fields = dict(fields)
  load = fields.pop('load', None)
  grouped, params, x_BTD = ffn_layers.layer(expert_form='grouped', **fields)
  dense, _, _ = ffn_layers.layer(expert_form='dense', **fields)
  x_BTD = jnp.asarray(x_BTD, fields.get('dtype', 'float32'))
  params = with_load(params, load)
  dy_BTD = jnp.asarray(ffn_layers.normal(*x_BTD.shape, seed=5), x_BTD.dtype)
  found = everything(grouped, params, x_BTD, dy_BTD)
  expected = everything(dense, params, x_BTD, dy_BTD)
  tolerance = 1e-4 if x_BTD.dtype == jnp.float32 else 2e-2
  for (path, a), (_, b) in zip(
    *map(jax.tree_util.tree_leaves_with_path, (found, expected)), strict=True
  ):
    a, b = np.float32(a), np.float32(b)
    error = np.abs(a - b).max() / max(np.abs(b).max(), 1e-6)
    assert error < tolerance, jax.tree_util.keystr(path)
  (share_E,) = ffn_layers.sown(grouped, params, x_BTD)['router']['load']
  if load:
    assert share_E[0] == 1 if load == 'one' else share_E[2] == 0


def test_two_experts_a_token_are_summed_with_their_probabilities():
  module, params, x_BTD = ffn_layers.layer(n_experts=4, experts_per_token=2)
  params = {**params, 'beta': jnp.zeros(())}
  p_BTE = ffn_layers.router_of(params, x_BTD)
  double = jax.tree.map(np.float64, params)
  source = ffn_layers.slow_norm(np.float64(x_BTD), double)
  expected = np.zeros_like(source)
  for token in np.ndindex(x_BTD.shape[:2]):
    for i in np.argsort(-p_BTE[token])[:2]:
      branch = ffn_layers.one_expert(double['narrow'], i)
      y = ffn_layers.slow_branch(source[token], branch, ffn_layers.slow_int8)
      expected[token] += double['alpha'] * p_BTE[token][i] * y
  np.testing.assert_allclose(
    ffn_layers.run(module, params, x_BTD), expected, rtol=1e-4, atol=1e-5
  )


def test_beyond_its_capacity_an_expert_gives_nothing():
  # Half of an even share; the first tokens of an expert go before the others.
  module, params, x_BTD = ffn_layers.layer(n_experts=2, capacity_factor=0.5)
  full, _, _ = ffn_layers.layer(n_experts=2)
  y, y_full = (ffn_layers.run(m, params, x_BTD) for m in (module, full))
  wide = ffn_layers.run(module, {**params, 'alpha': jnp.zeros(())}, x_BTD)
  expert_M = ffn_layers.router_of(params, x_BTD).argmax(-1).ravel()
  left = {0: 3, 1: 3}  # ceil(0.5 * 12 tokens / 2 experts)
  dropped = 0
  for token, expert in zip(np.ndindex(x_BTD.shape[:2]), expert_M, strict=True):
    kept = left[expert] > 0
    np.testing.assert_array_equal(y[token], (y_full if kept else wide)[token])
    left[expert] -= kept
    dropped += not kept
  (share,) = ffn_layers.sown(module, params, x_BTD)['router']['dropped']
  assert float(share) == pytest.approx(dropped / 12) and dropped


@pytest.mark.slow
def test_jitter_is_noise_on_what_the_router_reads_in_training_alone():
  module, params, x_BTD = ffn_layers.layer(n_experts=4, router_jitter=0.5)
  calm, _, _ = ffn_layers.layer(n_experts=4)

  @jax.jit
  def noisy(key):
    return module.apply({'params': params}, x_BTD, rngs={'router': key})

  quiet = ffn_layers.run(module, params, x_BTD)
  np.testing.assert_array_equal(quiet, ffn_layers.run(calm, params, x_BTD))
  first, again, other = (noisy(jax.random.key(i)) for i in (0, 0, 1))
  np.testing.assert_array_equal(first, again)
  for a, b in ((first, quiet), (first, other)):
    assert np.any(np.asarray(a) != np.asarray(b))
  # The branches read no noise: without the router's weight, tokens that keep
  # their expert keep their output.
  ungated, _, _ = ffn_layers.layer(
    n_experts=4, router_jitter=0.01, gate_probability=False
  )
  y = ungated.apply(
    {'params': params}, x_BTD, rngs={'router': jax.random.key(0)}
  )
  still, _, _ = ffn_layers.layer(n_experts=4, gate_probability=False)
  same = np.isclose(y, ffn_layers.run(still, params, x_BTD), rtol=1e-5).all(-1)
  assert same.mean() > 0.8


def test_an_even_router_has_balance_1_and_the_largest_entropy():
  module, params, x_BTD = ffn_layers.layer(n_experts=4)
  params = {**params, 'router': jnp.zeros((32, 4))}
  found = ffn_layers.sown(module, params, x_BTD)['router']
  assert float(found['balance'][0]) == pytest.approx(1)
  assert float(found['entropy'][0]) == pytest.approx(np.log(4))
