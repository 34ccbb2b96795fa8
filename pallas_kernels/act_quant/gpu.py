"""RMSNorm and int8 codes on Hopper GPUs: a warpgroup takes one token."""

import functools

import jax
from jax import lax
from jax import numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import dispatch
from pallas_kernels.act_quant import reference

LANES = 128  # Threads of a warpgroup.


def act_quant(
  x_MD: jax.Array,
  gain_D: jax.Array,
  eps: float,
  target: dispatch.Target,
  interpret: object | None = None,
) -> tuple[jax.Array, jax.Array]:
  """See `api.act_quant`; `interpret` as of `packed_matmul.gpu`."""
  del target  # Every chip does this the same way.
  rows, width = x_MD.shape
  rest = -width % LANES
  padded = width + rest
  codes_MD, scale_M = plgpu.kernel(
    functools.partial(_kernel, eps=eps, width=width),
    out_type=(
      jax.ShapeDtypeStruct((rows, padded), jnp.int8),
      jax.ShapeDtypeStruct((rows,), jnp.float32),
    ),
    scratch_types={
      'codes_smem': plgpu.SMEM((padded,), jnp.int8),
    },
    grid=(rows,),
    grid_names=('m',),
    compiler_params=plgpu.CompilerParams(
      lowering_semantics=plgpu.LoweringSemantics.Warpgroup
    ),
    interpret=interpret,
    kernel_name='act_quant',
  )(
    jnp.pad(x_MD, ((0, 0), (0, rest))),
    jnp.pad(gain_D.astype(jnp.float32), (0, rest)),
  )
  return codes_MD[:, :width], scale_M[:, None]


def _kernel(
  x_gmem, gain_gmem, codes_gmem, scale_gmem, codes_smem, *, eps, width
):
  """As `reference.normed_codes`; what fills up a token is 0 and counts not."""
  m = lax.axis_index('m')
  x_D = _load(x_gmem, m).astype(jnp.float32)
  square = jnp.sum(x_D * x_D) / width
  y_D = x_D * lax.rsqrt(square + eps) * _load(gain_gmem)
  y_D = y_D.astype(x_gmem.dtype).astype(jnp.float32)
  size = jnp.maximum(jnp.max(jnp.abs(y_D)), reference.TINY)
  codes_D = lax.round(y_D * (127 / size), lax.RoundingMethod.TO_NEAREST_EVEN)
  # A float rounds to at most 127 here; no code is cut off.
  codes_smem[...] = codes_D.astype(jnp.int32).astype(jnp.int8)
  scale_gmem[m] = size / 127
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(codes_smem, codes_gmem.at[m])
  plgpu.wait_smem_to_gmem(0)


def _load(gmem, *where: jax.Array) -> jax.Array:
  """A vector, spread over the threads in runs as long as a read can be."""
  width = gmem.shape[-1]
  run = next(n for n in (8, 4, 2, 1) if width % (n * LANES) == 0)
  layout = plgpu.Layout.WG_STRIDED((width,), run)
  return plgpu.load(gmem, (*where, ...), layout=layout, optimized=False)
