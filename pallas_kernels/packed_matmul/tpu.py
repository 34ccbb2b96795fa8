"""Packed products on TPUs: weights are unpacked between memory and matrix unit.

Four bytes of packed weights are one 32-bit word: `(word >> shift) & mask` has
the indices of one plane, a byte each, and is read as int8 without moving
anything. Multiplied are the indices, 0 to 2^bits - 1; with S = x @ index and
code = step * index + low,

  x @ codes = step * S + low * rowsum(x)

On chips without an int8 matrix unit (`dispatch.TPU_OPERANDS`) both operands
become bfloat16. The products of one step of the grid sum up to less than 2^24,
so float32 holds them exactly; steps are added as int32.
"""

import functools

import jax
from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch
from pallas_kernels import packing

# Rows of x up to which weights, not products, set the time; then a step takes
# more of them, for few and long reads of memory.
DECODE_ROWS = 32
# Most rows of x, inputs and outputs in a step: of few rows, and of many. With
# 1,024 inputs int8 codes sum up to at most 127 * 128 * 1024 < 2^24.
TILES = {'decode': (32, 4096, 512), 'prefill': (256, 1024, 256)}
EXACT_INPUTS = 1024


def tiles(rows: int, packed: packing.Packed) -> tuple[int, int, int]:
  """Rows of x, blocks of packed bytes and outputs in one step of the grid."""
  unit = packing.FORMATS[packed.format].planes * packed.block
  tile_M, most_K, tile_N = TILES['decode' if rows <= DECODE_ROWS else 'prefill']
  blocks = packed.padded_inputs // unit
  fits = (n for n in range(1, blocks + 1) if blocks % n == 0)
  taken = max((n for n in fits if n * unit <= most_K), default=1)
  return min(rows, tile_M), taken, min(packed.padded_outputs, tile_N)


def packed_matmul(
  x_MK: jax.Array,
  packed: packing.Packed,
  x_scale_M1: jax.Array,
  out_dtype: jax.typing.DTypeLike,
  target: dispatch.Target,
  interpret: bool | pltpu.InterpretParams = False,
) -> jax.Array:
  """See `api.packed_matmul`.

  Args:
    x_MK: int8 or bfloat16.
    packed: with N last and blocks of 128 bytes.
    x_scale_M1: float32.
    out_dtype: of what is returned.
    target: whose matrix unit it is written for.
    interpret: run the kernel as plain operations, or in the simulator.
  """
  rows, outputs = x_MK.shape[0], packed.padded_outputs
  x_MK, rows_M2 = prepare_input(x_MK, x_scale_M1, packed.padded_inputs)
  tile_M, taken, tile_N = tiles(rows, packed)
  tile_bytes = taken * packed.block
  tile_K = tile_bytes * packing.FORMATS[packed.format].planes
  y_MN = pl.pallas_call(
    functools.partial(
      _kernel,
      format=packed.format,
      block=packed.block,
      operands=operands(x_MK, target),
    ),
    grid=(
      pl.cdiv(rows, tile_M),
      pl.cdiv(outputs, tile_N),
      packed.padded_inputs // tile_K,
    ),
    in_specs=[
      pl.BlockSpec((tile_M, tile_K), lambda i, j, k: (i, k)),
      pl.BlockSpec((tile_bytes, tile_N), lambda i, j, k: (k, j)),
      pl.BlockSpec((tile_M, 2), lambda i, j, k: (i, 0)),
      pl.BlockSpec((1, tile_N), lambda i, j, k: (0, j)),
    ],
    out_specs=pl.BlockSpec((tile_M, tile_N), lambda i, j, k: (i, j)),
    out_shape=jax.ShapeDtypeStruct((rows, outputs), out_dtype),
    scratch_shapes=[pltpu.VMEM((tile_M, tile_N), sum_dtype(x_MK))],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'parallel', 'arbitrary')
    ),
    interpret=interpret,
    name=f'packed_matmul_{packed.format}',
  )(x_MK, packed.data, rows_M2, columns(packed))
  return y_MN[:, : packed.outputs]


def _kernel(x_ref, w_ref, rows_ref, scale_ref, y_ref, sum_ref, **layout):
  """One tile of x by one tile of packed bytes; k is the last axis."""

  @pl.when(pl.program_id(2) == 0)
  def _():
    sum_ref[...] = jnp.zeros_like(sum_ref)

  multiply(x_ref, w_ref[...], sum_ref, **layout)

  @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
  def _():
    finish(rows_ref, scale_ref, y_ref, sum_ref, layout['format'])


