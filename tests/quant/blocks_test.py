"""Blocks of a matrix: what stands together, and what is refused."""

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from qat.quant import blocks

SHAPES = [(6, 5), (1, 1), (4, 6, 5), (2, 4, 6, 5)]


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('granularity', blocks.AXES)
def test_merge_inverts_split(granularity, shape):
  w_KN = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
  size = 3 if shape[-2] == 6 else 1
  w_GIN, axes = blocks.split(jnp.asarray(w_KN), granularity, size)
  np.testing.assert_array_equal(blocks.merge(w_GIN), w_KN)
  scale = blocks.merge(jnp.max(w_GIN, axes, keepdims=True))
  groups = shape[-2] // size if granularity == 'group' else 1
  columns = 1 if granularity == 'tensor' else shape[-1]
  assert scale.shape == (*shape[:-2], groups, columns)


def test_a_group_is_of_neighbours_among_the_inputs_of_one_output():
  w_KN = np.arange(12.0).reshape(6, 2)
  w_GIN, axes = blocks.split(jnp.asarray(w_KN), 'group', 3)
  np.testing.assert_array_equal(w_GIN[1, :, 0], [6, 8, 10])
  assert axes == (-2,)


@pytest.mark.parametrize('size', [0, -1, 4, 5, 12])
def test_a_group_that_does_not_divide_the_inputs_is_refused(size):
  with pytest.raises(ValueError, match=f'group_size={size} .* 6 inputs.*take'):
    blocks.split(jnp.ones((6, 4)), 'group', size)
  blocks.check('channel', size, 6)  # Has no groups.


def test_an_unknown_granularity_is_refused():
  with pytest.raises(ValueError, match="'row'.*'tensor', 'channel', 'group'"):
    blocks.check('row', 1, 6)


@pytest.mark.parametrize('axes', [None, 0, -1, (-2, -1)])
@pytest.mark.parametrize('shape', [(3, 1911), (16, 512), (512, 256), (1, 7)])
def test_the_largest_and_the_ends_are_those_of_numpy(shape, axes):
  x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
  most = np.max(np.abs(x), axes, keepdims=True)
  np.testing.assert_array_equal(blocks.absmax(jnp.asarray(x), axes), most)
  expected = np.minimum(x.min(axes, keepdims=True), 0)
  found = jax.jit(blocks.extent, static_argnums=1)(x, axes)
  np.testing.assert_array_equal(found[0], expected)
  expected = np.maximum(x.max(axes, keepdims=True), 0)
  np.testing.assert_array_equal(found[1], expected)


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize('axes', [None, 0, -1])
@pytest.mark.parametrize('shape', [(3, 1911), (16, 512), (512, 256)])
def test_what_is_not_finite_is_found_among_many(shape, axes, bad):
  x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
  x[2, 5] = bad
  for wrap in (lambda f: f, jax.jit):
    found = wrap(lambda x: blocks.absmax(x, axes))(x)
    expected = np.max(np.abs(x), axes, keepdims=True)
    np.testing.assert_array_equal(found, expected)
    ends = wrap(lambda x: blocks.extent(x, axes))(x)
    assert not all(np.isfinite(end).all() for end in ends)
    if np.isnan(bad):
      for end in ends:
        np.testing.assert_array_equal(np.isnan(end), np.isnan(expected))


def test_there_is_no_largest_of_nothing():
  assert blocks.absmax(jnp.zeros((0, 3)), 0).tolist() == [[0, 0, 0]]
