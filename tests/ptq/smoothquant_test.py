"""The scales of SmoothQuant: their formula, and that they change nothing."""

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from qat.ptq import smoothquant

K = 24


def options(alpha=0.5):
  return smoothquant.Options(alpha=alpha)


def matrices(seed=0):
  """Largest inputs, and three kernels of other widths."""
  rng = np.random.default_rng(seed)
  kernels = [rng.normal(size=(K, n)) * 0.02 for n in (8, 3, 17)]
  x_MK = rng.normal(size=(50, K))
  x_MK[:, 5] *= 1000  # An outlier.
  kernels[1][7] *= 100
  return x_MK, kernels


@pytest.mark.parametrize('alpha', [0.0, 0.5, 0.85, 1.0])
def test_scales_are_those_of_the_formula(alpha):
  x_MK, kernels = matrices()
  absmax_K = np.abs(x_MK).max(0)
  expected = []
  for j in range(K):
    most = max(abs(w) for w_KN in kernels for w in w_KN[j])
    expected.append(absmax_K[j] ** alpha / most ** (1 - alpha))
  found = smoothquant.scales(
    jnp.asarray(absmax_K), [jnp.asarray(w) for w in kernels], options(alpha)
  )
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_the_difficulty_moves_to_the_weights():
  """With alpha 1/2 inputs and weights have the same maximum at each input."""
  x_MK, kernels = matrices(2)
  absmax_K = np.abs(x_MK).max(0)
  t_K = np.asarray(
    smoothquant.scales(
      jnp.asarray(absmax_K), list(map(jnp.asarray, kernels)), options()
    )
  )
  most_K = np.max([np.abs(w).max(-1) for w in kernels], 0) * t_K
  np.testing.assert_allclose(absmax_K / t_K, most_K, rtol=1e-5)
  spread = lambda a: a.max() / np.median(a)  # noqa: E731
  assert spread(absmax_K / t_K) < spread(absmax_K) / 10


def test_what_is_always_0_keeps_its_scale():
  x_MK, kernels = matrices()
  absmax_K = np.abs(x_MK).max(0)
  absmax_K[2] = 0
  for w_KN in kernels:
    w_KN[3] = 0
  found = smoothquant.scales(
    jnp.asarray(absmax_K), list(map(jnp.asarray, kernels)), options()
  )
  assert found[2] == found[3] == 1
  assert np.all(np.isfinite(found)) and np.all(np.asarray(found) > 0)


def test_scales_are_neither_0_nor_infinite():
  absmax_K = jnp.asarray([1e-30, 1e30, 1e-30, 1e30], jnp.float32)
  w_KN = jnp.asarray([[1e-30], [1e-30], [1e30], [1e30]], jnp.float32)
  for alpha in (0.0, 0.5, 1.0):
    found = np.asarray(smoothquant.scales(absmax_K, [w_KN], options(alpha)))
    assert np.all(np.isfinite(found))
    assert found.min() >= np.float32(smoothquant.SMALLEST)


def test_a_nan_is_not_hidden():
  found = smoothquant.scales(
    jnp.asarray([1.0, jnp.nan]), [jnp.ones((2, 3))], options()
  )
  assert np.isnan(found[1])


@pytest.mark.parametrize(
  ('alpha', 'rows', 'expected'),
  [
    (-0.1, [4], 'alpha=-0.1'),
    (1.5, [4], 'alpha=1.5'),
    (float('nan'), [4], 'alpha=nan'),
    (0.5, [4, 5], '4 inputs'),
    (0.5, [], '4 inputs'),
  ],
)
def test_what_does_not_fit_is_an_error(alpha, rows, expected):
  with pytest.raises(ValueError, match=expected):
    smoothquant.scales(
      jnp.ones(4), [jnp.ones((k, 2)) for k in rows], options(alpha)
    )


def test_scales_can_be_compiled():
  compiled = jax.jit(smoothquant.scales, static_argnames='options')
  x_MK, kernels = matrices()
  arguments = jnp.abs(jnp.asarray(x_MK)).max(0), list(map(jnp.asarray, kernels))
  np.testing.assert_allclose(
    compiled(*arguments, options=options()),
    smoothquant.scales(*arguments, options()),
    rtol=1e-6,
  )
