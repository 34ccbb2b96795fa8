"""Tests of qat.sensitivity, against equations 1 and 2 in float64."""

import dataclasses

import hypothesis
from hypothesis import strategies as st
import jax.numpy as jnp
import numpy as np
import pytest

from qat import sensitivity
from qat.nn import capture


def random(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape)


def inputs(m, k, seed=0):
  """Correlated inputs whose channels differ in size, as activations do."""
  x_MK = random(m, k, seed=seed) @ (np.eye(k) + 0.3 * random(k, k, seed=seed))
  return x_MK * np.exp(random(k, seed=seed + 1))


def record(path='block_0/attn/q', m=64, k=24, n=12, seed=0):
  w_KN = random(k, n, seed=seed + 2)
  return capture.LinearRecord(
    path,
    jnp.float32(inputs(m, k, seed)),
    jnp.float32(w_KN),
    jnp.float32(np.sign(w_KN) * np.abs(w_KN).mean()),
  )


changed = dataclasses.replace


def slow_scores(x_MK, w_KN, damping):
  """Equation 2 in float64, with an explicit inverse."""
  gram_KK = x_MK.T @ x_MK
  gram_KK += damping * np.mean(np.diag(gram_KK)) * np.eye(len(gram_KK))
  return w_KN**2 / (2 * np.diag(np.linalg.inv(gram_KK))[:, None])


def defined_error(x_MK, w_KN, k, n, damping):
  """Equation 1 by least squares: the least error when w_kn has to be 0.

  The damping is `damping * mean` times the squared change of the weights; as
  rows of X, it needs no formula of its own.
  """
  mean = np.mean(np.sum(x_MK**2, axis=0))
  ridge_KK = np.sqrt(damping * mean) * np.eye(len(w_KN))
  rows = np.concatenate([x_MK, ridge_KK])
  target = rows @ w_KN[:, n]
  free = np.delete(rows, k, axis=1)
  solution = np.linalg.lstsq(free, target, rcond=None)[0]
  return np.sum((free @ solution - target) ** 2)


def fast_scores(x_MK, w_KN, damping):
  inverse_K = sensitivity.inverse_diagonal(jnp.float32(x_MK), damping)
  return sensitivity.scores(jnp.float32(w_KN), inverse_K)


def slow_gini(s):
  s = np.asarray(s, np.float64).ravel()
  differences = np.abs(s[:, None] - s[None, :]).sum()
  return differences / (2 * s.size * s.sum())


@pytest.mark.parametrize('m, k, n', [(64, 16, 8), (512, 96, 33), (8, 24, 5)])
@pytest.mark.parametrize('damping', [0.01, 0.1])
def test_scores_are_equation_2_in_float64(m, k, n, damping):
  x_MK, w_KN = inputs(m, k), random(k, n)
  np.testing.assert_allclose(
    fast_scores(x_MK, w_KN, damping),
    slow_scores(x_MK, w_KN, damping),
    rtol=2e-4,
  )


@pytest.mark.parametrize('damping', [0.0, 0.01])
def test_equation_1_is_twice_equation_2(damping):
  x_MK, w_KN = inputs(20, 6), random(6, 3)
  error_KN = np.array(
    [
      [defined_error(x_MK, w_KN, k, n, damping) for n in range(3)]
      for k in range(6)
    ]
  )
  np.testing.assert_allclose(
    error_KN, 2 * slow_scores(x_MK, w_KN, damping), rtol=1e-9
  )
  np.testing.assert_allclose(
    error_KN, 2 * fast_scores(x_MK, w_KN, damping), rtol=1e-4
  )


def test_scores_follow_the_scale_of_inputs_and_weights():
  x_MK, w_KN = inputs(64, 16), random(16, 8)
  base = fast_scores(x_MK, w_KN, 0.01)
  for scale in (1e-6, 1e6):
    # Squares of 1e6 over 64 tokens: the Gram matrix's entries reach 1e14.
    np.testing.assert_allclose(
      fast_scores(scale * x_MK, w_KN, 0.01), base * scale**2, rtol=1e-4
    )
  np.testing.assert_allclose(
    fast_scores(x_MK, 3 * w_KN, 0.01), 9 * base, rtol=1e-4
  )


