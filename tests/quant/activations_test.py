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


int8 = activations.QUANTIZERS['int8']
ALL = [
  (n, g) for n in activations.QUANTIZERS for g in activations.GRANULARITIES
]
for_all = pytest.mark.parametrize(('name', 'granularity'), ALL)


def bits(name):
  return int(name.removesuffix('_asym').removeprefix('int'))


def slow(name, granularity, group_size, x):
  """Every scale by itself, rounded half to even; in float64."""
  x_GI = {
    'tensor': lambda: x.reshape(1, -1),
    'token': lambda: x.reshape(-1, x.shape[-1]),
    'group': lambda: x.reshape(-1, group_size),
  }[granularity]()
  if name.endswith('_asym'):
    least = np.minimum(x_GI.min(-1, keepdims=True), 0)
    most = np.maximum(x_GI.max(-1, keepdims=True), 0)
    size, steps, low = (
      most - least,
      2 ** bits(name) - 1,
      -(2 ** bits(name) // 2),
    )
    scale_G1 = np.maximum(size, 1e-5) / steps
    zero_G1 = low - (least / scale_G1).round()
    codes = ((x_GI / scale_G1).round() + zero_G1).clip(low, low + steps)
  else:
    most = 2 ** (bits(name) - 1) - 1
    scale_G1 = np.maximum(np.abs(x_GI).max(-1, keepdims=True), 1e-5) / most
    zero_G1, codes = np.zeros_like(scale_G1), (x_GI / scale_G1).round()
  return codes.reshape(x.shape), scale_G1.ravel(), zero_G1.ravel()


def group(width):
  """The largest part of `width` that there are several of."""
  return max([d for d in range(2, width) if width % d == 0], default=width)


@for_all
@pytest.mark.parametrize('shape', [(9,), (2, 3, 8), (4, 1)])
def test_codes_and_scales_are_the_formula_in_float64(name, granularity, shape):
  x, size = normal(*shape), group(shape[-1])
  q = activations.QUANTIZERS[name](jnp.asarray(x), granularity, size)
  codes, scale, zero = slow(name, granularity, size, np.float64(x))
  np.testing.assert_array_equal(q.codes, codes)
  np.testing.assert_allclose(np.ravel(q.scale), scale, rtol=1e-6)
  if name.endswith('_asym'):
    np.testing.assert_array_equal(np.ravel(q.zero), zero)
  else:
    assert q.zero is None
  spread, offset = (
    np.repeat(a, x.size // a.size).reshape(shape) for a in (scale, zero)
  )
  expected = (codes - offset) * spread
  np.testing.assert_allclose(q.dequantize(), expected, rtol=1e-6)


@for_all
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_a_quantizer_keeps_its_contract(name, granularity, dtype):
  x = jnp.asarray(normal(2, 3, 8)).astype(dtype)
  q = activations.QUANTIZERS[name](x, granularity, 4)
  assert set(np.unique(q.codes)) <= set(qtensor.ALPHABETS[q.alphabet])
  assert q.alphabet == name.removesuffix('_asym')
  assert q.codes.shape == (2, 3, 8) and q.codes.dtype == jnp.int8
  shapes = {'tensor': (1, 1, 1), 'token': (2, 3, 1), 'group': (2, 3, 2)}
  assert q.scale.shape == shapes[granularity]
  assert q.scale.dtype == jnp.float32
  alone = activations.QUANTIZERS[name](x.astype(jnp.float32), granularity, 4)
  np.testing.assert_array_equal(q.codes, alone.codes)
  np.testing.assert_array_equal(q.scale, alone.scale)


@for_all
def test_what_is_quantized_stays_as_it_is(name, granularity):
  once = activations.QUANTIZERS[name](jnp.asarray(normal(5, 8)), granularity, 4)
  again = activations.QUANTIZERS[name](once.dequantize(), granularity, 4)
  np.testing.assert_array_equal(again.codes, once.codes)
  np.testing.assert_allclose(again.scale, once.scale, rtol=1e-6)


@pytest.mark.parametrize('shape', [(0, 8), (2, 0, 8)])
@for_all
def test_an_input_without_tokens_has_no_codes(name, granularity, shape):
  q = activations.QUANTIZERS[name](jnp.zeros(shape), granularity, 4)
  assert q.codes.shape == q.dequantize().shape == shape


def test_what_cannot_be_quantized_is_refused():
  with pytest.raises(ValueError, match="'row'.*'tensor', 'token', 'group'"):
    activations.QUANTIZERS['int8'](jnp.ones((2, 8)), 'row')
  with pytest.raises(ValueError, match='group_size=3 .* 8 inputs.*divisor'):
    activations.QUANTIZERS['int8'](jnp.ones((2, 8)), 'group', 3)


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
  q = int8(jnp.asarray(x_MK))
  scale = slow('int8', 'token', 0, np.float64(x_MK))[1][:, None]
  np.testing.assert_allclose(q.scale, scale, rtol=1e-6)
  assert np.abs(np.int32(q.codes)).max() <= 127
  assert np.all(np.abs(q.dequantize() - x_MK) <= scale * (0.5 + 1e-4))
  absmax_M = np.abs(x_MK).max(-1)
  reached = np.abs(np.int32(q.codes)).max(-1) == 127
  assert reached[absmax_M >= 1e-5].all()


def test_a_range_on_one_side_of_zero_has_all_codes():
  x_MK = np.abs(normal(3, 64))
  q = activations.QUANTIZERS['int4_asym'](jnp.asarray(x_MK))
  np.testing.assert_array_equal(q.zero, -8)
  np.testing.assert_array_equal(np.max(q.codes, -1), 7)
  error, plain = (
    np.abs(activations.QUANTIZERS[name](x_MK).dequantize() - x_MK).max()
    for name in ('int4_asym', 'int4')
  )
  assert error < 0.6 * plain


def test_a_token_of_zeros_stays_zero_and_finite():
  q = int8(jnp.zeros((2, 4)))
  np.testing.assert_array_equal(q.dequantize(), 0)
  np.testing.assert_allclose(q.scale, 1e-5 / 127, rtol=1e-6)


@pytest.mark.parametrize('width', [4, 1911])
@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_in_its_token(bad, width):
  x_MK = normal(3, width)
  x_MK[1, 2] = bad
  q = jax.jit(int8)(x_MK)
  finite = np.isfinite(q.dequantize())
  np.testing.assert_array_equal(finite.all(-1), [True, False, True])
  assert not np.isfinite(q.scale[1])
