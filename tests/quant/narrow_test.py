"""Codes of few bits, several to a byte."""

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from qat.quant import narrow
from qat.quant import qtensor


def integers(bits: int, *shape: int) -> np.ndarray:
  rng = np.random.default_rng(bits)
  high = 2 ** (bits - 1)
  codes = rng.integers(-high, high, shape).astype(np.int8)
  codes.flat[:2] = -high, high - 1
  return codes


@pytest.mark.parametrize('bits', narrow.BITS)
@pytest.mark.parametrize('shape', [(5, 16), (3, 2, 7), (1,), (4, 1)])
def test_what_is_packed_comes_back(bits, shape):
  codes = integers(bits, *shape) if shape != (1,) else np.int8([-bits])
  made = narrow.pack(codes)
  assert made.bits == bits
  assert made.bytes.size == codes[..., 0].size * -(-shape[-1] * bits // 8)
  assert (made.shape, made.ndim) == (shape, len(shape))
  assert (made.dtype, made.bytes.dtype) == (f'int{bits}', np.uint8)
  assert made.bytes.shape == narrow.shaped(shape, bits).bytes.shape
  back = made.astype(np.int8)
  assert isinstance(back, np.ndarray) and back.dtype == np.int8
  np.testing.assert_array_equal(back, codes)
  found = jax.jit(lambda a: a.astype(jnp.float32))(made)
  assert found.dtype == jnp.float32
  np.testing.assert_array_equal(found, codes)


@pytest.mark.parametrize(
  ('codes', 'bits'),
  [([0, 0], 2), ([-1, 1], 2), ([-2], 2), ([2], 4), ([-8, 7], 4), ([8], 8)],
)
def test_as_few_bits_as_hold_all(codes, bits):
  made = narrow.pack(np.int8(codes))
  if bits == 8:
    np.testing.assert_array_equal(made, np.int8(codes))
  else:
    assert made.bits == bits
    np.testing.assert_array_equal(made.astype(np.int8), codes)
  assert narrow.holding(min(codes), max(codes)) == bits


def test_a_loop_reads_layer_by_layer():
  """Its memory is the bytes, and one layer at a time."""
  layers, inputs, outputs = 32, 64, 128
  codes = integers(4, layers, inputs, outputs)
  scale = np.float32(np.arange(1, outputs + 1))[None, None]
  scale = np.broadcast_to(scale, (layers, 1, outputs))
  leaf = qtensor.QTensor(narrow.pack(codes), scale, 'int4')

  def loop(leaf, x_K):
    def layer(total, leaf):
      return total + x_K @ leaf.dequantize(), None

    return jax.lax.scan(layer, jnp.zeros(outputs), leaf)[0]

  compiled = jax.jit(loop).lower(leaf, jnp.ones(inputs)).compile()
  found = compiled(jax.tree.map(jnp.asarray, leaf), jnp.ones(inputs))
  np.testing.assert_array_equal(found, codes.sum((0, 1)) * scale[0, 0])
  memory = compiled.memory_analysis()
  size = codes.size // 2 + 4 * (scale.size + inputs)
  assert memory.argument_size_in_bytes == size
  assert memory.temp_size_in_bytes < 3 * 4 * inputs * outputs
