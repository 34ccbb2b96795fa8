"""Routed products on TPUs: tiles of sorted tokens, each with its expert.

Groups are ragged: a tile of tokens may hold the end of one expert's group and
the beginning of another's, and is then visited once for each. A visit computes
the whole tile with one expert and keeps the rows of that expert. T tiles and E
experts need at most T + E - 1 visits; which tile and which expert a visit has
is read before the kernel starts, so that weights come in time. Visits that are
left over repeat the last one.
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


def visits(
  expert_M: jax.Array, experts: int, tile: int
) -> tuple[jax.Array, jax.Array]:
  """The tile and the expert of each visit.

  Args:
    expert_M: int32, sorted.
    experts: E.
    tile: rows of a tile.

  Returns:
    int32 `[T + E - 1]` twice; by tile, and within one by expert.
  """
  tiles = -(-expert_M.shape[0] // tile)
  total = tiles + experts - 1
  first_T = expert_M[::tile]
  last_T = jnp.append(expert_M[tile - 1 :: tile], expert_M[-1])[:tiles]
  # A tile with the experts 2 to 4 takes three visits, whoever is among them.
  count_T = last_T - first_T + 1
  end_T = jnp.cumsum(count_T)
  visit = jnp.minimum(jnp.arange(total), end_T[-1] - 1)
  tile_V = jnp.searchsorted(end_T, visit, side='right')
  start_V = end_T[tile_V] - count_T[tile_V]
  expert_V = first_T[tile_V] + visit - start_V
  return tile_V.astype(jnp.int32), expert_V.astype(jnp.int32)


def grouped_matmul(
  x_MK: jax.Array,
  packed: packing.Packed,
  expert_M: jax.Array,
  x_scale_M1: jax.Array,
  out_dtype: jax.typing.DTypeLike,
  target: dispatch.Target,
  interpret: bool | pltpu.InterpretParams = False,
) -> jax.Array:
  """See `api.grouped_matmul`; `interpret` as of `packed_matmul.tpu`."""
  rows, outputs = x_MK.shape[0], packed.padded_outputs
  x_MK, rows_M2 = packed_matmul.prepare_input(
    x_MK, x_scale_M1, packed.padded_inputs
  )
  experts, height, _ = packed.data.shape
  tile_M, tile_N = min(rows, TILE_M), min(outputs, TILE_N)
  of_tile, of_expert = visits(expert_M, experts, tile_M)
  y_MN = pl.pallas_call(
    functools.partial(
      _kernel,
      format=packed.format,
      block=packed.block,
      operands=packed_matmul.operands(x_MK, target),
    ),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=2,
      grid=(pl.cdiv(outputs, tile_N), of_tile.shape[0]),
      in_specs=[
        pl.BlockSpec((tile_M, x_MK.shape[1]), lambda j, v, t, e: (t[v], 0)),
        pl.BlockSpec((None, height, tile_N), lambda j, v, t, e: (e[v], 0, j)),
        pl.BlockSpec((tile_M, 1), lambda j, v, t, e: (t[v], 0)),
        pl.BlockSpec((tile_M, 2), lambda j, v, t, e: (t[v], 0)),
        pl.BlockSpec((None, 1, tile_N), lambda j, v, t, e: (e[v], 0, j)),
      ],
      out_specs=pl.BlockSpec((tile_M, tile_N), lambda j, v, t, e: (t[v], j)),
      scratch_shapes=[
        pltpu.VMEM((tile_M, tile_N), packed_matmul.sum_dtype(x_MK)),
        pltpu.VMEM((tile_M, tile_N), jnp.float32),
      ],
    ),
    out_shape=jax.ShapeDtypeStruct((rows, outputs), out_dtype),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'arbitrary')
    ),
    interpret=interpret,
    name=f'grouped_matmul_{packed.format}',
  )(
    *(of_tile, of_expert, x_MK, packed.data, expert_M[:, None], rows_M2),
    packed_matmul.columns(packed),
  )
  return y_MN[:, : packed.outputs]


def _kernel(*refs: jax.Ref, format: str, block: int, operands: str):
  of_tile, of_expert, x_ref, w_ref, mine_ref, rows_ref, scale_ref = refs[:7]
  y_ref, sum_ref, kept_ref = refs[7:]
  visit = pl.program_id(1)
  before = jnp.maximum(visit - 1, 0)

  @pl.when((visit == 0) | (of_tile[visit] != of_tile[before]))
  def _():
    kept_ref[...] = jnp.zeros_like(kept_ref)

  sum_ref[...] = jnp.zeros_like(sum_ref)
  packed_matmul.multiply(
    x_ref, w_ref[...], sum_ref, format=format, block=block, operands=operands
  )
  y_MN = packed_matmul.scaled(
    sum_ref[...], rows_ref[...], scale_ref[...], format
  )
  mine_M1 = mine_ref[...] == of_expert[visit]
  kept_ref[...] = jnp.where(mine_M1, y_MN, kept_ref[...])
  y_ref[...] = kept_ref[...].astype(y_ref.dtype)
