"""Codes times codes with their scales, by the C++ extension."""

import jax
from jax import numpy as jnp

from pallas_kernels import native


def runs_here() -> bool:
  """Whether there are the extension and AVX512-VNNI."""
  return 'avx512_vnni' in native.variants()


def matmul(
  x_MK: jax.Array, w_KN: jax.Array, scale_M1: jax.Array, scale_1N: jax.Array
) -> jax.Array:
  """(x @ w) * scale_1N * scale_M1, in this order: bit for bit what XLA gives.

  XLA does not know how to split it over devices.

  Args:
    x_MK: int8.
    w_KN: int8.
    scale_M1: float32 `[M, 1]` or `[1, 1]`.
    scale_1N: float32 `[1, N]` or `[1, 1]`.

  Returns:
    float32 `[M, N]`.

  Raises:
    ValueError: where `runs_here` is false.
  """
  y_1MN = grouped_matmul(
    x_MK[None], w_KN[None], jnp.zeros(1, jnp.int32), scale_M1, scale_1N
  )
  return y_1MN[0]


def grouped_matmul(
  x_GMK: jax.Array,
  w_EKN: jax.Array,
  expert_G: jax.Array,
  scale_GM1: jax.Array,
  scale_E1N: jax.Array,
) -> jax.Array:
  """Each group of rows times the matrix of its expert, scaled as in `matmul`.

  Args:
    x_GMK: int8.
    w_EKN: int8.
    expert_G: int32, from 0 to E - 1.
    scale_GM1: float32, one for each row, or one.
    scale_E1N: float32, for each expert one for each column, or one.

  Returns:
    float32 `[G, M, N]`.

  Raises:
    ValueError: where `runs_here` is false.
  """
  native.number('avx512_vnni')
  shape = (*x_GMK.shape[:2], w_EKN.shape[2])
  call = jax.ffi.ffi_call(
    'qat_int8_matmul',
    jax.ShapeDtypeStruct(shape, jnp.float32),
    vmap_method='sequential',
  )
  return call(x_GMK, w_EKN, expert_G, scale_GM1, scale_E1N)
