"""Grids of clipped ranges against their formula in float64."""

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from qat.quant import blocks
from qat.quant import clipped
from qat.quant import grid
from tests import slow_clipped


def example(seed=0, stack=(), groups=3, outputs=6):
  """Weights, one column of them of one sign, and u and l of groups of 8."""
  rng = np.random.default_rng(seed)
  w = rng.normal(size=(*stack, 8 * groups, outputs)).astype(np.float32)
  w[..., 1] = np.abs(w[..., 1])
  high, low = rng.normal(1.5, 1, (2, *stack, groups, outputs)).astype('f4')
  return w, high, low


def call(function, w, high, low, bits, symmetric=False):
  w_GIN, _ = blocks.split(jnp.asarray(w), 'group', 8)
  clip = high[..., None, :], low[..., None, :]
  return function(w_GIN, clip, bits, symmetric)


@pytest.mark.parametrize('symmetric', [False, True])
@pytest.mark.parametrize('bits', grid.BITS)
@pytest.mark.parametrize('stack', [(), (2,)])
def test_codes_and_values_are_the_formula_in_float64(bits, symmetric, stack):
  made = example(bits, stack)
  found = call(clipped.quantize, *made, bits, symmetric)
  codes, values = slow_clipped.quantize(*made, bits, symmetric)
  # A weight in the middle of two levels may go to either.
  middle = np.abs(found.codes - codes)
  assert middle.max() <= 1 and middle.mean() < 0.01
  same = middle == 0
  np.testing.assert_allclose(
    found.dequantize()[same], values[same], rtol=1e-6, atol=1e-7
  )
  assert found.scale.shape == (*stack, 3, 6)
  assert (found.zero is None) == symmetric
  assert found.alphabet == f'int{bits}'
  # What is trained has the same values, up to the last bit.
  trained = call(clipped.fake_quantize, *made, bits, symmetric)
  np.testing.assert_allclose(trained, found.dequantize(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('bits', [2, 4])
def test_gradients_are_those_of_a_smooth_function(bits):
  made = example(bits)
  slope = np.random.default_rng(5).normal(size=made[0].shape).astype('f4')

  def total(*made):
    return jnp.sum(slope * call(clipped.fake_quantize, *made, bits))

  found = jax.grad(total, (0, 1, 2))(*map(jnp.asarray, made))
  value, outside = slow_clipped.smooth(*made, bits)
  assert 0 < outside.mean() < 1
  exact = [np.float64(a) for a in made]
  for i, array in enumerate(exact):
    for index in np.ndindex(array.shape):
      sums = []
      for step in (1e-6, -1e-6):
        moved = [a.copy() for a in exact]
        moved[i][index] += step
        sums.append(np.sum(slope * value(*moved)))
      expected = (sums[0] - sums[1]) / 2e-6
      assert found[i][index] == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_where_nothing_is_clipped_it_is_the_grid_of_the_range():
  w, high, low = example()
  found = call(clipped.quantize, w, high + 50, low + 50, 4)
  w_GIN, axes = blocks.split(jnp.asarray(w), 'group', 8)
  expected = grid.fit(w_GIN, 4, symmetric=False, mse=False, axes=axes)
  np.testing.assert_array_equal(found.scale, expected.scale[:, 0])
  np.testing.assert_array_equal(found.zero, expected.zero[:, 0])
  np.testing.assert_array_equal(
    found.codes, blocks.merge(expected.encode(w_GIN))
  )


def test_the_same_codes_whatever_compiles_them():
  """Of weights of a training step as of those that a file gives back."""
  w, high, low = example(stack=(4,), groups=16, outputs=64)
  plain = call(clipped.quantize, w, high, low, 4)
  jitted = jax.jit(lambda *made: call(clipped.quantize, *made, 4))
  jax.tree.map(np.testing.assert_array_equal, plain, jitted(w, high, low))
  for i in range(4):
    alone = jitted(w[i], high[i], low[i])
    np.testing.assert_array_equal(alone.codes, plain.codes[i])
    np.testing.assert_array_equal(alone.scale, plain.scale[i])


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf, 1e9])
def test_what_a_grid_cannot_cover_makes_its_scale_not_finite(bad):
  w, high, low = example()
  w[9, 2] = bad  # 1e9: a scale beyond float16.
  found = call(clipped.quantize, w, high, low, 4)
  finite = np.isfinite(found.scale)
  assert not finite[1, 2] and finite.sum() == finite.size - 1
  assert not np.isfinite(found.dequantize()[8:16, 2]).all()
