"""What pQuant's decoupled feed-forward layer does first, for both branches."""

import jax
from jax import numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels import packing
from pallas_kernels.decoupled_ffn_up import gpu
from pallas_kernels.decoupled_ffn_up import reference
from pallas_kernels.decoupled_ffn_up import tpu
from pallas_kernels.packed_matmul import api as packed_matmul

IMPLEMENTATIONS = {
  'reference': reference.decoupled_ffn_up,
  'tpu': tpu.decoupled_ffn_up,
  'gpu': gpu.decoupled_ffn_up,
}


def decoupled_ffn_up(
  x_MK: jax.Array,
  wide: packing.Packed,
  narrow: packing.Packed,
  *,
  x_scale_M1: jax.Array | None = None,
  out_dtype: jax.typing.DTypeLike = jnp.float32,
  implementation: str | None = None,
  target: dispatch.Target | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Gate and up of the 1-bit and of the 8-bit branch, from one read of x.

  pQuant (2602.22592), appendix A. Gate and up of a branch are one matrix, side
  by side, packed with a scale for each column.

  Args:
    x_MK: int8 codes or bfloat16 `[M, K]`.
    wide: `[K, 2 (F - r)]`, '1bit'.
    narrow: `[K, 2 r]`, 'int8'.
    x_scale_M1: float32, of int8 codes; None: 1.
    out_dtype: float32 or bfloat16.
    implementation: of `dispatch.TABLE`; None: the fastest that can run.
    target: the device to compile for; None: that of this process.

  Returns:
    `[M, 2 (F - r)]` and `[M, 2 r]`.

  Raises:
    ValueError: shapes do not fit, or `implementation` cannot do this.
  """
  for packed, format in ((wide, '1bit'), (narrow, 'int8')):
    packed_matmul.check(x_MK, packed, x_scale_M1, out_dtype)
    if packed.format != format:
      raise ValueError(f'A branch is {packed.format!r}; want {format!r}.')
  if (narrow.axis, narrow.block) != (wide.axis, wide.block):
    raise ValueError('The branches are packed along other axes or in blocks.')
  name, x_scale_M1, target = packed_matmul.chosen(
    'decoupled_ffn_up', x_MK, wide, x_scale_M1, implementation, target
  )
  return IMPLEMENTATIONS[name](
    x_MK, wide, narrow, x_scale_M1, out_dtype, target
  )
