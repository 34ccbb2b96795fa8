"""Both branches on TPUs: a tile of tokens stays while all weights pass by.

The grid goes over tiles of tokens and, within one, over the tiles of outputs:
first those of the wide branch, then those of the narrow one. Inputs are not
divided. While one branch is computed, the other's tile is not exchanged.
"""

import functools

import jax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch
from pallas_kernels import packing
from pallas_kernels.packed_matmul import tpu as packed_matmul

TILE_M, TILE_N = 128, 256


def decoupled_ffn_up(
  x_MK: jax.Array,
  wide: packing.Packed,
  narrow: packing.Packed,
  x_scale_M1: jax.Array,
  out_dtype: jax.typing.DTypeLike,
  target: dispatch.Target,
  interpret: bool | pltpu.InterpretParams = False,
) -> tuple[jax.Array, jax.Array]:
  """See `api.decoupled_ffn_up`; `interpret` as of `packed_matmul.tpu`."""
  rows = x_MK.shape[0]
  branches = wide, narrow
  x_MK, rows_M2 = packed_matmul.prepare_input(
    x_MK, x_scale_M1, max(b.padded_inputs for b in branches)
  )
  operands = packed_matmul.operands(x_MK, target)
  tile_M = min(rows, TILE_M)
  tiles_N = [min(b.padded_outputs, TILE_N) for b in branches]
  first, second = (
    pl.cdiv(b.padded_outputs, n) for b, n in zip(branches, tiles_N, strict=True)
  )

  def of_wide(j):
    return jnp.minimum(j, first - 1)

  def of_narrow(j):
    return jnp.maximum(j - first, 0)

  places = of_wide, of_narrow
  out = pl.pallas_call(
    functools.partial(
      _kernel,
      first=first,
      layouts=[(b.format, b.block) for b in branches],
      operands=operands,
    ),
    grid=(pl.cdiv(rows, tile_M), first + second),
    in_specs=[
      pl.BlockSpec((tile_M, x_MK.shape[1]), lambda i, j: (i, 0)),
      pl.BlockSpec((tile_M, 2), lambda i, j: (i, 0)),
      *(
        pl.BlockSpec((height, n), lambda i, j, at=at: (0, at(j)))
        for b, n, at in zip(branches, tiles_N, places, strict=True)
        for height in (b.data.shape[0], 1)
      ),
    ],
    out_specs=[
      pl.BlockSpec((tile_M, n), lambda i, j, at=at: (i, at(j)))
      for n, at in zip(tiles_N, places, strict=True)
    ],
    out_shape=[
      jax.ShapeDtypeStruct((rows, b.padded_outputs), out_dtype)
      for b in branches
    ],
    scratch_shapes=[
      pltpu.VMEM((tile_M, n), packed_matmul.sum_dtype(x_MK)) for n in tiles_N
    ],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'arbitrary')
    ),
    interpret=interpret,
    name='decoupled_ffn_up',
  )(
    *(x_MK, rows_M2, wide.data, packed_matmul.columns(wide)),
    *(narrow.data, packed_matmul.columns(narrow)),
  )
  return tuple(y[:, : b.outputs] for y, b in zip(out, branches, strict=True))


def _kernel(
  *refs: jax.Ref, first: int, layouts: list[tuple[str, int]], operands: str
):
  x_ref, rows_ref, *weights, y_wide, y_narrow, sum_wide, sum_narrow = refs
  w_wide, scale_wide, w_narrow, scale_narrow = weights

  def branch(layout, w_ref, scale_ref, y_ref, sum_ref):
    format, block = layout
    sum_ref[...] = jnp.zeros_like(sum_ref)
    packed_matmul.multiply(
      *(x_ref, w_ref[...], sum_ref),
      format=format,
      block=block,
      operands=operands,
    )
    packed_matmul.finish(rows_ref, scale_ref, y_ref, sum_ref, format)

  @pl.when(pl.program_id(1) < first)
  def _():
    branch(layouts[0], w_wide, scale_wide, y_wide, sum_wide)

  @pl.when(pl.program_id(1) >= first)
  def _():
    branch(layouts[1], w_narrow, scale_narrow, y_narrow, sum_narrow)
