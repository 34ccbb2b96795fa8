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
  native.number('avx512_vnni')
  shape = (x_MK.shape[0], w_KN.shape[1])
  call = jax.ffi.ffi_call(
    'qat_int8_matmul',
    jax.ShapeDtypeStruct(shape, jnp.float32),
    vmap_method='sequential',
  )
  return call(x_MK, w_KN, scale_M1, scale_1N)
