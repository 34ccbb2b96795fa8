"""How w + delta is rounded to what a parameter is stored in."""

from typing import Any

import jax
from jax import lax
from jax import numpy as jnp
import numpy as np

from qat.quant import blocks
from qat.zo import perturb


def add(
  w: jax.Array, delta: jax.Array, bits: jax.Array, resolution: float
) -> jax.Array:
  """w + delta in the dtype of `w`, unbiased where that is coarse.

    bfloat16    stochastic: up or down to a neighbour, with the sum as the
                expected value, so that steps below the resolution of 8 bits
                survive in expectation
    float32     to nearest
    float32 on a grid (`resolution`): delta is rounded stochastically to a
                multiple, alike for delta and -delta, and the sum is exact. The
                same step with the other sign then undoes a step bit for bit,
                which no rounding of sums can promise: it is many to one.

  Args:
    w: float32 or bfloat16; with a resolution float32, multiples of it (see
      `snap`).
    delta: float32.
    bits: uint32, uniform; independent of `delta`.
    resolution: a power of two; 0: none.
  """
  if resolution:
    size = jnp.abs(delta) * np.float32(1 / resolution)
    whole = jnp.floor(size)
    # As floats, small numbers keep all their 32 bits.
    u = (bits.astype(jnp.float32) + np.float32(0.5)) * np.float32(2**-32)
    count = whole + (u < size - whole)
    return w + jnp.copysign(count, delta) * np.float32(resolution)
  total = w.astype(jnp.float32) + delta
  if w.dtype == jnp.float32:
    return total
  # A bfloat16 is the upper half of a float32, whose lower half, taken as a
  # fraction, is the distance to the neighbour below in magnitude.
  pattern = lax.bitcast_convert_type(total, jnp.uint32)
  pattern = (pattern + (bits >> np.uint32(16))) & np.uint32(0xFFFF0000)
  rounded = lax.bitcast_convert_type(pattern, jnp.float32)
  # The carry would turn NaN into a number.
  return jnp.where(jnp.isfinite(total), rounded, total).astype(w.dtype)


def snap(params: Any, pattern: str, resolution: float) -> Any:
  """Chosen parameters to the nearest multiples of `resolution`.

  Sums of multiples are exact below 2**24 * resolution: 2**-20, an eighth of
  the resolution of bfloat16 at 0.002, leaves room up to 16. Not for use inside
  jit: it looks at values.

  Args:
    params: the tree.
    pattern: regex of the whole paths that are chosen.
    resolution: a power of two.

  Raises:
    ValueError: a chosen parameter is bfloat16, or too large for the grid.
  """
  limit = 2**24 * resolution
  names = set()
  for name, w in perturb.chosen(params, pattern):
    names.add(name)
    if w.dtype != jnp.float32:
      raise ValueError(
        f'{name!r} is {w.dtype}; a grid of resolution={resolution} needs'
        ' float32 parameters. Take those, or resolution=0.'
      )
    # Half of it is room to grow. NaN fails the comparison too.
    if not (largest := float(blocks.absmax(w).squeeze())) <= limit / 2:
      raise ValueError(
        f'{name!r} has a value of {largest}, and sums are exact only below'
        f' {limit} with resolution={resolution}; take a coarser one, or leave'
        ' this parameter out of perturbed.'
      )

  def one(path, w):
    if perturb.path_name(path) not in names:
      return w
    count = jnp.round(w / resolution)
    # Not -0.0, which w + delta - delta turns into 0.0.
    return jnp.where(count == 0, 0, count) * np.float32(resolution)

  return jax.tree_util.tree_map_with_path(one, params)
