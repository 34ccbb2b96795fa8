"""The specification: two packed products."""

import jax

from pallas_kernels import dispatch
from pallas_kernels import packing
from pallas_kernels.packed_matmul import reference


def decoupled_ffn_up(
  x_MK: jax.Array,
  wide: packing.Packed,
  narrow: packing.Packed,
  x_scale_M1: jax.Array,
  out_dtype: jax.typing.DTypeLike,
  target: dispatch.Target,
) -> tuple[jax.Array, jax.Array]:
  """See `api.decoupled_ffn_up`."""
  rest = x_scale_M1, out_dtype, target
  return (
    reference.packed_matmul(x_MK, wide, *rest),
    reference.packed_matmul(x_MK, narrow, *rest),
  )
