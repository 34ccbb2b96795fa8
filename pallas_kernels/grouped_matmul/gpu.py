"""Routed products on Hopper GPUs: tiles of tokens that share an expert.

Tokens are moved apart until each expert's begin with a tile of their own. Then
a tile is a packed product like any other, with the weights of its expert; which
one that is, each program reads. T tiles of t tokens hold the M tokens of E
experts when T is (M + E (t - 1)) / t, rounded down: at worst every expert has
one token more than full tiles. Tiles that are left over are not computed.
"""

import functools

import jax
from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import dispatch
from pallas_kernels import packing
from pallas_kernels.packed_matmul import gpu as packed_matmul
from pallas_kernels.packed_matmul import gpu_tiles


def places(
  expert_M: jax.Array, experts: int, tile: int
) -> tuple[jax.Array, jax.Array]:
  """Where each token goes, and whose each tile is.

  Args:
    expert_M: int32, sorted.
    experts: E.
    tile: tokens of a tile.

  Returns:
    int32 `[M]`: the token's row; `[T]`: the tile's expert, E for none.
  """
  rows = expert_M.shape[0]
  total = min(rows, (rows + experts * (tile - 1)) // tile)
  ids_E = jnp.arange(experts)
  first_E = jnp.searchsorted(expert_M, ids_E)
  count_E = jnp.searchsorted(expert_M, ids_E, side='right') - first_E
  end_E = jnp.cumsum(pl.cdiv(count_E, tile))  # In tiles.
  start_E = (end_E - pl.cdiv(count_E, tile)) * tile - first_E
  row_M = jnp.arange(rows) + start_E[expert_M]
  expert_T = jnp.searchsorted(end_E, jnp.arange(total), side='right')
  return row_M.astype(jnp.int32), expert_T.astype(jnp.int32)


def grouped_matmul(
  x_MK: jax.Array,
  packed: packing.Packed,
  expert_M: jax.Array,
  x_scale_M1: jax.Array,
  out_dtype: jax.typing.DTypeLike,
  target: dispatch.Target,
  interpret: object | None = None,
) -> jax.Array:
  """See `api.grouped_matmul`; `interpret` as of `packed_matmul.gpu`."""
  del target
  experts, columns, width = packed.data.shape
  plan = gpu_tiles.plan(pl.cdiv(x_MK.shape[0], experts))
  row_M, expert_T = places(expert_M, experts, plan.tile_M)
  padded_M = expert_T.shape[0] * plan.tile_M
  rest = packed.padded_inputs - packed.inputs
  x_MK = jnp.pad(x_MK, ((0, 0), (0, rest)))
  apart_MK = jnp.zeros((padded_M, x_MK.shape[1]), x_MK.dtype)
  apart_MK = apart_MK.at[row_M].set(x_MK, unique_indices=True)
  x_scale_M = jnp.zeros((padded_M,)).at[row_M].set(x_scale_M1[:, 0])
  tiles = pl.cdiv(packed.outputs, plan.tile_N)
  padded_N = tiles * plan.tile_N
  # Tiles of one expert's columns must not reach into the next one's.
  w_ENB = jnp.pad(packed.data, ((0, 0), (0, padded_N - columns), (0, 0)))
  scale_EN = jnp.broadcast_to(packed.scale[:, 0], (experts, packed.outputs))
  scale_EN = jnp.pad(scale_EN, ((0, 0), (0, padded_N - packed.outputs)))
  (y_MN,) = plan.call(
    functools.partial(
      _kernel,
      multiply=plan.multiply,
      format=packed.format,
      experts=experts,
      tiles=tiles,
    ),
    [jax.ShapeDtypeStruct((padded_M, padded_N), out_dtype)],
    (tiles, expert_T.shape[0]),
    f'grouped_matmul_{packed.format}',
    interpret,
  )(
    *(apart_MK, x_scale_M, expert_T, w_ENB.reshape(-1, width)),
    *(packed_matmul.low(apart_MK, packed), scale_EN.reshape(-1)),
  )
  return y_MN[row_M, : packed.outputs]


def _kernel(
  x_gmem,
  x_scale_M,
  expert_T,
  w_gmem,
  low_M,
  w_scale_EN,
  y_gmem,
  *,
  y_smem,
  multiply,
  format,
  experts,
  tiles,
):
  """A tile of the outputs of one expert."""
  expert = expert_T[lax.axis_index('m')]
  before = expert * tiles  # Tiles of the experts before this one.
  columns = w_gmem.shape[0] // experts

  def store(sum_NM, group, start_M, start_N):
    scale_N = w_scale_EN.at[pl.ds(expert * columns, columns)]
    gpu_tiles.store(
      *(low_M, x_scale_M, scale_N, y_gmem, y_smem, format),
      *(sum_NM, group, start_M, start_N - expert * columns),
    )

  @pl.when(expert < experts)
  def _():
    multiply(-before, x_gmem, w_gmem, store, format)