def test_binary_weights_differ_by_input_channel_only():
  s_KN = fast_scores(inputs(64, 16), 0.1 * np.sign(random(16, 8)), 0.01)
  assert jnp.all(s_KN == s_KN[:, :1])
  assert len(np.unique(s_KN[:, 0])) == 16


@hypothesis.given(
  # Few shapes: each one compiles.
  st.sampled_from([(1, 1), (1, 9), (12, 8), (20, 30)]),
  st.sampled_from(['normal', 'heavy', 'sparse', 'equal']),
  st.integers(0, 99),
)
@hypothesis.settings(max_examples=40)
def test_scalars_agree_with_their_definitions(shape, kind, seed):
  k, n = shape
  s_KN = random(k, n, seed=seed) ** 2
  s_KN = {
    'normal': s_KN,
    'heavy': np.exp(np.minimum(4 * s_KN, 80)),  # Float32 ends at exp(88).
    'sparse': np.where(s_KN > 0.5, s_KN, 0),
    'equal': np.full_like(s_KN, 0.7),
  }[kind]
  hypothesis.assume(s_KN.sum() > 0)
  np.testing.assert_allclose(
    sensitivity.gini(jnp.float32(s_KN)), slow_gini(s_KN), atol=1e-5
  )
  top = max(1, round(k * n / 100))
  share = np.sort(s_KN.ravel())[-top:].sum() / s_KN.sum()
  np.testing.assert_allclose(
    sensitivity.top_share(jnp.float32(s_KN)), share, rtol=1e-5
  )


