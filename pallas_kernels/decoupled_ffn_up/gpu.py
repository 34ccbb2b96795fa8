"""Both branches on Hopper GPUs: one kernel; each program has one branch."""

import jax

from pallas_kernels import dispatch
from pallas_kernels import packing
from pallas_kernels.packed_matmul import gpu as packed_matmul


def decoupled_ffn_up(
  x_MK: jax.Array,
  wide: packing.Packed,
  narrow: packing.Packed,
  x_scale_M1: jax.Array,
  out_dtype: jax.typing.DTypeLike,
  target: dispatch.Target,
  interpret: object | None = None,
) -> tuple[jax.Array, jax.Array]:
  """See `api.decoupled_ffn_up`; `interpret` as of `packed_matmul.gpu`.

  Programs of both branches read the same tiles of x, from the cache when they
  run at the same time.
  """
  del target
  y_wide, y_narrow = packed_matmul.products(
    *(x_MK, [wide, narrow], x_scale_M1, out_dtype, interpret),
    name='decoupled_ffn_up',
  )
  return y_wide, y_narrow
