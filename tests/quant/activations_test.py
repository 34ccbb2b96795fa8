"""Activation quantizers against their formulas."""

import hypothesis
from hypothesis import strategies as st
import jax
from jax import numpy as jnp
import numpy as np
import pytest

from qat.quant import activations
from qat.quant import qtensor


def normal(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def slow_int8(x):
  """127 / max |x| a token, rounded half to even; in float64."""
  absmax = np.maximum(np.abs(x).max(-1, keepdims=True), 1e-5)
  return np.round(x * 127 / absmax), absmax / 127


@pytest.mark.parametrize('shape', [(7,), (5, 9), (2, 3, 8), (4, 1)])
def test_int8_is_the_formula_in_float64(shape):
  x = normal(*shape)
  q = activations.int8_per_token(jnp.asarray(x))
  codes, scale = slow_int8(np.float64(x))
  np.testing.assert_array_equal(q.codes, codes)
  np.testing.assert_allclose(q.scale, scale, rtol=1e-6)


@pytest.mark.parametrize('name', activations.QUANTIZERS)
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_a_quantizer_keeps_its_contract(name, dtype):
  x = jnp.asarray(normal(2, 3, 8)).astype(dtype)
  q = activations.QUANTIZERS[name](x)
  assert q.alphabet in qtensor.ALPHABETS
  assert q.codes.shape == (2, 3, 8) and q.codes.dtype == jnp.int8
  assert q.scale.shape == (2, 3, 1) and q.scale.dtype == jnp.float32
  alone = activations.QUANTIZERS[name](x.astype(jnp.float32))
  np.testing.assert_array_equal(q.codes, alone.codes)
  np.testing.assert_array_equal(q.scale, alone.scale)


@pytest.mark.parametrize('name', activations.QUANTIZERS)
def test_tokens_do_not_see_each_other(name):
  x_MK = normal(6, 16)
  x_MK[2] *= 1000  # An outlier, as models have them.
  together = activations.QUANTIZERS[name](jnp.asarray(x_MK))
  for i, row_K in enumerate(x_MK):
    alone = activations.QUANTIZERS[name](jnp.asarray(row_K))
    np.testing.assert_array_equal(together.codes[i], alone.codes)
    np.testing.assert_allclose(together.scale[i], alone.scale, rtol=1e-6)


@hypothesis.given(
  st.sampled_from([(1, 1), (3, 5), (2, 33)]),
  st.integers(0, 99),
  st.sampled_from([1e-30, 1e-6, 1e-5, 1e-3, 1, 1e4, 1e30]),
)
@hypothesis.settings(max_examples=40)
def test_int8_is_within_half_a_step(shape, seed, size):
  x_MK = (size * normal(*shape, seed=seed)).astype(np.float32)
  q = activations.int8_per_token(jnp.asarray(x_MK))
  scale = slow_int8(np.float64(x_MK))[1]
  np.testing.assert_allclose(q.scale, scale, rtol=1e-6)
  assert np.abs(np.int32(q.codes)).max() <= 127
  assert np.all(np.abs(q.dequantize() - x_MK) <= scale * (0.5 + 1e-4))
  absmax_M = np.abs(x_MK).max(-1)
  reached = np.abs(np.int32(q.codes)).max(-1) == 127
  assert reached[absmax_M >= 1e-5].all()


def test_a_token_of_zeros_stays_zero_and_finite():
  q = activations.int8_per_token(jnp.zeros((2, 4)))
  np.testing.assert_array_equal(q.dequantize(), 0)
  np.testing.assert_allclose(q.scale, 1e-5 / 127, rtol=1e-6)


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_in_its_token(bad):
  x_MK = normal(3, 4)
  x_MK[1, 2] = bad
  q = jax.jit(activations.int8_per_token)(x_MK)
  finite = np.isfinite(q.dequantize())
  np.testing.assert_array_equal(finite.all(-1), [True, False, True])
  assert not np.isfinite(q.scale[1])
