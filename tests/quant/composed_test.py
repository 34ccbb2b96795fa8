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


def two_level(kept: bool):
  """Scales with codes; zero points with codes, or integers."""
  scale = composed.Levels(
    jnp.asarray(RNG.integers(0, 8, (5, N)), jnp.uint8),
    jnp.full((5, 1), 2.0**-5),
    jnp.abs(floats(5, N)).astype(jnp.float16).astype(jnp.float32) / 64,
    3,
  )
  zero = integers(-8, 8, 5, N)
  if kept:
    codes = jnp.asarray(RNG.integers(0, 256, (5, N)), jnp.uint8)
    zero = composed.Levels(codes, jnp.full((5, 1), -8.0), floats(5, 1) / 16, 8)
  exact = floats(K, N).astype(jnp.float16) if kept else None
  leaf = composed.TwoLevel(integers(-8, 8, K, N), scale, 'int4', zero, exact)
  scales = _levels(scale)
  zeros = _levels(zero) if kept else np.float64(zero)
  expected = np.empty((K, N))
  for k in range(K):
    expected[k] = (np.float64(leaf.codes[k]) - zeros[k // 2]) * scales[k // 2]
  return leaf, expected + (np.float64(exact) if kept else 0)


def _levels(levels):
  base, step = (
    np.broadcast_to(np.float64(a), levels.shape)
    for a in (levels.base, levels.step)
  )
  return np.float64(np.float16(base + np.float64(levels.codes) * step))


LEAVES = {
  'sum': summed,
  'clustered by tensor': lambda: clustered(1),
  'clustered by channel': lambda: clustered(N),
  'mixed': mixed,
  'binarized': binarized,
  'two levels of scales': lambda: two_level(False),
  'two levels of both': lambda: two_level(True),
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


@pytest.mark.parametrize('groups', [1, 2, 3, 6])
def test_levels_share_a_base_and_a_step_between_neighbours(groups):
  codes = jnp.asarray(RNG.integers(0, 32, (2, 6)), jnp.uint8)
  base, step = jnp.abs(floats(2, groups)), jnp.abs(floats(2, groups)) / 99
  found = composed.Levels(codes, base, step, 5)
  assert found.shape == (2, 6)
  for g in range(2):
    for n in range(6):
      p = n * groups // 6
      value = np.float64(base[g, p]) + int(codes[g, n]) * np.float64(step[g, p])
      np.testing.assert_allclose(found.values()[g, n], value, rtol=2**-10)
  values = np.asarray(jax.jit(composed.Levels.values)(found))
  np.testing.assert_array_equal(values, found.values())
  np.testing.assert_array_equal(values, np.float32(np.float16(values)))
  assert composed.numbers(base) is base
  np.testing.assert_array_equal(composed.numbers(found), values)


def test_two_levels_are_the_qtensor_of_their_values():
  leaf, _ = two_level(True)
  plain = leaf.one_level()
  assert type(plain) is qtensor.QTensor
  np.testing.assert_array_equal(plain.scale, leaf.scale.values())
  np.testing.assert_array_equal(plain.zero, leaf.zero.values())
  np.testing.assert_array_equal(plain.dequantize(), leaf.dequantize())
  assert not composed.is_quantized(leaf.scale)
