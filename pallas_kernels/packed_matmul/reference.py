"""The specification: weights are unpacked, then multiplied."""

import jax
from jax import lax
from jax import numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels import packing


def packed_matmul(
  x_MK: jax.Array,
  packed: packing.Packed,
  x_scale_M1: jax.Array,
  out_dtype: jax.typing.DTypeLike,
  target: dispatch.Target,
) -> jax.Array:
  """(x @ codes) * x_scale * w_scale; see `api.packed_matmul`."""
  del target  # The same everywhere.
  codes_KN = packing.unpack(packed)
  if x_MK.dtype == jnp.int8:
    y_MN = lax.dot(x_MK, codes_KN, preferred_element_type=jnp.int32)
    y_MN = y_MN.astype(jnp.float32)
  else:
    y_MN = lax.dot(
      x_MK,
      codes_KN.astype(x_MK.dtype),
      precision='highest',
      preferred_element_type=jnp.float32,
    )
  return (y_MN * x_scale_M1 * packed.scale).astype(out_dtype)
