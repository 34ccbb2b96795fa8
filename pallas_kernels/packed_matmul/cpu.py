"""Activations times packed weights, by the C++ extension."""

import jax
from jax import numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels import native
from pallas_kernels import packing

BLOCK = 64  # Bytes of a block: an AVX512 register.


def packed_matmul(
  x_MK: jax.Array,
  packed: packing.Packed,
  x_scale_M1: jax.Array,
  out_dtype: jax.typing.DTypeLike,
  target: dispatch.Target,
) -> jax.Array:
  """(x @ codes) * x_scale * w_scale; see `api.packed_matmul`."""
  del target  # Its processor is asked what it can do.
  y_MN = sums(x_MK, packed).astype(jnp.float32)
  return (y_MN * x_scale_M1 * packed.scale).astype(out_dtype)


def sums(
  x_MK: jax.Array, packed: packing.Packed, variant: str | None = None
) -> jax.Array:
  """x @ codes.

  Args:
    x_MK: int8 `[M, K]`.
    packed: of '1bit', '2bit', 'int4' or 'int8', axis -1 and block 64.
    variant: of `native.variants()`; None: the fastest.

  Returns:
    int32 `[M, N]`, exact.

  Raises:
    ValueError: no extension, or not this variant.
  """
  planes, _, step, low = packing.FORMATS[packed.format]
  if planes == 1:
    low = -128  # The extension's indices of int8 codes begin at 0.
  call = jax.ffi.ffi_call(
    f'qat_packed_matmul_{8 // planes}',
    jax.ShapeDtypeStruct((x_MK.shape[0], packed.data.shape[0]), jnp.int32),
    vmap_method='sequential',
  )
  y_MN = call(
    *(x_MK, packed.data),
    step=step,
    low=low,
    variant=native.number(variant),
  )
  return y_MN[:, : packed.outputs]
