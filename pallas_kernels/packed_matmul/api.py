"""Activations times packed weights."""

from collections.abc import Sequence

import jax
from jax import numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels import packing
from pallas_kernels.packed_matmul import cpu
from pallas_kernels.packed_matmul import gpu
from pallas_kernels.packed_matmul import reference
from pallas_kernels.packed_matmul import tpu

# As many products, of at most 127 * 128 each, add up to less than 2^31.
MOST_INPUTS = 2**17

IMPLEMENTATIONS = {
  'reference': reference.packed_matmul,
  'cpu': cpu.packed_matmul,
  'tpu': tpu.packed_matmul,
  'gpu': gpu.packed_matmul,
}


def packed_matmul(
  x_MK: jax.Array,
  packed: packing.Packed,
  *,
  x_scale_M1: jax.Array | None = None,
  out_dtype: jax.typing.DTypeLike = jnp.float32,
  implementation: str | None = None,
  target: dispatch.Target | None = None,
) -> jax.Array:
  """(x @ codes) * x_scale * w_scale, with the weights read as packed bytes.

  Integers are summed as integers and are exact; bfloat16 activations are summed
  in float32. `vmap` goes over stacks of weights; under a mesh it is called
  inside `jax.shard_map`, on what a device has.

  Args:
    x_MK: int8 codes, or bfloat16 or float32, `[M, K]`.
    packed: one matrix; K as that of x.
    x_scale_M1: float32, of int8 codes; None: 1.
    out_dtype: float32 or bfloat16.
    implementation: of `dispatch.TABLE`; None: the fastest that can run.
    target: the device to compile for; None: that of this process.

  Returns:
    `[M, N]`.

  Raises:
    ValueError: shapes do not fit, or `implementation` cannot do this.
  """
  check(x_MK, packed, x_scale_M1, out_dtype)
  name, x_scale_M1, target = chosen(
    'packed_matmul', x_MK, packed, x_scale_M1, implementation, target
  )
  return IMPLEMENTATIONS[name](x_MK, packed, x_scale_M1, out_dtype, target)


def several(
  x_MK: jax.Array,
  packed: Sequence[packing.Packed],
  *,
  x_scale_M1: jax.Array | None = None,
  out_dtype: jax.typing.DTypeLike = jnp.float32,
  target: dispatch.Target | None = None,
) -> list[jax.Array]:
  """`packed_matmul` with each of several matrices, which gives the same bits.

  On a CPU those of one format are multiplied in one call.

  Args:
    x_MK: as of `packed_matmul`, and so is the rest.
    packed: matrices of one K.
    x_scale_M1: likewise.
    out_dtype: likewise.
    target: likewise.

  Returns:
    For each matrix `[M, N]`.

  Raises:
    ValueError: shapes do not fit.
  """
  names = set()
  for p in packed:
    check(x_MK, p, x_scale_M1, out_dtype)
    names.add(chosen('packed_matmul', x_MK, p, None, None, target)[0])
  if names == {'cpu'} and len({p.format for p in packed}) == 1:
    scale_M1 = _scale(x_MK, x_scale_M1)
    return cpu.several(x_MK, packed, scale_M1, out_dtype)
  options = dict(x_scale_M1=x_scale_M1, out_dtype=out_dtype, target=target)
  return [packed_matmul(x_MK, p, **options) for p in packed]


def chosen(
  kernel: str,
  x_MK: jax.Array,
  packed: packing.Packed,
  x_scale_M1: jax.Array | None,
  implementation: str | None,
  target: dispatch.Target | None,
) -> tuple[str, jax.Array, dispatch.Target]:
  """Which implementation of a kernel multiplies these, its scales and target.

  Raises:
    ValueError: see `dispatch.choose`.
  """
  target = target or dispatch.here()
  call = dispatch.Call(
    *(target, x_MK.dtype.name, x_MK.shape[0]),
    *(packed.format, packed.axis, packed.block),
  )
  name = dispatch.choose(kernel, call, implementation)
  return name, _scale(x_MK, x_scale_M1), target


def _scale(x_MK: jax.Array, x_scale_M1: jax.Array | None) -> jax.Array:
  if x_scale_M1 is None:
    return jnp.ones((x_MK.shape[0], 1), jnp.float32)
  return x_scale_M1


def check(
  x_MK: jax.Array,
  packed: packing.Packed,
  x_scale_M1: jax.Array | None,
  out_dtype: jax.typing.DTypeLike,
) -> None:
  """Raises a ValueError where an input and a weight do not fit."""
  if jnp.dtype(out_dtype).name not in ('float32', 'bfloat16'):
    raise ValueError(f'out_dtype={out_dtype}; want float32 or bfloat16.')
  if packed.data.ndim != 2:
    raise ValueError(
      f'A stack of {packed.data.shape[:-2]} matrices; `jax.vmap` multiplies it.'
    )
  if x_MK.ndim != 2 or x_MK.shape[1] != packed.inputs:
    raise ValueError(
      f'x has shape {x_MK.shape}; the weights want [M, {packed.inputs}].'
    )
  if packed.padded_inputs > MOST_INPUTS:
    raise ValueError(
      f'{packed.inputs} inputs; sums of int8 products fit int32 for at most'
      f' {MOST_INPUTS}.'
    )
  if x_MK.dtype not in (jnp.int8, jnp.bfloat16, jnp.float32):
    raise ValueError(f'x is {x_MK.dtype}; want int8, bfloat16 or float32.')
  if x_scale_M1 is not None and x_scale_M1.shape != (x_MK.shape[0], 1):
    raise ValueError(
      f'x_scale_M1 has shape {x_scale_M1.shape}; want {(x_MK.shape[0], 1)}.'
    )
