"""Every weight quantizer against its formula, by the registry."""

import itertools

import hypothesis
from hypothesis import strategies as st
import jax
from jax import numpy as jnp
import numpy as np
import pytest

from qat.quant import activations
from qat.quant import blocks
from qat.quant import dot
from qat.quant import operand as operand_lib
from qat.quant import qtensor
from qat.quant import rules
from qat.quant import weights

ALL = list(itertools.product(weights.QUANTIZERS, blocks.AXES))
for_all = pytest.mark.parametrize(('name', 'granularity'), ALL)


def mean(a):
  return a.mean((-2, -1), keepdims=True)


def largest(a):
  return a.max((-2, -1), keepdims=True)


# Of weights `[..., I, J]` that share a scale, in float64: codes, scale, zero
# point, exact weights. A quantizer without a line here fails its tests.


def slow_binary(w):
  codes = np.where(w - mean(w) > 0, 1, -1)
  return codes, np.maximum(mean(np.abs(w)), 1e-8), 0, 0


def slow_binary_mix(w):
  codes, scale = np.zeros(w.shape), np.zeros((*w.shape[:-2], 1, 1))
  exact = np.zeros(w.shape)
  for i in np.ndindex(w.shape[:-2]):
    distance = np.abs(w[i] - w[i].mean()).ravel()
    kept = np.argsort(-distance)[: round(0.08 * w[i].size)]
    kept = np.isin(np.arange(w[i].size), kept).reshape(w[i].shape)
    codes[i] = np.where(kept, 0, np.where(w[i] > w[i].mean(), 1, -1))
    scale[i] = np.abs(w[i][~kept]).mean()
    exact[i] = np.where(kept, w[i], 0)
  return codes, scale, 0, exact


def slow_ternary(w):
  scale = np.maximum(mean(np.abs(w)), 1e-5)
  return np.clip(np.round(w / scale), -1, 1), scale, 0, 0


def slow_symmetric(bits):
  def quantize(w):
    most = 2 ** (bits - 1) - 1
    scale = np.maximum(largest(np.abs(w)) / most, 1e-8)
    return np.clip(np.round(w / scale), -most, most), scale, 0, 0

  return quantize


def slow_asymmetric(bits):
  def quantize(w):
    least, most = -largest(np.maximum(-w, 0)), largest(np.maximum(w, 0))
    scale = np.maximum((most - least) / (2**bits - 1), 1e-8)
    # As most write it, with codes from 0; here they are from -2^(bits - 1).
    zero = np.round(-least / scale)
    codes = np.clip(np.round(w / scale) + zero, 0, 2**bits - 1)
    half = 2 ** (bits - 1)
    return codes - half, scale, zero - half, 0

  return quantize


def slow_fp8(w):
  """The nearest of all finite values."""
  scale = np.maximum(largest(np.abs(w)) / 448, 1e-8)
  values = np.array(qtensor.ALPHABETS['fp8'])
  nearest = np.abs((w / scale)[..., None] - values).argmin(-1)
  return values[nearest], scale, 0, 0


SLOW = {
  'binary': slow_binary,
  'binary_mix': slow_binary_mix,
  'ternary': slow_ternary,
  **{f'int{b}': slow_symmetric(b) for b in (2, 3, 4, 8)},
  **{f'int{b}_asym': slow_asymmetric(b) for b in (2, 3, 4, 8)},
  'fp8': slow_fp8,
}


def group(width):
  """The largest part of `width` that there are several of."""
  return max([d for d in range(2, width) if width % d == 0], default=width)


