"""Products with packed matrices: inputs, or their codes, times packed bytes."""

from collections.abc import Sequence

import jax
from jax import lax
from jax import numpy as jnp

from pallas_kernels import dispatch
from qat.quant import packed
from qat.quant import qtensor

# The kernels are imported where they are called: Pallas takes half a second,
# and every command imports this module.


def matmul(
  x_MK: jax.Array,
  scale_M1: jax.Array | None,
  weight: packed.PackedMatrix,
  dtype: jax.typing.DTypeLike,
  target: dispatch.Target | None,
) -> jax.Array:
  """x @ w, or x times each matrix of a stack.

  Args:
    x_MK: int8 codes, or floats.
    scale_M1: float32, of the codes; None for floats.
    weight: `[K, N]` or `[E, K, N]`.
    dtype: of inputs that are floats, or become floats.
    target: where it will run; None: where this process computes.

  Returns:
    float32 `[M, N]` or `[M, E, N]`.
  """
  if weight.data.ndim == 3:
    each = [
      matmul(x_MK, scale_M1, _matrix(weight, e), dtype, target)
      for e in range(weight.data.shape[0])
    ]
    return jnp.stack(each, axis=1)
  if weight.gain_K is not None:
    gain_1K = weight.gain_K[None]
    x_MK, scale_M1 = _gained(x_MK, scale_M1, gain_1K, dtype), None
  return _plain(x_MK, scale_M1, [weight], target)[0]


def several(
  x_MK: jax.Array,
  scale_M1: jax.Array | None,
  weights: Sequence[packed.PackedMatrix],
  dtype: jax.typing.DTypeLike,
  target: dispatch.Target | None,
) -> list[jax.Array]:
  """`matmul` with each of several weights, in one call where a kernel can."""
  if all(w.data.ndim == 2 and w.gain_K is None for w in weights):
    return _plain(x_MK, scale_M1, weights, target)
  return [matmul(x_MK, scale_M1, w, dtype, target) for w in weights]


def _plain(x_MK, scale_M1, weights, target) -> list[jax.Array]:
  """Products with matrices that have no gain: float32 `[M, N]` of each."""
  from pallas_kernels.packed_matmul import api

  ys = api.several(
    x_MK, [w.packed for w in weights], x_scale_M1=scale_M1, target=target
  )
  return [
    y_MN if w.shift is None else y_MN + _sums(x_MK, scale_M1) * w.shift
    for y_MN, w in zip(ys, weights, strict=True)
  ]


def few_codes(
  x_MK: jax.Array, target: dispatch.Target | None
) -> qtensor.QTensor | None:
  """Int8 inputs, token by token: `activations.absmax` as XLA computes it.

  The same codes and scales bit for bit, of numbers that are finite. What is not
  finite always shows in its token's scale; XLA:CPU's maximum may pass over NaN.

  Args:
    x_MK: float, `[..., K]`.
    target: as of `matmul`.

  Returns:
    None where XLA's own loops are to be used: for many tokens, and where there
    is no C++ extension.
  """
  x_2d = x_MK.reshape(-1, x_MK.shape[-1])
  call = dispatch.Call(
    target or dispatch.here(), x_2d.dtype.name, x_2d.shape[0]
  )
  if dispatch.choose('act_quant', call) != 'cpu':
    return None
  from pallas_kernels.act_quant import cpu

  codes_MK, scale_M1 = cpu.codes(x_2d)
  return qtensor.QTensor(
    codes_MK.reshape(x_MK.shape),
    scale_M1.reshape(*x_MK.shape[:-1], 1),
    'int8',
  )


def by_group(
  x_GSK: jax.Array,
  scale_GS1: jax.Array | None,
  weight: packed.PackedMatrix,
  expert_GC: jax.Array,
  dtype: jax.typing.DTypeLike,
  target: dispatch.Target | None,
) -> jax.Array:
  """`grouped` for each of G groups of rows: float32 `[G, S, N]`."""
  scales = [None] * len(x_GSK) if scale_GS1 is None else scale_GS1
  return jnp.stack(
    [
      grouped(x_SK, scale_S1, weight, expert_C, dtype, target)
      for x_SK, scale_S1, expert_C in zip(x_GSK, scales, expert_GC, strict=True)
    ]
  )


def grouped(
  x_SK: jax.Array,
  scale_S1: jax.Array | None,
  weight: packed.PackedMatrix,
  expert_C: jax.Array,
  dtype: jax.typing.DTypeLike,
  target: dispatch.Target | None,
) -> jax.Array:
  """Rows in tiles, each tile times the matrix of its expert.

  Args:
    x_SK: as of `matmul`; S is a multiple of C.
    scale_S1: likewise.
    weight: `[E, K, N]`.
    expert_C: int32, the expert of each of C tiles, never falling.
    dtype: as of `matmul`.
    target: likewise.

  Returns:
    float32 `[S, N]`.
  """
  p, tile = weight.packed, x_SK.shape[0] // expert_C.shape[0]
  call = dispatch.Call(
    *(target or dispatch.here(), x_SK.dtype.name, x_SK.shape[0]),
    *(p.format, p.axis, p.block),
  )
  if dispatch.choose('grouped_matmul', call) == 'reference':
    # It would multiply by the matrix of every expert.
    return _tile_by_tile(x_SK, scale_S1, weight, expert_C, dtype, target)
  expert_S = jnp.repeat(expert_C, tile)
  if weight.gain_K is not None:
    gain_SK = weight.gain_K[expert_S]
    x_SK, scale_S1 = _gained(x_SK, scale_S1, gain_SK, dtype), None
  from pallas_kernels.grouped_matmul import api

  y_SN = api.grouped_matmul(
    x_SK, p, expert_S, x_scale_M1=scale_S1, target=target
  )
  if weight.shift is None:
    return y_SN
  return y_SN + _sums(x_SK, scale_S1) * weight.shift[expert_S, 0]


def _tile_by_tile(x_SK, scale_S1, weight, expert_C, dtype, target):
  tiles = expert_C.shape[0]

  def one(tile):
    x_tK, scale_t1, expert = tile
    return matmul(x_tK, scale_t1, _matrix(weight, expert), dtype, target)

  def cut(a_SK):
    return a_SK.reshape(tiles, -1, a_SK.shape[-1])

  x = cut(x_SK), None if scale_S1 is None else cut(scale_S1), expert_C
  if tiles == 1:
    return one(jax.tree.map(lambda a: a[0], x))
  y_CtN = lax.map(one, x)
  return y_CtN.reshape(x_SK.shape[0], -1)


def _matrix(weight: packed.PackedMatrix, expert) -> packed.PackedMatrix:
  return jax.tree.map(lambda a: a[expert], weight)


def _gained(x_MK, scale_M1, gain_MK, dtype) -> jax.Array:
  x_MK = x_MK.astype(jnp.float32) * gain_MK
  return (x_MK if scale_M1 is None else x_MK * scale_M1).astype(dtype)


def _sums(x_MK: jax.Array, scale_M1: jax.Array | None) -> jax.Array:
  """The sum of each row, float32 `[M, 1]`."""
  whole = x_MK.dtype == jnp.int8
  total_M1 = jnp.sum(
    x_MK, 1, keepdims=True, dtype=jnp.int32 if whole else jnp.float32
  ).astype(jnp.float32)
  return total_M1 if scale_M1 is None else total_M1 * scale_M1
