"""What quantization after training leaves, against loops over its weights."""

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from qat.quant import composed
from qat.quant import qtensor

K, N = 10, 3
RNG = np.random.default_rng(0)


def floats(*shape: int) -> jax.Array:
  return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def integers(low: int, high: int, *shape: int) -> jax.Array:
  """int8 from `low` to below `high`."""
  return jnp.asarray(RNG.integers(low, high, shape), jnp.int8)


def summed():
  parts = tuple(
    qtensor.QTensor(
      integers(-8, 8, K, N), floats(1, N), 'int4', integers(-8, 8, 1, N)
    )
    for _ in range(3)
  )
  values = [np.float64(part.dequantize()) for part in parts]
  return composed.Sum(parts), sum(values)


def clustered(width: int):
  leaf = composed.Clustered(
    integers(-8, 8, K, N),
    integers(0, 3, K, N),
    floats(3, width),
    floats(3, width),
    'int4',
  )
  codes, scale, zero = map(np.float64, (leaf.codes, leaf.scale, leaf.zero))
  expected = np.empty((K, N))
  for k in range(K):
    for n in range(N):
      c, column = int(leaf.cluster[k, n]), n % width
      expected[k, n] = (codes[k, n] - zero[c, column]) * scale[c, column]
  return leaf, expected


def mixed():
  leaf = composed.MixedBits(
    integers(0, 2, K, N), floats(3, N), floats(3, N), jnp.int8([1, 3, 2]), 4
  )
  codes, scale, zero = map(np.float64, (leaf.codes, leaf.scale, leaf.zero))
  rows = [(codes[k] - zero[k // 4]) * scale[k // 4] for k in range(K)]
  return leaf, np.array(rows)


def binarized():
  signs, second = (2 * integers(0, 2, K, N) - 1 for _ in range(2))
  salient = jnp.asarray(RNG.random(K) < 0.4)
  leaf = composed.Binarized(signs, second, salient, floats(3, 7, N), 4)
  expected = np.empty((K, N))
  for k in range(K):
    for n in range(N):
      small_m, small_s, large_m, large_s, mean, scale, scale2 = np.float64(
        leaf.levels[k // 4, :, n]
      )
      sign, other = int(signs[k, n]), int(second[k, n])
      if salient[k]:
        expected[k, n] = mean + scale * sign + scale2 * other
      elif other > 0:
        expected[k, n] = large_m + large_s * sign
      else:
        expected[k, n] = small_m + small_s * sign
  assert {*np.unique(salient)} == {False, True}
  return leaf, expected


LEAVES = {
  'sum': summed,
  'clustered by tensor': lambda: clustered(1),
  'clustered by channel': lambda: clustered(N),
  'mixed': mixed,
  'binarized': binarized,
}


@pytest.mark.parametrize('name', LEAVES)
def test_dequantize_is_the_matrix(name):
  leaf, expected = LEAVES[name]()
  assert leaf.shape == (K, N)
  np.testing.assert_allclose(leaf.dequantize(), expected, rtol=1e-5, atol=1e-5)
  # Rounded once, however many parts there are.
  rounded = leaf.dequantize().astype(jnp.bfloat16)
  again = jax.jit(lambda leaf: leaf.dequantize(jnp.bfloat16))(leaf)
  assert again.dtype == jnp.bfloat16
  np.testing.assert_array_equal(leaf.dequantize(jnp.bfloat16), rounded)
  np.testing.assert_allclose(
    np.float32(again), np.float32(rounded), rtol=2**-7, atol=1e-6
  )


@pytest.mark.parametrize('name', LEAVES)
def test_a_leaf_is_a_pytree_of_arrays_and_one_leaf_of_parameters(name):
  leaf, _ = LEAVES[name]()
  arrays, tree = jax.tree.flatten(leaf)
  assert all(isinstance(a, jax.Array) for a in arrays)
  same = jax.tree.unflatten(tree, arrays)
  np.testing.assert_array_equal(same.dequantize(), leaf.dequantize())
  params = {'kernel': leaf, 'bias': jnp.ones(N)}
  leaves = jax.tree.leaves(params, is_leaf=composed.is_quantized)
  assert any(each is leaf for each in leaves) and len(leaves) == 2
  # NumPy arrays, as a file gives them, are the same matrix.
  host = jax.tree.map(np.asarray, leaf)
  np.testing.assert_array_equal(host.dequantize(), leaf.dequantize())


def test_floats_and_dicts_are_not_quantized():
  assert composed.is_quantized(qtensor.QTensor(None, None, 'int4'))
  for other in (jnp.ones(2), np.ones(2), {'kernel': 1}, None):
    assert not composed.is_quantized(other)