def operands(x_MK: jax.Array, target: dispatch.Target) -> str:
  """The type that the matrix unit of a target multiplies x as."""
  int8 = x_MK.dtype == jnp.int8
  return dispatch.TPU_OPERANDS[target.chip] if int8 else 'bfloat16'


def sum_dtype(x_MK: jax.Array) -> jax.typing.DTypeLike:
  """The type of sums of products with x."""
  return jnp.int32 if x_MK.dtype == jnp.int8 else jnp.float32


def prepare_input(
  x_MK: jax.Array, x_scale_M1: jax.Array, padded: int
) -> tuple[jax.Array, jax.Array]:
  """x with zeros up to `padded` inputs; scale and sum of its rows, `[M, 2]`.

  The sums are taken here: in the kernel they cost every tile of outputs as much
  as unpacking does. As float32 they are exact, for K is at most 2^17.
  """
  rest = padded - x_MK.shape[1]
  x_MK = jnp.pad(x_MK, ((0, 0), (0, rest))) if rest else x_MK
  rowsum_M1 = jnp.sum(x_MK, 1, dtype=sum_dtype(x_MK), keepdims=True)
  return x_MK, jnp.concatenate([x_scale_M1, rowsum_M1.astype(jnp.float32)], 1)


def columns(packed: packing.Packed) -> jax.Array:
  """The scale of each column, those that fill up too: `[..., 1, N]`."""
  stack = packed.scale.shape[:-2]
  scale = jnp.broadcast_to(packed.scale, (*stack, 1, packed.outputs))
  rest = packed.padded_outputs - packed.outputs
  return jnp.pad(scale, ((0, 0),) * (scale.ndim - 1) + ((0, rest),))


def finish(rows_ref, scale_ref, y_ref, sum_ref, format: str):
  """Writes the products that the sums of indices stand for."""
  y_ref[...] = scaled(
    sum_ref[...], rows_ref[...], scale_ref[...], format
  ).astype(y_ref.dtype)


def scaled(
  sum_MN: jax.Array, rows_M2: jax.Array, scale_1N: jax.Array, format: str
) -> jax.Array:
  """The product that sums of indices stand for, float32 `[M, N]`."""
  _, _, step, low = packing.FORMATS[format]
  y_MN = step * sum_MN
  if low:
    y_MN += low * rows_M2[:, 1:].astype(y_MN.dtype)
  return y_MN.astype(jnp.float32) * rows_M2[:, :1] * scale_1N


def multiply(x_ref, w_BN, sum_ref, *, format: str, block: int, operands: str):
  """Adds x @ index to `sum_ref`; of 'int8', which has no planes, x @ codes.

  Args:
    x_ref: `[M, K]`, int8 or bfloat16.
    w_BN: the packed bytes of these K inputs.
    sum_ref: `[M, N]`, int32 for int8 x, else float32.
    format: of `w_BN`.
    block: L of `w_BN`.
    operands: what the matrix unit multiplies.
  """
  kind = jnp.dtype(operands)
  exact = jnp.int32 if kind == jnp.int8 else jnp.float32
  planes = unpacked(w_BN, format, block)
  taken = max(1, EXACT_INPUTS // planes[0].shape[0])
  start = 0
  for first in range(0, len(planes), taken):
    index_KN = jnp.concatenate(planes[first : first + taken], axis=0)
    x_MK = x_ref[:, start : start + index_KN.shape[0]]
    start += index_KN.shape[0]
    y_MN = lax.dot(
      x_MK.astype(kind), index_KN.astype(kind), preferred_element_type=exact
    )
    sum_ref[...] += y_MN.astype(sum_ref.dtype)


def unpacked(w_BN: jax.Array, format: str, block: int) -> list[jax.Array]:
  """The indices of each plane in the order of K, int8 `[L, N]`."""
  planes, base, _, _ = packing.FORMATS[format]
  if planes == 1:
    rows = range(0, w_BN.shape[0], EXACT_INPUTS)
    return [w_BN[start : start + EXACT_INPUTS] for start in rows]
  bits, mask = base.bit_length() - 1, jnp.int32((base - 1) * 0x01010101)
  words = pltpu.bitcast(w_BN, jnp.int32)
  found = []
  for n in range(w_BN.shape[0] // block):
    word = words[n * block // 4 : (n + 1) * block // 4]
    for b in range(planes):
      found.append(pltpu.bitcast((word >> (bits * b)) & mask, jnp.int8))
  return found
