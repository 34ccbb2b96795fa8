"""The specification: the latent weight becomes codes, then is multiplied."""

import jax
from jax import lax
from jax import numpy as jnp

from pallas_kernels import dispatch


def quantized_train_matmul(
  x_MK: jax.Array,
  x_scale_M1: jax.Array,
  w_KN: jax.Array,
  mean_1N: jax.Array,
  scale_1N: jax.Array,
  target: dispatch.Target,
) -> jax.Array:
  """See `api.quantized_train_matmul`."""
  del target  # The same everywhere.
  y_MN = lax.dot(x_MK, signs(w_KN, mean_1N), preferred_element_type=jnp.int32)
  return y_MN.astype(jnp.float32) * scale_1N * x_scale_M1


def signs(w_KN: jax.Array, mean_1N: jax.Array) -> jax.Array:
  """BitNet's codes of a latent weight: int8, 1 above the mean, else -1."""
  return jnp.where(w_KN > mean_1N, 1, -1).astype(jnp.int8)
