"""Products with binary latent weights on TPUs: no code goes to memory.

A tile of float weights is compared with the mean and multiplied at once. In the
last tile of K there may be anything beyond the weights: a comparison makes a
finite code of whatever it is, and x is zero there.
"""

import functools

import jax
from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch
from pallas_kernels.packed_matmul import tpu as packed_matmul

TILE_M, TILE_K, TILE_N = 256, 1024, 256


def quantized_train_matmul(
  x_MK: jax.Array,
  x_scale_M1: jax.Array,
  w_KN: jax.Array,
  mean_1N: jax.Array,
  scale_1N: jax.Array,
  target: dispatch.Target,
  interpret: bool | pltpu.InterpretParams = False,
) -> jax.Array:
  """See `api.quantized_train_matmul`."""
  inputs, outputs = w_KN.shape
  rows, tile_M, tile_N = x_MK.shape[0], min(x_MK.shape[0], TILE_M), TILE_N
  tile_N, tile_K = min(outputs, tile_N), min(inputs, TILE_K)
  x_MK = jnp.pad(x_MK, ((0, 0), (0, -inputs % tile_K)))
  columns_2N = jnp.concatenate(
    [jnp.broadcast_to(a, (1, outputs)) for a in (mean_1N, scale_1N)]
  )
  return pl.pallas_call(
    functools.partial(_kernel, operands=packed_matmul.operands(x_MK, target)),
    grid=(
      pl.cdiv(rows, tile_M),
      pl.cdiv(outputs, tile_N),
      pl.cdiv(inputs, tile_K),
    ),
    in_specs=[
      pl.BlockSpec((tile_M, tile_K), lambda i, j, k: (i, k)),
      pl.BlockSpec((tile_K, tile_N), lambda i, j, k: (k, j)),
      pl.BlockSpec((tile_M, 1), lambda i, j, k: (i, 0)),
      pl.BlockSpec((2, tile_N), lambda i, j, k: (0, j)),
    ],
    out_specs=pl.BlockSpec((tile_M, tile_N), lambda i, j, k: (i, j)),
    out_shape=jax.ShapeDtypeStruct((rows, outputs), jnp.float32),
    scratch_shapes=[pltpu.VMEM((tile_M, tile_N), jnp.int32)],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'parallel', 'arbitrary')
    ),
    interpret=interpret,
    name='quantized_train_matmul',
  )(x_MK, w_KN, x_scale_M1, columns_2N)


def _kernel(
  x_ref, w_ref, x_scale_ref, columns_ref, y_ref, sum_ref, *, operands
):
  @pl.when(pl.program_id(2) == 0)
  def _():
    sum_ref[...] = jnp.zeros_like(sum_ref)

  kind = jnp.dtype(operands)
  signs_KN = jnp.where(
    w_ref[...].astype(jnp.float32) > columns_ref[:1], 1.0, -1.0
  )
  y_MN = lax.dot(
    x_ref[...].astype(kind),
    signs_KN.astype(kind),
    preferred_element_type=jnp.int32 if kind == jnp.int8 else jnp.float32,
  )
  sum_ref[...] += y_MN.astype(jnp.int32)

  @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
  def _():
    y_ref[...] = (
      sum_ref[...].astype(jnp.float32) * columns_ref[1:] * x_scale_ref[...]
    )
