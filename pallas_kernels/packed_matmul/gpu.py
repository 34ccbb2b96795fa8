"""Packed products on Hopper GPUs, in Mosaic GPU: weights stay where they are.

The tensor cores multiply int8, and a byte of packed weights, with all but one
plane masked away, is an int8 number: the index of that plane times base^b. So a
plane costs one AND for four weights and no shift. Only the highest plane holds
the sign bit; it is flipped first, which makes

  byte of plane b = base^b * index,               b < top
  byte of the top = base^top * (index - base / 2)

The powers of the base are undone in the sums, exactly, because every term has
the factor:

- Few tokens ('decode'): each plane has sums of its own, which are shifted and
  added at the end. The weights are read once.
- More tokens ('prefill'): planes follow each other from the highest on, and
  between two of them the sums are shifted (Horner's rule). Registers then hold
  one tile of sums, as large as for int8 weights; the bytes of a tile are read
  once for each plane, mostly from the cache.

With S the sum of index * x, what was subtracted is added again with `low`:

  x @ codes = step * S + low * rowsum(x)

Weights are the left operand, for they come from registers; so a tile of sums is
[N, M] and is turned when it is stored.
"""

from collections.abc import Sequence
import functools

import jax
from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import dispatch
from pallas_kernels import packing
from pallas_kernels.packed_matmul import gpu_tiles

UNIT = 8  # A matrix in memory has a multiple of these rows.


def packed_matmul(
  x_MK: jax.Array,
  packed: packing.Packed,
  x_scale_M1: jax.Array,
  out_dtype: jax.typing.DTypeLike,
  target: dispatch.Target,
  interpret: object | None = None,
) -> jax.Array:
  """See `api.packed_matmul`.

  Args:
    x_MK: int8 or bfloat16.
    packed: of '1bit', '2bit', 'int4' or 'int8', with K last and blocks of 128.
    x_scale_M1: float32.
    out_dtype: of what is returned.
    target: a GPU of `dispatch.TABLE`; they all run the same.
    interpret: parameters of Pallas's interpreter of GPUs; None: compile.
  """
  del target
  return products(
    *(x_MK, [packed], x_scale_M1, out_dtype, interpret),
    name=f'packed_matmul_{packed.format}',
  )[0]


def products(
  x_MK: jax.Array,
  matrices: Sequence[packing.Packed],
  x_scale_M1: jax.Array,
  out_dtype: jax.typing.DTypeLike,
  interpret: object | None,
  name: str,
) -> list[jax.Array]:
  """x times each of some matrices with the same K, by one kernel."""
  rows = x_MK.shape[0]
  plan = gpu_tiles.plan(rows)
  tiles = [pl.cdiv(packed.outputs, plan.tile_N) for packed in matrices]
  padded_M = pl.cdiv(rows, plan.tile_M) * plan.tile_M
  widest = max(packed.padded_inputs for packed in matrices)
  x_MK = jnp.pad(x_MK, ((0, -rows % UNIT), (0, widest - x_MK.shape[1])))
  operands = []
  for packed, count in zip(matrices, tiles, strict=True):
    scale_N = jnp.broadcast_to(packed.scale[0], (packed.outputs,))
    low_M = low(x_MK[:, : packed.padded_inputs], packed)
    operands += [
      jnp.pad(packed.data, ((0, -packed.data.shape[0] % UNIT), (0, 0))),
      _filled(low_M, padded_M),
      _filled(scale_N, count * plan.tile_N),
    ]
  y = plan.call(
    functools.partial(
      _kernel,
      multiply=plan.multiply,
      formats=[packed.format for packed in matrices],
      tiles=tiles,
    ),
    [
      jax.ShapeDtypeStruct((padded_M, count * plan.tile_N), out_dtype)
      for count in tiles
    ],
    (sum(tiles), padded_M // plan.tile_M),
    name,
    interpret,
  )(x_MK, _filled(x_scale_M1[:, 0], padded_M), *operands)
  return [
    y_MN[:rows, : packed.outputs]
    for y_MN, packed in zip(y, matrices, strict=True)
  ]


def low(x_MK: jax.Array, packed: packing.Packed) -> jax.Array:
  """What is added to step * sums, `[M]`."""
  planes, base, step, low = packing.FORMATS[packed.format]
  kind = gpu_tiles.sum_dtype(x_MK.dtype)
  if planes == 1:
    return jnp.zeros(x_MK.shape[:1], kind)
  x_MnbL = x_MK.reshape(x_MK.shape[0], -1, planes, packed.block)
  x_Mb = jnp.sum(x_MnbL, (1, 3), dtype=kind)
  return low * x_Mb.sum(1) + step * (base // 2) * x_Mb[:, -1]


def _filled(a_N: jax.Array, size: int) -> jax.Array:
  """With zeros up to a size."""
  return jnp.pad(a_N, (0, size - a_N.shape[0]))


def _kernel(x_gmem, x_scale_M, *refs, y_smem, multiply, formats, tiles):
  """A tile of the outputs of one of the matrices."""
  n, first = lax.axis_index('n'), 0
  for i, (format, count) in enumerate(zip(formats, tiles, strict=True)):
    w_gmem, low_M, w_scale_N = refs[3 * i : 3 * i + 3]
    y_gmem = refs[3 * len(formats) + i]
    store = functools.partial(
      *(gpu_tiles.store, low_M, x_scale_M, w_scale_N, y_gmem, y_smem, format)
    )
    run = functools.partial(multiply, first, x_gmem, w_gmem, store, format)
    if len(formats) == 1:
      run()
    else:
      pl.when((n >= first) & (n < first + count))(run)
    first += count
