"""A new token's attention to a cache, by the C++ extension.

XLA:CPU has no arithmetic of 16 bits and makes float32 of a cache of bfloat16 at
every step; of any cache it makes a copy with other axes for each product, and
another to add a token.
"""

import jax
from jax import numpy as jnp

from pallas_kernels import native

DTYPES = ('bfloat16', 'float32')


def attend(
  q_BNH: jax.Array,
  k_BKH: jax.Array,
  v_BKH: jax.Array,
  keys_BSKH: jax.Array,
  values_BSKH: jax.Array,
  position_B: jax.Array,
  variant: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """softmax(q keys^T / sqrt(H)) values, over positions up to `position_B`.

  XLA does not know how to split it over devices.

  Args:
    q_BNH: queries of N heads, of one of `DTYPES`, as all below.
    k_BKH: the new token's keys of K heads; K divides N.
    v_BKH: its values.
    keys_BSKH: the cache; the new ones are written into its memory where it is
      not needed any more.
    values_BSKH: likewise.
    position_B: int32, the new token's places, 0 to S - 1; others count as the
      nearest of these.
    variant: of `native.variants()`; None: the fastest.

  Returns:
    float32 `[B, N, H]`, computed in float32; and the cache with the new token.

  Raises:
    ValueError: no extension, not this variant, or another dtype.
  """
  arrays = q_BNH, k_BKH, v_BKH, keys_BSKH, values_BSKH
  kinds = {a.dtype.name for a in arrays}
  if len(kinds) > 1 or not kinds <= set(DTYPES):
    raise ValueError(f'dtypes {sorted(kinds)}; want one of {DTYPES} for all.')
  call = jax.ffi.ffi_call(
    f'qat_cached_attention_{keys_BSKH.dtype.name}',
    (
      jax.ShapeDtypeStruct(q_BNH.shape, jnp.float32),
      *(
        jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (keys_BSKH, values_BSKH)
      ),
    ),
    input_output_aliases={3: 1, 4: 2},
    vmap_method='sequential',
  )
  return call(*arrays, position_B, variant=native.number(variant))
