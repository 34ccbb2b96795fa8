"""The formats with learned clipping: where they start, and their gradients."""

import itertools

from jax import numpy as jnp
import numpy as np
import pytest

from tests import slow_clipped
from tests.quant import learned_test

for_clipped = pytest.mark.parametrize(
  ('name', 'granularity'),
  list(itertools.product(learned_test.CLIPPED, ('channel', 'group'))),
)


@for_clipped
def test_clipping_starts_with_nearly_all_of_the_range(name, granularity):
  start = learned_test.spec(name, granularity).start(
    jnp.asarray(learned_test.normal(*learned_test.SHAPE))
  )
  groups = {'channel': 1, 'group': 3}[granularity]
  for value in start.values():
    np.testing.assert_array_equal(value, np.full((3, groups, 5), 4.0))
    assert value.dtype == jnp.float32


@for_clipped
def test_gradients_of_clipping_are_those_of_a_smooth_function(
  name, granularity
):
  made = learned_test.layer(name, granularity, *learned_test.SHAPE)
  dw = learned_test.normal(*learned_test.SHAPE, seed=3)
  names = ('kernel', 'clip_high', 'clip_low')
  value, outside = slow_clipped.smooth(
    *(made[key] for key in names), learned_test.CLIPPED[name]
  )
  assert 0 < outside.mean() < 1  # Both cases were there.
  found = learned_test.gradients(name, granularity, made, dw)
  exact = {key: np.float64(made[key]) for key in names}
  for key in names:
    assert found[key].shape == made[key].shape
    for index in np.ndindex(made[key].shape):

      def at(step, key=key, index=index):
        moved = exact | {key: exact[key].copy()}
        moved[key][index] += step
        return np.sum(dw * value(*moved.values()))

      expected = (at(1e-6) - at(-1e-6)) / 2e-6
      assert found[key][index] == pytest.approx(expected, rel=1e-3, abs=1e-4)
