"""The cosine of two trees, and what a random direction's is."""

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from qat.zo import alignment
from qat.zo import spsa

A = {'x': jnp.float32([3, 0]), 'y': jnp.float32([[4]])}


@pytest.mark.parametrize(
  ('b', 'expected'),
  [
    (jax.tree.map(lambda x: 7 * x, A), 1),
    (jax.tree.map(lambda x: -x, A), -1),
    ({'x': jnp.float32([0, 2]), 'y': jnp.float32([[0]])}, 0),
    ({'x': jnp.float32([1, 0]), 'y': jnp.float32([[0]])}, 0.6),
    ({'x': jnp.bfloat16([0, 0]), 'y': jnp.bfloat16([[0.5]])}, 0.8),
  ],
)
def test_cosine(b, expected):
  np.testing.assert_allclose(alignment.cosine(A, b), expected, atol=1e-6)


def test_an_inner_product_is_in_float32():
  b = {'x': jnp.bfloat16([2, 1]), 'y': jnp.bfloat16([[0.5]])}
  found = alignment.dot(A, b)
  assert (float(found), found.dtype) == (8, jnp.float32)


def test_no_direction_has_no_cosine():
  zero = jax.tree.map(jnp.zeros_like, A)
  assert np.isnan(alignment.cosine(A, zero))
  nan = jax.tree.map(lambda x: jnp.nan * x, A)
  assert np.isnan(alignment.cosine(nan, A))


@pytest.mark.parametrize('directions', [1, 8])
def test_few_directions_in_many_dimensions(directions):
  d, tries = 900, 400
  options = spsa.Options(
    eps=0.1, directions=directions, clip=0.0, perturbed='w', resolution=0.0
  )
  w = {'w': jnp.zeros(d)}
  gradient = {'w': jnp.linspace(-1, 1, d)}

  def one(key):
    estimate = spsa.gradient(
      lambda p: jnp.sum(p['w'] * gradient['w']), w, key, options
    )[1]
    return alignment.cosine(estimate, gradient)

  keys = jax.random.split(jax.random.key(0), tries)
  found = np.float64(jax.jit(lambda k: jax.lax.map(one, k))(keys))
  # A slope is normal; of one direction, its sign is always right.
  expected = (
    (2 / np.pi / d) ** 0.5 if directions == 1 else (directions / d) ** 0.5
  )
  assert (found > 0).all()
  tolerance = 4 * found.std() / tries**0.5 + 0.05 * expected * (directions > 1)
  assert abs(found.mean() - expected) < tolerance