def test_scalars_of_many_scores_keep_their_digits():
  s_KN = np.exp(2 * random(1500, 2000))
  ranked = np.sort(s_KN.ravel())
  place = 2 * np.arange(1, ranked.size + 1) - ranked.size - 1
  gini = (place * ranked).sum() / (ranked.size * ranked.sum())
  top = ranked[-ranked.size // 100 :].sum() / ranked.sum()
  s_KN = jnp.float32(s_KN)
  np.testing.assert_allclose(sensitivity.gini(s_KN), gini, atol=1e-4)
  np.testing.assert_allclose(sensitivity.top_share(s_KN), top, rtol=1e-4)


def test_extremes_of_the_scalars():
  equal, none = jnp.ones((20, 30)), jnp.zeros((20, 30))
  single = none.at[3, 4].set(1e-30)
  for s_KN, gini, top1 in (
    (equal, 0, 6 / 600),
    (none, 0, 6 / 600),
    (single, 599 / 600, 1),
  ):
    np.testing.assert_allclose(sensitivity.gini(s_KN), gini, atol=1e-6)
    np.testing.assert_allclose(sensitivity.top_share(s_KN), top1, rtol=1e-6)


@pytest.mark.parametrize('bad', [np.inf, np.nan])
def test_scores_that_are_not_finite_have_no_scalars(bad):
  s_KN = jnp.ones((20, 30)).at[3, 4].set(bad)
  assert jnp.isnan(sensitivity.gini(s_KN))
  assert jnp.isnan(sensitivity.top_share(s_KN))


@pytest.mark.parametrize(
  'k, n, side', [(4, 4, 8), (96, 96, 96), (97, 200, 96), (10, 7, 4), (1, 5, 3)]
)
def test_max_pooling_takes_the_largest_of_each_window(k, n, side):
  s_KN = random(k, n) ** 2
  map_NK = np.asarray(sensitivity.max_pool(jnp.float32(s_KN), side))
  assert max(map_NK.shape) <= side
  window_k, window_n = -(-k // side), -(-n // side)
  expected = [
    [s_KN[i : i + window_k, j : j + window_n].max()
     for i in range(0, k, window_k)]
    for j in range(0, n, window_n)
  ]  # fmt: skip
  np.testing.assert_allclose(map_NK, expected, rtol=1e-6)


def test_an_analysis_describes_both_kinds_of_weights():
  layer = record()
  stats = sensitivity.analyse([layer], 0.01)['block_0/attn/q']
  for kind, w_KN in (
    ('latent', layer.latent_KN),
    ('quantized', layer.quantized_KN),
  ):
    s_KN = slow_scores(
      np.float64(layer.x_MK), np.asarray(w_KN, np.float64), 0.01
    )
    got = stats[kind]
    np.testing.assert_allclose(got.gini, slow_gini(s_KN), rtol=1e-3)
    np.testing.assert_allclose(got.mean, s_KN.mean(), rtol=1e-3)
    relative = np.log10(s_KN / s_KN.mean())
    counts, _ = np.histogram(
      np.clip(relative, -7.99, 3.99), bins=sensitivity.EDGES
    )
    # A score on an edge may fall to either side of it in float32.
    np.testing.assert_allclose(
      got.histogram * s_KN.size, counts, atol=1.01, rtol=0
    )
    np.testing.assert_allclose(got.histogram.sum(), 1, rtol=1e-6)
    np.testing.assert_allclose(
      got.map_NK.astype(np.float64), relative.T, atol=5e-3
    )
  assert stats['quantized'].gini < stats['latent'].gini


def test_an_outlier_weight_stands_out():
  layer = record(k=192, n=200)
  latent_KN = layer.latent_KN.at[150, 20].set(100.0)
  stats = sensitivity.analyse([changed(layer, latent_KN=latent_KN)], 0.01)
  map_NK = stats[layer.path]['latent'].map_NK
  # Windows of 3 outputs (200 / 96, rounded up) and 2 inputs.
  assert map_NK.shape == (67, 96)
  assert np.unravel_index(map_NK.argmax(), map_NK.shape) == (6, 75)


DEGENERATE = {
  'zero inputs': lambda r: changed(r, x_MK=jnp.zeros_like(r.x_MK)),
  'a zero channel': lambda r: changed(r, x_MK=r.x_MK.at[:, 3].set(0)),
  'one channel lives': lambda r: changed(r, x_MK=r.x_MK.at[:, 1:].set(0)),
  'equal channels': lambda r: changed(
    r, x_MK=jnp.broadcast_to(r.x_MK[:, :1], r.x_MK.shape)
  ),
  'equal tokens': lambda r: changed(
    r, x_MK=jnp.broadcast_to(r.x_MK[:1], r.x_MK.shape)
  ),
  'constant inputs': lambda r: changed(r, x_MK=jnp.ones_like(r.x_MK)),
  'one token': lambda r: changed(r, x_MK=r.x_MK[:1]),
  'zero weights': lambda r: changed(r, quantized_KN=0 * r.quantized_KN),
  'constant weights': lambda r: changed(
    r, quantized_KN=jnp.ones_like(r.quantized_KN)
  ),
  'zero rows and columns': lambda r: changed(
    r, latent_KN=r.latent_KN.at[2].set(0).at[:, 5].set(0)
  ),
  'an outlier channel': lambda r: changed(r, x_MK=r.x_MK.at[:, 0].mul(1e4)),
}


@pytest.mark.parametrize('name', DEGENERATE)
def test_degenerate_layers_give_finite_numbers(name):
  layer = DEGENERATE[name](record())
  analysis = sensitivity.analyse([layer], 0.01)
  for stats in analysis[layer.path].values():
    assert 0 <= stats.gini < 1
    assert 0 < stats.top1 <= 1
    assert np.isfinite(stats.mean) and stats.mean >= 0
    np.testing.assert_allclose(stats.histogram.sum(), 1, rtol=1e-6)
    assert not np.any(np.isnan(stats.map_NK))
    assert not np.any(stats.map_NK == np.inf)


def test_rows_of_tokens_that_went_to_another_expert_change_nothing():
  layer = record(m=37)
  masked = changed(layer, x_MK=jnp.pad(layer.x_MK, ((0, 91), (0, 0))))
  a, b = (sensitivity.analyse([r], 0.01)[r.path] for r in (layer, masked))
  for kind in sensitivity.KINDS:
    np.testing.assert_allclose(a[kind].gini, b[kind].gini, rtol=1e-5)
    np.testing.assert_allclose(a[kind].mean, b[kind].mean, rtol=1e-5)


def test_bfloat16_weights_are_welcome():
  layer = record()
  half = changed(layer, latent_KN=layer.latent_KN.astype(jnp.bfloat16))
  a, b = (
    sensitivity.analyse([r], 0.01)[r.path]['latent'] for r in (layer, half)
  )
  np.testing.assert_allclose(a.gini, b.gini, rtol=1e-2)


def test_too_little_damping_is_an_error_that_says_so():
  layer = DEGENERATE['equal channels'](record())
  with pytest.raises(ValueError, match='attn/q.*0.0; raise config.sensitivity'):
    sensitivity.analyse([layer], 0.0)


def test_binarized_is_what_binary_weights_have_on_these_inputs():
  layer = record()
  stats = sensitivity.analyse([layer], 0.01, binarized=True)[layer.path]
  np.testing.assert_allclose(stats['binarized'].gini, stats['quantized'].gini)
  assert stats['binarized'].top1 < stats['latent'].top1
  alike = changed(layer, x_MK=jnp.eye(24), latent_KN=2.0 * layer.latent_KN)
  stats = sensitivity.analyse([alike], 0.01, binarized=True)[layer.path]
  np.testing.assert_allclose(stats['binarized'].gini, 0, atol=1e-5)


def test_a_layer_that_is_not_quantized_has_latent_weights_only():
  layer = record()
  full = changed(layer, quantized_KN=None)
  a, b = (sensitivity.analyse([r], 0.01)[r.path] for r in (layer, full))
  assert b.keys() == {'latent'}
  assert b['latent'].gini == a['latent'].gini
  broken = changed(full, latent_KN=full.latent_KN.at[0, 0].set(np.inf))
  with pytest.raises(ValueError, match='latent_KN has values'):
    sensitivity.analyse([broken], 0.01)


@pytest.mark.parametrize('name', ['x_MK', 'latent_KN', 'quantized_KN'])
def test_values_that_are_not_finite_are_named(name):
  layer = record()
  broken = changed(layer, **{name: getattr(layer, name).at[1, 2].set(np.nan)})
  with pytest.raises(ValueError, match=f'block_0/attn/q.*{name}.*not finite'):
    sensitivity.analyse([broken], 0.01)


def test_records_are_read_one_at_a_time():
  made = []

  def generate():
    for name in 'qkv':
      made.append(name)
      layer = record(name)
      yield changed(layer, x_MK=layer.x_MK * (np.nan if name == 'k' else 1))

  with pytest.raises(ValueError, match="'k'"):
    sensitivity.analyse(generate(), 0.01)
  assert made == ['q', 'k']


def test_scalars_have_the_keys_of_the_log():
  analysis = sensitivity.analyse([record()], 0.01)
  flat = sensitivity.scalars(analysis)
  assert flat.keys() == {
    'sensitivity/latent/gini/block_0/attn/q',
    'sensitivity/latent/top1/block_0/attn/q',
    'sensitivity/quantized/gini/block_0/attn/q',
    'sensitivity/quantized/top1/block_0/attn/q',
  }
  stats = analysis['block_0/attn/q']['latent']
  assert flat['sensitivity/latent/gini/block_0/attn/q'] == stats.gini
  assert flat['sensitivity/latent/top1/block_0/attn/q'] == stats.top1
