"""SplitQuantV2's three layers, before and after rounding."""

import dataclasses

import hypothesis
from hypothesis import strategies as st
import jax
from jax import numpy as jnp
import numpy as np
import pytest

from qat.ptq import clusters
from qat.ptq import splitquant
from qat.quant import composed
from qat.quant import packing
from qat.quant import weights

INT4 = splitquant.Options(4, 'tensor', 'sum', 'split')
MASKED = dataclasses.replace(INT4, storage='masked')


def relative(w, q) -> float:
  w, q = np.float64(np.asarray(w, np.float32)), np.float64(q)
  return float(((w - q) ** 2).sum() / (w**2).sum())


def reference(w, bits: int, by_channel: bool) -> np.ndarray:
  """Zeros beside a cluster's weights, min and max of that, in float64."""
  w = np.float64(np.asarray(w, np.float32))
  low, high = clusters.cuts(clusters.seen(clusters.narrow(w)))
  total = np.zeros_like(w)
  for mask in (w <= low, (w > low) & (w < high), w >= high):
    layer = np.where(mask, w, 0)
    axes = 0 if by_channel else None
    least = np.minimum(layer.min(axes, keepdims=True), 0)
    most = np.maximum(layer.max(axes, keepdims=True), 0)
    step = np.float64(np.float16((most - least) / (2**bits - 1)))
    step = np.where(step > 0, step, 1)
    zero = np.round(-least / step)
    codes = np.clip(np.round(layer / step) + zero, 0, 2**bits - 1)
    total += (codes - zero) * step
  return total


@hypothesis.given(
  st.lists(
    st.floats(width=16, allow_nan=False, allow_infinity=False), min_size=1
  ),
  st.sampled_from([np.float32, np.float16, jnp.bfloat16]),
  st.floats(0.125, 0.875, width=32),
)
def test_the_three_layers_sum_to_the_matrix_bit_for_bit(values, dtype, factor):
  w = (np.array(values, np.float32) * np.float32(factor)).astype(dtype)
  lower, middle, upper = splitquant.split(w)
  assert lower.dtype == middle.dtype == upper.dtype == dtype
  for total in ((lower + middle) + upper, lower + (middle + upper)):
    assert total.tobytes() == w.tobytes()  # The sign of 0 as well.
  layers = np.float32([lower, middle, upper])
  assert ((layers != 0).sum(0) == (np.float32(w) != 0)).all()


@pytest.mark.parametrize('bits', [2, 3, 4, 6, 8])
@pytest.mark.parametrize('granularity', splitquant.GRANULARITIES)
@pytest.mark.parametrize('dtype', [np.float32, jnp.bfloat16])
def test_codes_are_those_of_the_reference(bits, granularity, dtype):
  rng = np.random.default_rng(bits)
  w = rng.standard_t(5, (300, 20)).astype(dtype)
  options = splitquant.Options(bits, granularity, 'sum', 'keep')
  found = splitquant.quantize(w, options)
  expected = reference(w, bits, granularity == 'channel')
  values = np.asarray(found.dequantize())
  # A weight in the middle of two levels may go to either.
  off = np.abs(values - expected) > 1e-5 * np.abs(expected).max()
  assert off.mean() < 0.002
  assert relative(w, values) == pytest.approx(relative(w, expected), rel=0.01)


# papers.md has these of a million weights; the range of fewer is narrower.
@pytest.mark.parametrize(
  ('bits', 'plain', 'split', 'masked'),
  [(4, 0.0347, 0.0048, 0.0038), (2, 0.709, 0.169, 0.091)],
)
def test_errors_of_normal_weights(bits, plain, split, masked):
  rng = np.random.default_rng(0)
  w = rng.normal(size=(1000, 1000)).astype(np.float32)
  rtn = weights.asymmetric(jnp.asarray(w), bits=bits).dequantize()
  assert relative(w, rtn) == pytest.approx(plain, rel=0.15)
  for options, expected in ((INT4, split), (MASKED, masked)):
    options = dataclasses.replace(options, bits=bits)
    # As bfloat16, to whose 65,536 words the codes are looked up.
    found = splitquant.quantize(w.astype(jnp.bfloat16), options)
    error = relative(w.astype(jnp.bfloat16), found.dequantize())
    assert error == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize('storage', splitquant.STORAGES)
