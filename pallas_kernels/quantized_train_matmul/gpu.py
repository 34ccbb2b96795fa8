"""Products with binary latent weights on Hopper GPUs: packed, then multiplied.

A pass of XLA compares the latent weights with the mean and writes their signs
as packed bits, K last; `packed_matmul` multiplies them. One kernel could do
both, but would move more. It would read the weights as floats again for every
tile of 256 tokens, and turn them each time: tensor cores want K last in both
operands, and turn none but 16-bit ones. Bytes that programs read or write for a
float32 weight, with t tiles of more than 32 tokens:

  one kernel    4 t
  packed first  4 + 1 / 8, then t (a byte of 8 weights, for each of 8 planes)

From two tiles on the second is less, and training has thousands of tokens.
`packed_matmul` also reads x again, for the sums of its rows. The bits stay in
memory while they are multiplied: 1/32 of float32 weights.
"""

import jax
from jax import numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels import packing
from pallas_kernels.packed_matmul import api
from pallas_kernels.packed_matmul import gpu as packed_matmul
from pallas_kernels.packed_matmul import gpu_tiles
from pallas_kernels.quantized_train_matmul import reference


def quantized_train_matmul(
  x_MK: jax.Array,
  x_scale_M1: jax.Array,
  w_KN: jax.Array,
  mean_1N: jax.Array,
  scale_1N: jax.Array,
  target: dispatch.Target,
  interpret: object | None = None,
) -> jax.Array:
  """See `api.quantized_train_matmul`; `interpret` as of `packed_matmul.gpu`.

  Raises:
    ValueError: K is more than packed products can sum.
  """
  packed = packing.pack(
    reference.signs(w_KN, mean_1N),
    scale_1N,
    '1bit',
    axis=-1,
    block=gpu_tiles.BLOCK,
    multiple=packed_matmul.UNIT,
  )
  api.check(x_MK, packed, x_scale_M1, jnp.float32)
  return packed_matmul.packed_matmul(
    x_MK, packed, x_scale_M1, jnp.float32, target, interpret
  )
