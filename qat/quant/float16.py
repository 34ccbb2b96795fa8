"""Numbers that float16 holds, as float32: a file keeps 16 bits of each."""

import jax
from jax import numpy as jnp

# The smallest positive one, and the smallest that keeps all its digits.
SMALLEST = 2.0**-24
NORMAL = 2.0**-14


def nearest(values: jax.Array) -> jax.Array:
  """Values rounded to the nearest float16, as float32.

  A conversion there and back is one that XLA may leave out under `jit`.
  """
  rounded = jax.lax.reduce_precision(values, exponent_bits=5, mantissa_bits=10)
  small = jnp.round(values / SMALLEST) * SMALLEST  # Fewer digits than 11 bits.
  return jnp.where(jnp.abs(values) < NORMAL, small, rounded)
