"""Each token times the packed matrix of its expert."""

import jax
from jax import numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels import packing
from pallas_kernels.grouped_matmul import gpu
from pallas_kernels.grouped_matmul import reference
from pallas_kernels.grouped_matmul import tpu
from pallas_kernels.packed_matmul import api as packed_matmul

IMPLEMENTATIONS = {
  'reference': reference.grouped_matmul,
  'tpu': tpu.grouped_matmul,
  'gpu': gpu.grouped_matmul,
}


def grouped_matmul(
  x_MK: jax.Array,
  packed: packing.Packed,
  expert_M: jax.Array,
  *,
  x_scale_M1: jax.Array | None = None,
  out_dtype: jax.typing.DTypeLike = jnp.float32,
  implementation: str | None = None,
  target: dispatch.Target | None = None,
) -> jax.Array:
  """y[m] = (x[m] @ codes[expert[m]]) * scales, tokens sorted by expert.

  Args:
    x_MK: int8 codes or bfloat16 `[M, K]`, M at least 1.
    packed: a stack of E matrices.
    expert_M: int32, from 0 to E - 1 and never falling; an expert may have no
      tokens. What is not sorted is not noticed, and its result is wrong.
    x_scale_M1: float32, of int8 codes; None: 1.
    out_dtype: float32 or bfloat16.
    implementation: of `dispatch.TABLE`; None: the fastest that can run.
    target: the device to compile for; None: that of this process.

  Returns:
    `[M, N]`.

  Raises:
    ValueError: shapes do not fit, or `implementation` cannot do this.
  """
  if packed.data.ndim != 3:
    raise ValueError(
      f'Packed bytes have shape {packed.data.shape}; want a stack of matrices.'
    )
  one = jax.eval_shape(lambda p: jax.tree.map(lambda a: a[0], p), packed)
  packed_matmul.check(x_MK, one, x_scale_M1, out_dtype)
  if expert_M.shape != x_MK.shape[:1] or expert_M.dtype != jnp.int32:
    raise ValueError(
      f'expert_M is {expert_M.dtype}{expert_M.shape}; want int32'
      f' {x_MK.shape[:1]}.'
    )
  name, x_scale_M1, target = packed_matmul.chosen(
    'grouped_matmul', x_MK, packed, x_scale_M1, implementation, target
  )
  return IMPLEMENTATIONS[name](
    x_MK, packed, expert_M, x_scale_M1, out_dtype, target
  )
