"""Grids against a slow reference, on weights that are hard to cover."""

import itertools

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from qat.quant import float16
from qat.quant import grid
from tests import slow_gptq


def hard(seed=0):
  """Columns `[24, 12]`: ordinary ones, then those that go wrong."""
  rng = np.random.default_rng(seed)
  w_IN = 0.02 * rng.normal(size=(24, 12))
  w_IN[5, 1] *= 1000
  w_IN[:, 2] = 0
  w_IN[:, 3] = 0.25
  w_IN[:, 4] = -0.25
  w_IN[:, 5] = np.abs(w_IN[:, 5])
  w_IN[:, 6] = 0
  w_IN[7, 6] = -3e-3
  w_IN[:, 7] *= 1e-4
  w_IN[:, 8] *= 1e-9
  w_IN[:, 9] += 5
  return w_IN.astype(np.float32)


fit = jax.jit(grid.fit, static_argnames=('bits', 'symmetric', 'mse', 'axes'))
ALL = list(itertools.product(grid.BITS, (False, True), (False, True)))
for_all = pytest.mark.parametrize(('bits', 'symmetric', 'mse'), ALL)


@for_all
def test_a_fit_is_the_slow_one(bits, symmetric, mse):
  w_IN = hard()
  found = fit(jnp.asarray(w_IN), bits, symmetric, mse)
  scale_N, zero_N = slow_gptq.fit(
    w_IN.T.astype(np.float64), bits, symmetric, mse
  )
  if not mse:
    np.testing.assert_allclose(found.scale[0], scale_N, rtol=1e-6)
    np.testing.assert_array_equal(found.zero[0], zero_N)
    return

  # Shares whose errors float32 cannot tell apart are equally good.
  def error_N(scale_N, zero_N):
    levels = slow_gptq.level(w_IN.astype(np.float64), scale_N, zero_N, bits)
    return (np.abs(levels - w_IN) ** 2.4).sum(0)

  of_found = error_N(np.float64(found.scale[0]), np.float64(found.zero[0]))
  np.testing.assert_allclose(of_found, error_N(scale_N, zero_N), rtol=1e-4)
  same = np.float64(found.scale[0]) == scale_N
  assert np.mean(same) > 0.7


@for_all
def test_zero_is_a_level_and_levels_stay(bits, symmetric, mse):
  w_IN = jnp.asarray(hard())
  found = fit(w_IN, bits, symmetric, mse)
  assert np.all(np.isfinite(found.scale)) and np.all(found.scale > 0)
  np.testing.assert_array_equal(found.scale, float16.nearest(found.scale))
  np.testing.assert_array_equal(found.round(jnp.zeros_like(w_IN)), 0)
  codes_IN = found.encode(w_IN)
  assert codes_IN.min() >= -(2 ** (bits - 1))
  assert codes_IN.max() < 2 ** (bits - 1)
  np.testing.assert_array_equal(codes_IN, np.round(codes_IN))
  levels_IN = found.decode(codes_IN)
  np.testing.assert_array_equal(found.round(levels_IN), levels_IN)


@pytest.mark.parametrize('zero', [0.0, -3.0, 0.4, -2.5, 1.7])
def test_a_weight_goes_to_the_next_level(zero):
  found = grid.Grid(jnp.float32(0.375), jnp.float32(zero), 3)
  w = np.linspace(-4, 4, 1001).astype(np.float32)
  levels = (np.arange(-4, 4) - zero) * 0.375
  nearest = np.abs(levels[:, None] - w).min(0)
  distance = np.abs(np.float64(found.round(jnp.asarray(w))) - w)
  np.testing.assert_allclose(distance, nearest, atol=1e-6)


def test_a_searched_range_is_never_worse():
  w_IN = jnp.asarray(hard())
  for bits, symmetric in itertools.product((2, 4), (False, True)):
    plain, searched = (
      np.abs(np.float64(fit(w_IN, bits, symmetric, mse).round(w_IN)) - w_IN)
      for mse in (False, True)
    )
    plain, searched = (plain**2.4).sum(0), (searched**2.4).sum(0)
    assert np.all(searched <= plain * (1 + 1e-5))
    assert searched.sum() < 0.9 * plain.sum()


def test_ignored_weights_have_no_part_in_the_fit():
  w_IN = hard()
  ignored_IN = np.random.default_rng(1).random(w_IN.shape) < 0.2
  ignored_IN[5, 1] = True  # The one that is 1000 times too large.
  ignored_IN[:, 0] = True
  spoiled_IN = np.where(ignored_IN, 1e4, w_IN).astype(np.float32)
  for mse in (False, True):
    found, same = (
      fit(jnp.asarray(w), 3, False, mse, jnp.asarray(ignored_IN))
      for w in (w_IN, spoiled_IN)
    )
    np.testing.assert_array_equal(found.scale, same.scale)
    np.testing.assert_array_equal(found.zero, same.zero)
    assert float(found.scale[0, 1]) < 0.1
  scale_N, zero_N = slow_gptq.fit(
    w_IN.T.astype(np.float64), 3, ignored=ignored_IN.T
  )
  found = fit(jnp.asarray(w_IN), 3, False, False, jnp.asarray(ignored_IN))
  np.testing.assert_allclose(found.scale[0], scale_N, rtol=1e-3)
  np.testing.assert_array_equal(found.zero[0], zero_N)
  nothing_IN = jnp.zeros(w_IN.shape, bool)
  np.testing.assert_array_equal(
    fit(jnp.asarray(w_IN), 3, False, False, nothing_IN).scale,
    fit(jnp.asarray(w_IN), 3, False, False).scale,
  )


def test_nan_reaches_the_scale():
  w_IN = jnp.asarray(hard()).at[3, 0].set(jnp.nan)
  for mse in (False, True):
    found = fit(w_IN, 4, False, mse)
    assert np.isnan(found.scale[0, 0]) and np.isfinite(found.scale[0, 1])


def test_other_bits_are_refused():
  with pytest.raises(ValueError, match=r'bits=5; take one of \(2, 3, 4, 6, 8'):
    grid.check_bits(5)
