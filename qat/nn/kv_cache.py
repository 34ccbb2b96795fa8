"""Keys and values of the tokens so far, and attention to them."""

from typing import NamedTuple

import jax
from jax import lax
from jax import numpy as jnp

from pallas_kernels.cached_attention import cpu as native_attention
from qat.quant import activations
from qat.quant import qtensor


class Cache(NamedTuple):
  """Keys and values of the positions seen so far: `[B, S, KV, H]` each.

  Arrays of floats, or int8 codes with a scale for each token and head. What is
  written takes the form of what is there.
  """

  keys_BSKH: jax.Array | qtensor.QTensor
  values_BSKH: jax.Array | qtensor.QTensor

  def attend(
    self,
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    positions_T: jax.Array,
    native: bool,
  ) -> tuple[jax.Array, 'Cache']:
    """Adds T positions; attention of each to all up to itself.

    Args:
      q_BTNH: queries of N heads; K divides N.
      k_BTKH: keys.
      v_BTKH: values.
      positions_T: of all rows, `[T]`, or of each, `[B, T]`.
      native: whether the C++ extension may do it.

    Returns:
      `[B, T, N, H]`, and the longer cache.
    """
    if native and self._holds_one_more(q_BTNH, k_BTKH, v_BTKH):
      return _native_step(q_BTNH, k_BTKH, v_BTKH, self, positions_T)
    longer = self.extended(k_BTKH, v_BTKH, positions_T)
    return _cached_attention(q_BTNH, longer, positions_T), longer

  def extended(
    self, k_BTKH: jax.Array, v_BTKH: jax.Array, positions_T: jax.Array
  ) -> 'Cache':
    """With T more positions: of all rows, `[T]`, or of each, `[B, T]`."""
    new = Cache(
      *(_like(*pair) for pair in zip((k_BTKH, v_BTKH), self, strict=True))
    )
    if positions_T.ndim == 1:
      start = (0, positions_T[0], 0, 0)
      return jax.tree.map(
        lambda a, b: lax.dynamic_update_slice(a, b, start), self, new
      )
    write = jax.vmap(
      lambda a, b, start: lax.dynamic_update_slice(a, b, (start, 0, 0))
    )
    return jax.tree.map(lambda a, b: write(a, b, positions_T[:, 0]), self, new)

  def _holds_one_more(self, *new_BTNH: jax.Array) -> bool:
    """Whether `new_BTNH` are of one token, and floats as those here are."""
    kept = self.keys_BSKH.dtype if isinstance(self.keys_BSKH, jax.Array) else ''
    return kept in native_attention.DTYPES and all(
      a.shape[1] == 1 and a.dtype == kept for a in new_BTNH
    )


def _like(x_BTKH: jax.Array, there: jax.Array | qtensor.QTensor):
  if isinstance(there, qtensor.QTensor):
    return activations.QUANTIZERS['int8'](x_BTKH)
  return x_BTKH.astype(there.dtype)


def _floats(stored, dtype: jax.typing.DTypeLike) -> jax.Array:
  if isinstance(stored, qtensor.QTensor):
    return stored.dequantize(dtype)
  return stored.astype(dtype)


def _cached_attention(q_BTNH, cache: Cache, positions_T) -> jax.Array:
  """Attention of T new positions to all cached ones up to themselves."""
  k_BSKH, v_BSKH = (_floats(stored, q_BTNH.dtype) for stored in cache)
  positions_11S = jnp.arange(k_BSKH.shape[1])[None, None]
  mask_1TS = positions_11S <= jnp.atleast_2d(positions_T)[..., None]
  return jax.nn.dot_product_attention(
    q_BTNH, k_BSKH, v_BSKH, mask=mask_1TS[:, None], implementation='xla'
  )


def _native_step(
  q_B1NH: jax.Array,
  k_B1KH: jax.Array,
  v_B1KH: jax.Array,
  cache: Cache,
  positions_T: jax.Array,
) -> tuple[jax.Array, Cache]:
  """`_cached_attention` of one token, and the longer cache, in C++."""
  batch = q_B1NH.shape[0]
  position_B = jnp.broadcast_to(positions_T.reshape(-1), (batch,))
  y_BNH, *longer = native_attention.attend(
    *(a[:, 0] for a in (q_B1NH, k_B1KH, v_B1KH)),
    *cache,
    position_B.astype(jnp.int32),
  )
  return y_BNH[:, None].astype(q_B1NH.dtype), Cache(*longer)
