"""The specification: every expert for every token, of which one is kept."""

import jax
from jax import numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels import packing
from pallas_kernels.packed_matmul import reference


def grouped_matmul(
  x_MK: jax.Array,
  packed: packing.Packed,
  expert_M: jax.Array,
  x_scale_M1: jax.Array,
  out_dtype: jax.typing.DTypeLike,
  target: dispatch.Target,
) -> jax.Array:
  """See `api.grouped_matmul`."""
  y_EMN = jax.vmap(
    lambda one: reference.packed_matmul(
      x_MK, one, x_scale_M1, out_dtype, target
    )
  )(packed)
  return jnp.take_along_axis(y_EMN, expert_M[None, :, None], axis=0)[0]
