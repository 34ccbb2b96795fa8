"""RMSNorm and int8 codes on TPUs: a tile of whole tokens at a time."""

import functools

import jax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch
from pallas_kernels.act_quant import reference

# Bytes of x, as float32, in a step: several such arrays are in use at once, of
# the 16 MiB that a kernel has on the smallest chip.
TILE_BYTES = 2**20


def act_quant(
  x_MD: jax.Array,
  gain_D: jax.Array,
  eps: float,
  target: dispatch.Target,
  interpret: bool | pltpu.InterpretParams = False,
) -> tuple[jax.Array, jax.Array]:
  """See `api.act_quant`; `interpret` as of `packed_matmul.tpu`."""
  del target  # Every chip does this the same way.
  rows, width = x_MD.shape
  tile = min(rows, max(32, TILE_BYTES // (4 * width) // 32 * 32))
  return pl.pallas_call(
    functools.partial(_kernel, eps=eps),
    grid=(pl.cdiv(rows, tile),),
    in_specs=[
      pl.BlockSpec((tile, width), lambda i: (i, 0)),
      pl.BlockSpec((1, width), lambda i: (0, 0)),
    ],
    out_specs=[
      pl.BlockSpec((tile, width), lambda i: (i, 0)),
      pl.BlockSpec((tile, 1), lambda i: (i, 0)),
    ],
    out_shape=[
      jax.ShapeDtypeStruct((rows, width), jnp.int8),
      jax.ShapeDtypeStruct((rows, 1), jnp.float32),
    ],
    compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel',)),
    interpret=interpret,
    name='act_quant',
  )(x_MD, gain_D.astype(jnp.float32)[None])


def _kernel(x_ref, gain_ref, codes_ref, scale_ref, *, eps):
  codes_ref[...], scale_ref[...] = reference.normed_codes(
    x_ref[...], gain_ref[...], eps
  )
