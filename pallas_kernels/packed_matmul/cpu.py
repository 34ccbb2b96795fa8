"""Activations times packed weights, by the C++ extension."""

from collections.abc import Sequence

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
  return several(x_MK, [packed], x_scale_M1, out_dtype)[0]


def several(
  x_MK: jax.Array,
  packed: Sequence[packing.Packed],
  x_scale_M1: jax.Array,
  out_dtype: jax.typing.DTypeLike,
) -> list[jax.Array]:
  """`packed_matmul` with each of several matrices, in one native call."""
  return [
    (y_MN.astype(jnp.float32) * x_scale_M1 * p.scale).astype(out_dtype)
    for y_MN, p in zip(several_sums(x_MK, packed), packed, strict=True)
  ]


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
  return several_sums(x_MK, [packed], variant)[0]


def several_sums(
  x_MK: jax.Array,
  packed: Sequence[packing.Packed],
  variant: str | None = None,
) -> list[jax.Array]:
  """`sums` with each of several matrices, in one native call.

  Args:
    x_MK: int8 `[M, K]`.
    packed: at least one, of one format and K; else as of `sums`.
    variant: as of `sums`.

  Returns:
    For each matrix int32 `[M, N]`, exact.

  Raises:
    ValueError: as `sums`, or the formats differ.
  """
  formats = {p.format for p in packed}
  if len(formats) != 1:
    raise ValueError(f'Matrices of {sorted(formats)}; want them of one format.')
  if {(p.axis, p.block) for p in packed} != {(-1, BLOCK)}:
    raise ValueError(
      f'A matrix is packed otherwise; want axis -1 and block {BLOCK}.'
    )
  planes, _, step, low = packing.FORMATS[packed[0].format]
  if planes == 1:
    low = -128  # The extension's indices of int8 codes begin at 0.
  call = jax.ffi.ffi_call(
    f'qat_packed_matmul_{8 // planes}',
    [
      jax.ShapeDtypeStruct((x_MK.shape[0], p.data.shape[0]), jnp.int32)
      for p in packed
    ],
    vmap_method='sequential',
  )
  ys = call(
    *(x_MK, *(p.data for p in packed)),
    step=step,
    low=low,
    variant=native.number(variant),
  )
  return [y_MN[:, : p.outputs] for y_MN, p in zip(ys, packed, strict=True)]
