"""Every weight quantizer against its formula, by the registry."""

import hypothesis
from hypothesis import strategies as st
from jax import numpy as jnp
import numpy as np
import pytest

from qat.quant import activations
from qat.quant import dot
from qat.quant import qtensor
from qat.quant import rules
from qat.quant import weights

ALL = [(n, g) for n in weights.QUANTIZERS for g in weights.GRANULARITIES]
for_all = pytest.mark.parametrize(('name', 'granularity'), ALL)


def mean(a, axes):
  return a.mean(axes, keepdims=True)


def slow_binary(w, axes):
  codes = np.where(w - mean(w, axes) > 0, 1, -1)
  return codes, np.maximum(mean(np.abs(w), axes), 1e-8)


def slow_ternary(w, axes):
  scale = np.maximum(mean(np.abs(w), axes), 1e-5)
  return np.clip(np.round(w / scale), -1, 1), scale


def slow_int8(w, axes):
  scale = np.maximum(np.abs(w).max(axes, keepdims=True) / 127, 1e-8)
  return np.clip(np.round(w / scale), -127, 127), scale


# In float64; a quantizer without a line here fails its tests.
SLOW = {'binary': slow_binary, 'ternary': slow_ternary, 'int8': slow_int8}
AXES = {'tensor': (-2, -1), 'channel': (-2,)}


def quantize(name, w, granularity):
  return weights.QUANTIZERS[name](jnp.asarray(w), granularity)


def normal(*shape, seed=0):
  values = np.random.default_rng(seed).normal(0.01, 0.05, size=shape)
  return values.astype(np.float32)


def check_formula(name, granularity, w):
  q = quantize(name, w, granularity)
  codes, scale = SLOW[name](np.float64(w), AXES[granularity])
  np.testing.assert_array_equal(q.codes, codes)
  np.testing.assert_allclose(q.scale, scale, rtol=1e-6)
  np.testing.assert_allclose(q.dequantize(), codes * scale, rtol=1e-6)


@for_all
@pytest.mark.parametrize('shape', [(16, 12), (1, 1), (33, 7), (3, 5, 7)])
def test_codes_and_scales_are_the_formula_in_float64(name, granularity, shape):
  check_formula(name, granularity, normal(*shape))


@for_all
def test_a_quantizer_keeps_its_contract(name, granularity):
  q = quantize(name, normal(2, 9, 5), granularity)
  assert q.alphabet == name
  assert q.codes.shape == (2, 9, 5) and q.codes.dtype == jnp.int8
  scales = (2, 1, 1) if granularity == 'tensor' else (2, 1, 5)
  assert q.scale.shape == scales and q.scale.dtype == jnp.float32
  assert set(np.unique(q.codes)) <= set(qtensor.ALPHABETS[name])
  assert jnp.all(q.scale > 0)


@for_all
def test_a_stack_is_its_matrices_one_by_one(name, granularity):
  # Matrices of different size, so that a scale of the whole stack would show.
  stack = normal(3, 8, 6) * np.float32([1, 10, 0.1]).reshape(3, 1, 1)
  together = quantize(name, stack, granularity)
  for i, w_KN in enumerate(stack):
    alone = quantize(name, w_KN, granularity)
    np.testing.assert_array_equal(together.codes[i], alone.codes)
    np.testing.assert_allclose(together.scale[i], alone.scale, rtol=1e-6)


@for_all
def test_low_precision_weights_are_quantized_in_float32(name, granularity):
  w_KN = jnp.asarray(normal(16, 12)).astype(jnp.bfloat16)
  check_formula(name, granularity, np.float32(w_KN))
  q = quantize(name, w_KN, granularity)
  alone = quantize(name, w_KN.astype(jnp.float32), granularity)
  np.testing.assert_array_equal(q.codes, alone.codes)
  np.testing.assert_array_equal(q.scale, alone.scale)


@for_all
@pytest.mark.parametrize('value', [0.0, 0.25, -0.25, 1e-30, 1e30])
def test_a_constant_matrix_stays_finite(name, granularity, value):
  q = quantize(name, np.full((4, 8), value, np.float32), granularity)
  assert jnp.all(q.scale > 0) and jnp.all(jnp.isfinite(q.dequantize()))
  assert set(np.unique(q.codes)) <= set(qtensor.ALPHABETS[name])
  if name != 'binary' and abs(value) > 1e-5:
    np.testing.assert_allclose(q.dequantize(), value, rtol=1e-6)


