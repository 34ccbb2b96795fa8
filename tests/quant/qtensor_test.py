"""Codes, scales and alphabets."""

import dataclasses

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from qat.quant import qtensor


@pytest.mark.parametrize('alphabet', qtensor.ALPHABETS)
def test_an_alphabet_is_sorted_fits_its_codes_and_has_its_bits(alphabet):
  codes = qtensor.ALPHABETS[alphabet]
  assert list(codes) == sorted(set(codes))
  dtype = jnp.float8_e4m3fn if alphabet == 'fp8' else jnp.int8
  np.testing.assert_array_equal(np.array(codes, dtype).astype('f4'), codes)
  if alphabet in qtensor.BITS:
    # 8 bits of float8 tell NaNs and two zeros apart, too: 253 numbers.
    bits = np.log2(len(codes))
    assert qtensor.BITS[alphabet] == pytest.approx(bits, abs=0.02)


def test_every_number_of_bits_belongs_to_an_alphabet():
  # What a mix needs depends on its shares.
  assert {*qtensor.BITS, 'binary_mix'} == set(qtensor.ALPHABETS)


def test_float8_is_from_minus_448_to_448():
  codes = qtensor.ALPHABETS['fp8']
  assert len(codes) == 253 and codes[0] == -448 and codes[-1] == 448
  assert min(abs(c) for c in codes if c) == 2**-9


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize('scale_shape', [(1, 1), (1, 3), (2, 1)])
def test_dequantize_is_codes_times_scale(dtype, scale_shape):
  codes = np.array([[-128, 0, 127], [1, -1, 5]], np.int8)
  scale = np.linspace(0.1, 0.7, np.prod(scale_shape)).reshape(scale_shape)
  q = qtensor.QTensor(jnp.asarray(codes), jnp.float32(scale), 'int8')
  values = q.dequantize(dtype)
  assert values.dtype == dtype and values.shape == q.shape == (2, 3)
  np.testing.assert_allclose(
    np.float64(values),
    codes * scale,
    rtol=1e-6 if dtype == jnp.float32 else 2**-8,
  )


def test_dequantize_spreads_groups_and_takes_the_zero_point_off():
  codes = np.arange(-6, 6).astype(np.int8).reshape(6, 2)
  scale = np.float32([[0.5, 1], [2, 3], [5, 7]])
  zero = np.int8([[1, -8], [0, 7], [-1, 2]])
  expected = (codes - np.repeat(zero, 2, 0)) * np.repeat(scale, 2, 0)
  q = qtensor.QTensor(
    jnp.asarray(codes), jnp.asarray(scale), 'int4', jnp.asarray(zero)
  )
  np.testing.assert_array_equal(q.dequantize(), expected)
  plain = dataclasses.replace(q, zero=None)
  expected = codes * np.repeat(scale, 2, 0)
  np.testing.assert_array_equal(plain.dequantize(), expected)


def test_dequantize_adds_what_is_exact():
  q = qtensor.QTensor(
    jnp.int8([[1, 0], [-1, 0]]),
    jnp.float32([[0.5]]),
    'binary_mix',
    exact=jnp.bfloat16([[0, 3.25], [0, -9]]),
  )
  np.testing.assert_array_equal(q.dequantize(), [[0.5, 3.25], [-0.5, -9]])


def test_spread_repeats_each_entry_for_its_group():
  scale_MG = jnp.float32([[1, 2], [3, 4]])
  np.testing.assert_array_equal(
    qtensor.spread(scale_MG, (2, 6)), [[1, 1, 1, 2, 2, 2], [3, 3, 3, 4, 4, 4]]
  )
  assert qtensor.spread(jnp.ones((1, 6)), (4, 6)).shape == (1, 6)


def test_dequantize_rounds_once():
  # In bfloat16, 127 * 1.01 would be rounded before and after the product.
  scale = jnp.float32([[1.01]])
  q = qtensor.QTensor(jnp.int8([[127]]), scale, 'int8')
  expected = (jnp.float32(127) * scale).astype(jnp.bfloat16)
  assert q.dequantize(jnp.bfloat16) == expected


def test_it_passes_through_jit_and_keeps_its_alphabet():
  q = qtensor.QTensor(jnp.int8([[1, -1]]), jnp.float32([[2]]), 'binary')
  twice = jax.jit(lambda q: jax.tree.map(lambda a: a * 2, q))(q)
  assert twice.alphabet == 'binary'
  assert len(jax.tree.leaves(q)) == 2
  np.testing.assert_array_equal(twice.dequantize(), [[8, -8]])


def test_another_alphabet_is_another_structure():
  binary, ternary = (
    qtensor.QTensor(jnp.int8([[1]]), jnp.float32([[1]]), alphabet)
    for alphabet in ('binary', 'ternary')
  )
  with pytest.raises(ValueError, match='ternary'):
    jax.tree.map(jnp.add, binary, ternary)
