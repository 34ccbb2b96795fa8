"""The specification: RMSNorm, then the largest entry of a token is 127."""

import jax
from jax import lax
from jax import numpy as jnp

from pallas_kernels import dispatch

TINY = 1e-5  # Below it a token's largest entry is taken to be as large.


def act_quant(
  x_MD: jax.Array, gain_D: jax.Array, eps: float, target: dispatch.Target
) -> tuple[jax.Array, jax.Array]:
  """Codes and scales of the normed x; see `api.act_quant`."""
  del target  # The same everywhere.
  return normed_codes(x_MD, gain_D[None], eps)


def normed_codes(
  x_MD: jax.Array, gain_1D: jax.Array, eps: float
) -> tuple[jax.Array, jax.Array]:
  """The arithmetic, which kernels share: int8 `[M, D]`, float32 `[M, 1]`."""
  x32_MD = x_MD.astype(jnp.float32)
  square_M1 = jnp.mean(jnp.square(x32_MD), -1, keepdims=True)
  y_MD = x32_MD * lax.rsqrt(square_M1 + eps) * gain_1D
  # A model's norm gives what it was given: a type of 16 bits rounds here.
  y_MD = y_MD.astype(x_MD.dtype).astype(jnp.float32)
  size_M1 = jnp.maximum(jnp.max(jnp.abs(y_MD), -1, keepdims=True), TINY)
  # XLA:CPU's maximum of several rows may pass over a NaN; its sum does not.
  sum_M1 = jnp.sum(y_MD, -1, keepdims=True)
  size_M1 = jnp.where(jnp.isnan(sum_M1), jnp.nan, size_M1)
  codes_MD = jnp.clip(jnp.round(y_MD * (127 / size_M1)), -128, 127)
  return codes_MD.astype(jnp.int8), size_M1 / 127
