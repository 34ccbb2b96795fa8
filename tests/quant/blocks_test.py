"""Blocks of a matrix: what stands together, and what is refused."""

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