def slow(name, granularity, w):
  """Codes, scale, zero point and exact weights by the formulas, as `[K, N]`."""
  *stack, k, n = w.shape
  if granularity == 'tensor':
    return SLOW[name](w)
  size = group(k) if granularity == 'group' else k
  # Matrices of one column, `[..., K / size, N, size, 1]`, and back.
  parts = w.reshape(*stack, k // size, size, n).swapaxes(-1, -2)[..., None]
  spread = [
    np.broadcast_to(a, parts.shape)[..., 0].swapaxes(-1, -2).reshape(w.shape)
    for a in SLOW[name](parts)
  ]
  return spread


def quantize(name, w, granularity):
  w = jnp.asarray(w)
  q = weights.QUANTIZERS[name](w, granularity, group(w.shape[-2]))
  return jax.tree.map(np.asarray, q)  # Compared with NumPy, not compiled.


def normal(*shape, seed=0):
  values = np.random.default_rng(seed).normal(0.01, 0.05, size=shape)
  return values.astype(np.float32)


def check_formula(name, granularity, w):
  q = quantize(name, w, granularity)
  codes, scale, zero, exact = slow(name, granularity, np.float64(w))
  np.testing.assert_array_equal(q.codes.astype(jnp.float32), codes)
  found = qtensor.spread(q.scale, q.shape)
  np.testing.assert_allclose(
    np.broadcast_to(found, w.shape), scale + 0 * w, 1e-6
  )
  if q.zero is not None:
    found = qtensor.spread(q.zero, q.shape)
    np.testing.assert_array_equal(np.broadcast_to(found, w.shape), zero + 0 * w)
  expected = (codes - zero) * scale + jnp.asarray(exact, jnp.bfloat16)
  np.testing.assert_allclose(q.dequantize(), expected, rtol=1e-6)


def test_every_quantizer_has_a_slow_reference():
  assert set(SLOW) == set(weights.QUANTIZERS)


@for_all
@pytest.mark.parametrize('shape', [(9, 5), (3, 9, 5)])
def test_codes_and_scales_are_the_formula_in_float64(name, granularity, shape):
  check_formula(name, granularity, normal(*shape))


@for_all
def test_a_quantizer_keeps_its_contract(name, granularity):
  q = quantize(name, normal(3, 9, 5), granularity)
  assert q.alphabet == name.removesuffix('_asym')
  assert q.codes.shape == (3, 9, 5)
  assert q.codes.dtype == (jnp.float8_e4m3fn if name == 'fp8' else jnp.int8)
  scales = {'tensor': (3, 1, 1), 'channel': (3, 1, 5), 'group': (3, 3, 5)}
  assert q.scale.shape == scales[granularity]
  assert q.scale.dtype == jnp.float32
  codes = set(np.unique(q.codes.astype(jnp.float32)))
  assert codes <= set(qtensor.ALPHABETS[q.alphabet])
  assert jnp.all(q.scale > 0)
  assert (q.zero is not None) == name.endswith('_asym')
  if q.zero is not None:
    assert q.zero.shape == q.scale.shape and q.zero.dtype == jnp.int8
    assert set(np.unique(q.zero)) <= set(qtensor.ALPHABETS[q.alphabet])
  assert (q.exact is not None) == (name == 'binary_mix')


@for_all
def test_a_stack_is_its_matrices_one_by_one(name, granularity):
  # Matrices of different size, so that a scale of the whole stack would show.
  stack = normal(3, 9, 5) * np.float32([1, 10, 0.1]).reshape(3, 1, 1)
  together = quantize(name, stack, granularity)
  for i, w_KN in enumerate(stack):
    alone = quantize(name, w_KN, granularity)
    same_codes(together.codes[i], alone.codes)
    np.testing.assert_allclose(together.scale[i], alone.scale, rtol=1e-6)
    np.testing.assert_allclose(
      together.dequantize()[i], alone.dequantize(), rtol=1e-6
    )


def same_codes(found, expected):
  np.testing.assert_array_equal(
    found.astype(jnp.float32), expected.astype(jnp.float32)
  )


@for_all
def test_low_precision_weights_are_quantized_in_float32(name, granularity):
  w_KN = jnp.asarray(normal(9, 5)).astype(jnp.bfloat16)
  q = quantize(name, w_KN, granularity)
  alone = quantize(name, w_KN.astype(jnp.float32), granularity)
  same_codes(q.codes, alone.codes)
  np.testing.assert_array_equal(q.scale, alone.scale)


@for_all
@pytest.mark.parametrize('value', [0.0, 0.25, -0.25, 1e-30, 1e30])
def test_a_constant_matrix_stays_finite(name, granularity, value):
  q = quantize(name, np.full((9, 5), value, np.float32), granularity)
  assert jnp.all(q.scale > 0) and jnp.all(jnp.isfinite(q.dequantize()))
  codes = set(np.unique(q.codes.astype(jnp.float32)))
  assert codes <= set(qtensor.ALPHABETS[q.alphabet])
  if not name.startswith('binary') and abs(value) > 1e-5:
    np.testing.assert_allclose(q.dequantize(), value, rtol=1e-6)


@for_all
@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_reaches_the_output(name, granularity, bad):
  w_KN = normal(9, 5)
  w_KN[2, 1] = bad
  spec = rules.Spec(name, 'int8', granularity, group_size=3)
  x = operand_lib.make_input(jnp.asarray(normal(5, 9, seed=1)), spec)
  weight = operand_lib.make_weight({'kernel': jnp.asarray(w_KN)}, spec)
  reached = slice(None) if granularity == 'tensor' else slice(1, 2)
  for int8 in (False, True):
    y_MN = dot.quantized_dot(x, weight, dot.Method(int8, 'bfloat16'))
    assert not np.isfinite(y_MN[:, reached]).any()
    others = np.delete(y_MN, range(5)[reached], axis=1)
    assert np.isfinite(others).all()


@hypothesis.given(
  st.sampled_from(['binary', 'ternary', 'int8', 'int3', 'int4_asym']),
  st.sampled_from([*blocks.AXES]),
  # Few shapes, for each one compiles; odd ones, and single rows and columns.
  st.sampled_from([(1, 1), (9, 5), (8, 1), (1, 4), (2, 3, 5)]),
  st.data(),
)
@hypothesis.settings(max_examples=60)
def test_formulas_hold_on_a_grid_with_ties(name, granularity, shape, data):
  # Multiples of 1/8: sums are exact in float32, so w == mean W and other ties
  # are the same ties in float64.
  size = int(np.prod(shape))
  eighths = st.lists(st.integers(-24, 24), min_size=size, max_size=size)
  w = np.float32(data.draw(eighths)).reshape(shape) / 8
  if name in ('binary', 'ternary'):
    check_formula(name, granularity, w)
    return
  # 63.5 is a tie that rounding of the scale decides: only the error is fixed.
  q = quantize(name, w, granularity)
  scale = slow(name, granularity, np.float64(w))[1] + 0 * w
  found = np.broadcast_to(qtensor.spread(q.scale, q.shape), w.shape)
  np.testing.assert_allclose(found, scale, rtol=1e-6)
  # A zero point is rounded, too, so that the ends may miss by a whole step.
  steps = 1 if name.endswith('_asym') else 0.5
  assert np.all(np.abs(q.dequantize() - w) <= scale * (steps + 1e-4))


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


# Of a mix it holds for large matrices alone: its mean is another one.
@pytest.mark.parametrize(
  'name', sorted({*weights.QUANTIZERS} - {'ternary', 'binary_mix'})
)
@pytest.mark.parametrize('granularity', blocks.AXES)
def test_requantizing_all_others_changes_nothing(name, granularity):
  once = quantize(name, normal(9, 5), granularity)
  again = quantize(name, once.dequantize(), granularity)
  np.testing.assert_allclose(
    again.dequantize(), once.dequantize(), rtol=1e-5, atol=1e-8
  )
  same_codes(again.codes, once.codes)
  np.testing.assert_allclose(again.scale, once.scale, rtol=1e-5)


@for_all
def test_a_power_of_two_scales_the_scale_alone(name, granularity):
  w_KN = normal(9, 5)
  base, scaled = (
    quantize(name, w, granularity) for w in (w_KN, w_KN * np.float32(4))
  )
  same_codes(base.codes, scaled.codes)
  np.testing.assert_allclose(scaled.scale, 4 * base.scale, rtol=1e-6)
  np.testing.assert_allclose(
    scaled.dequantize(), 4 * base.dequantize(), rtol=1e-6
  )


@pytest.mark.parametrize('bits', [2, 3, 4, 8])
def test_zero_is_exact_and_the_ends_are_reached_with_a_zero_point(bits):
  w_KN = np.abs(normal(16, 12)) + np.float32(0.5)  # All on one side of 0.
  w_KN[3, 5] = 0
  for sign in (1, -1):
    q = quantize(f'int{bits}_asym', sign * w_KN, 'tensor')
    assert q.dequantize()[3, 5] == 0
    assert int(q.codes.max()) - int(q.codes.min()) == 2**bits - 1
    # The same bits without a zero point have half of the range to spend.
    plain = quantize(f'int{bits}', sign * w_KN, 'tensor')
    assert plain.scale > 2 * q.scale


@pytest.mark.parametrize('share', [0.0, 0.08, 0.5, 0.99])
def test_a_mix_keeps_the_largest_weights(share):
  w_KN = normal(20, 10)
  q = weights.binary_mix(jnp.asarray(w_KN), kept_share=share)
  kept = np.array(q.codes == 0)
  assert kept.sum() == round(share * w_KN.size)
  np.testing.assert_array_equal(np.array(q.exact != 0), kept)
  distance = np.abs(w_KN - w_KN.mean())
  if share:
    assert distance[kept].min() >= distance[~kept].max()
    np.testing.assert_allclose(q.dequantize()[kept], w_KN[kept], rtol=2**-8)
  else:
    plain = weights.binary(jnp.asarray(w_KN))
    same_codes(q.codes, plain.codes)
    np.testing.assert_allclose(q.scale, plain.scale, rtol=1e-6)


@pytest.mark.parametrize('name', weights.QUANTIZERS)
def test_what_does_not_fit_is_refused(name):
  with pytest.raises(ValueError, match="'row'.*'tensor', 'channel'"):
    quantize(name, normal(2, 2), 'row')
  with pytest.raises(ValueError, match='group_size=4 .* 6 inputs'):
    weights.QUANTIZERS[name](jnp.ones((6, 2)), 'group', 4)


def test_every_alphabet_that_is_used_exists():
  every = {*weights.QUANTIZERS, *activations.QUANTIZERS}
  used = {name.removesuffix('_asym') for name in every}
  assert used <= set(qtensor.ALPHABETS)
