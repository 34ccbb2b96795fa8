"""Codes, scales and alphabets."""

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from qat.quant import qtensor


@pytest.mark.parametrize('alphabet', qtensor.ALPHABETS)
def test_an_alphabet_is_sorted_fits_int8_and_has_its_bits(alphabet):
  codes = qtensor.ALPHABETS[alphabet]
  assert list(codes) == sorted(set(codes))
  assert -128 <= codes[0] and codes[-1] <= 127
  assert qtensor.BITS[alphabet] == pytest.approx(np.log2(len(codes)), abs=0.01)


def test_every_number_of_bits_belongs_to_an_alphabet():
  assert set(qtensor.BITS) == set(qtensor.ALPHABETS)


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
