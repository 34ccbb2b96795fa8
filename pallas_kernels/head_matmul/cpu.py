"""A table of bfloat16: a few rows times it, and some of its rows; in C++.

XLA:CPU multiplies one row of bfloat16 in a plain loop, and by a library no
faster than the matrix is read several times over.
"""

import jax
from jax import numpy as jnp

from pallas_kernels import native

MOST_ROWS = 8  # Beyond, a library that multiplies tiles is faster.


def matmul(
  x_MK: jax.Array, w_NK: jax.Array, variant: str | None = None
) -> jax.Array:
  """x @ w^T.

  XLA does not know how to split it over devices.

  Args:
    x_MK: bfloat16.
    w_NK: bfloat16.
    variant: of `native.variants()`; None: the fastest.

  Returns:
    float32 `[M, N]`, summed in float32.

  Raises:
    ValueError: no extension, or not this variant.
  """
  call = jax.ffi.ffi_call(
    'qat_bfloat16_matmul',
    jax.ShapeDtypeStruct((x_MK.shape[0], w_NK.shape[0]), jnp.float32),
    vmap_method='sequential',
  )
  return call(x_MK, w_NK, variant=native.number(variant))


def rows(table_VD: jax.Array, ids_M: jax.Array) -> jax.Array:
  """Rows of a table by number, bfloat16 `[M, D]`; NaN where there is none.

  XLA:CPU copies the table to take rows of 16 bits from it.

  Args:
    table_VD: bfloat16.
    ids_M: int32.

  Raises:
    ValueError: no extension.
  """
  native.number(None)
  shape = (ids_M.shape[0], table_VD.shape[1])
  call = jax.ffi.ffi_call(
    'qat_bfloat16_rows',
    jax.ShapeDtypeStruct(shape, table_VD.dtype),
    vmap_method='sequential',
  )
  return call(table_VD, ids_M)
