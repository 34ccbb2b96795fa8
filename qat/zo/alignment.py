"""How well an estimate of a gradient points where the gradient does."""

from typing import Any

import jax
from jax import numpy as jnp


def cosine(estimate: Any, gradient: Any) -> jax.Array:
  """Cosine of the angle between two trees, each taken as one long vector.

  One random direction in d parameters, with an exact slope, has sqrt(2 / (pi
  d)) on average; the estimate from q much fewer than d of them about
  sqrt(q / d).

  Args:
    estimate: a tree of arrays.
    gradient: one like it. Zeros in both, where nothing is trained, change
      nothing; leave parameters out of both that only one of them covers.

  Returns:
    float32; NaN where a tree is zero, or is not finite.
  """
  norms = jnp.sqrt(dot(estimate, estimate)) * jnp.sqrt(dot(gradient, gradient))
  return dot(estimate, gradient) / norms


def dot(a: Any, b: Any) -> jax.Array:
  """The inner product of two trees of one structure, float32."""
  products = jax.tree.map(
    lambda x, y: jnp.sum(x.astype(jnp.float32) * y.astype(jnp.float32)), a, b
  )
  return sum(jax.tree.leaves(products), jnp.float32(0))