def test_outliers_and_heavy_tails_cost_less_than_rounding(storage):
  rng = np.random.default_rng(0)
  heavy = rng.standard_t(5, (512, 256))
  outliers = rng.normal(size=(512, 256))
  outliers[3, 5], outliers[100, 7] = 1000, -20
  constant = np.repeat(rng.normal(size=(1, 256)), 512, 0)
  for w in (heavy, outliers, constant):
    w = w.astype(np.float32)
    rtn = weights.asymmetric(jnp.asarray(w), bits=4).dequantize()
    options = dataclasses.replace(INT4, storage=storage)
    found = splitquant.quantize(w, options).dequantize()
    assert relative(w, found) < 0.8 * relative(w, rtn)


@pytest.mark.parametrize('storage', splitquant.STORAGES)
@pytest.mark.parametrize('granularity', splitquant.GRANULARITIES)
def test_few_values_stay_what_they_are(storage, granularity):
  options = dataclasses.replace(INT4, storage=storage, granularity=granularity)
  for values in ([0.0], [-3.0], [1e-7], [2e5], [0, 0.5], [-1, 0, 2]):
    w = np.resize(np.float32(values), (6, 4))
    found = np.asarray(splitquant.quantize(w, options).dequantize())
    np.testing.assert_allclose(found, w, rtol=1e-3)
    np.testing.assert_array_equal(found[w == 0], 0)


def test_a_channel_has_its_own_scale_and_a_mask_half_the_bits():
  rng = np.random.default_rng(0)
  w = (rng.normal(size=(128, 64)) * np.geomspace(1, 30, 64)).astype('f4')
  bits, error = {}, {}
  for granularity in splitquant.GRANULARITIES:
    for storage in splitquant.STORAGES:
      options = splitquant.Options(4, granularity, storage, 'keep')
      found = splitquant.quantize(w, options)
      again = packing.unpack(*packing.pack(found))
      np.testing.assert_array_equal(again.dequantize(), found.dequantize())
      key = granularity, storage
      bits[key] = packing.stored_bits(found) / w.size
      error[key] = relative(w, found.dequantize())
  assert bits['tensor', 'sum'] == pytest.approx(12, abs=0.02)
  assert bits['tensor', 'masked'] == pytest.approx(6, abs=0.05)
  # Three scales of 16 bits and zero points of 3 or 4 for 128 weights.
  assert bits['channel', 'sum'] == pytest.approx(12 + 3 * 20 / 128, abs=0.02)
  for storage in splitquant.STORAGES:
    assert error['channel', storage] < error['tensor', storage]


def test_the_result_is_that_of_float32_and_of_jax_and_has_its_type():
  w = np.random.default_rng(0).normal(size=(40, 30)).astype(jnp.bfloat16)
  for options, kind in ((INT4, composed.Sum), (MASKED, composed.Clustered)):
    found = splitquant.quantize(w, options)
    assert type(found) is kind and found.shape == (40, 30)
    other = splitquant.quantize(jnp.asarray(w, jnp.float32), options)
    leaves = zip(jax.tree.leaves(found), jax.tree.leaves(other), strict=True)
    for a, b in leaves:
      assert a.dtype == b.dtype
      np.testing.assert_array_equal(a, b)


def test_a_bias_is_split_by_clusters_of_its_own():
  b_N = np.random.default_rng(0).normal(size=100).astype(np.float32)
  split = splitquant.quantize_bias(b_N, INT4)
  assert split.shape == (100,) and split.dtype == np.float32
  expected = reference(b_N[:, None], 4, False)[:, 0]
  np.testing.assert_allclose(split, expected, atol=1e-5)
  by_channel = dataclasses.replace(MASKED, granularity='channel')
  np.testing.assert_array_equal(
    splitquant.quantize_bias(b_N, by_channel), split
  )
  np.testing.assert_array_equal(
    splitquant.quantize_bias(np.zeros(5), INT4), np.zeros(5)
  )
  kept = dataclasses.replace(INT4, bias='keep')
  np.testing.assert_array_equal(splitquant.quantize_bias(b_N, kept), b_N)


@pytest.mark.parametrize(
  ('field', 'value'),
  [('bits', 5), ('granularity', 'group'), ('storage', 'x'), ('bias', None)],
)
def test_options_that_there_are_none_of_are_refused(field, value):
  options = dataclasses.replace(INT4, **{field: value})
  with pytest.raises(ValueError, match=f'{field}={value!r}'):
    splitquant.quantize(np.ones((2, 2), np.float32), options)