@for_all
@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize('int8', [False, True])
def test_what_is_not_finite_reaches_the_output(name, granularity, bad, int8):
  w_KN = normal(6, 4)
  w_KN[2, 1] = bad
  spec = rules.Spec(name, 'int8', granularity)
  x = dot.make_input(jnp.asarray(normal(5, 6, seed=1)), spec)
  y_MN = dot.quantized_dot(
    x,
    dot.make_weight({'kernel': jnp.asarray(w_KN)}, spec),
    dot.Method(int8, 'bfloat16'),
  )
  reached = slice(None) if granularity == 'tensor' else slice(1, 2)
  assert not np.isfinite(y_MN[:, reached]).any()
  others = np.delete(y_MN, range(4)[reached], axis=1)
  assert np.isfinite(others).all()


@hypothesis.given(
  st.sampled_from(ALL),
  # Few shapes, for each one compiles; odd ones, and single rows and columns.
  st.sampled_from([(1, 1), (3, 5), (8, 1), (1, 4), (2, 3, 5)]),
  st.data(),
)
@hypothesis.settings(max_examples=60)
def test_formulas_hold_on_a_grid_with_ties(which, shape, data):
  # Multiples of 1/8: sums are exact in float32, so w == mean W and other ties
  # are the same ties in float64.
  size = int(np.prod(shape))
  eighths = st.lists(st.integers(-24, 24), min_size=size, max_size=size)
  w = np.float32(data.draw(eighths)).reshape(shape) / 8
  name, granularity = which
  if name != 'int8':
    check_formula(name, granularity, w)
    return
  # 63.5 is a tie that rounding of the scale decides: only the error is fixed.
  q = quantize(name, w, granularity)
  _, scale = slow_int8(np.float64(w), AXES[granularity])
  np.testing.assert_allclose(q.scale, scale, rtol=1e-6)
  assert np.all(np.abs(q.dequantize() - w) <= scale * (0.5 + 1e-4))


def test_binary_of_a_weight_at_the_mean_is_minus_one():
  q = weights.binary(jnp.float32([[1, 2, 3]]))
  np.testing.assert_array_equal(q.codes, [[-1, -1, 1]])
  assert q.scale == 2  # Mean |W|, not mean |W - mean W| = 2/3.


def test_requantizing_ternary_shrinks_the_scale_by_the_share_of_codes_not_0():
  once = weights.ternary(jnp.asarray(normal(32, 16)))
  again = weights.ternary(once.dequantize())
  share = float(jnp.mean(once.codes != 0))
  assert 0.5 < share < 0.9
  np.testing.assert_array_equal(again.codes, once.codes)
  np.testing.assert_allclose(again.scale, once.scale * share, rtol=1e-5)


@pytest.mark.parametrize('name', ['binary', 'int8'])
@pytest.mark.parametrize('granularity', weights.GRANULARITIES)
def test_requantizing_binary_and_int8_changes_nothing(name, granularity):
  once = quantize(name, normal(32, 16), granularity)
  again = quantize(name, once.dequantize(), granularity)
  np.testing.assert_array_equal(again.codes, once.codes)
  np.testing.assert_allclose(again.scale, once.scale, rtol=1e-6)


@for_all
def test_a_power_of_two_scales_the_scale_alone(name, granularity):
  w_KN = normal(16, 12)
  base, scaled = (
    quantize(name, w, granularity) for w in (w_KN, w_KN * np.float32(4))
  )
  np.testing.assert_array_equal(base.codes, scaled.codes)
  np.testing.assert_allclose(scaled.scale, 4 * base.scale, rtol=1e-6)


@pytest.mark.parametrize('name', weights.QUANTIZERS)
def test_an_unknown_granularity_is_refused(name):
  with pytest.raises(ValueError, match="'row'.*'tensor', 'channel'"):
    quantize(name, normal(2, 2), 'row')


def test_every_alphabet_that_is_used_exists():
  used = {*weights.QUANTIZERS, *activations.QUANTIZERS}
  assert used <= set(qtensor.ALPHABETS)
