"""Uniform grids whose ends are learned shares of the range of the weights.

OmniQuant's learnable weight clipping (2308.13137), which ZeroQAT (2509.00031)
starts with: of the weights w that share a grid, with u and l learned,

  most = sigmoid(u) max(w, 0)    least = sigmoid(l) min(w, 0)
  s    = (most - least) / (2^bits - 1)        z = round(-least / s)
  c    = clip(round(w / s) + z, 0, 2^bits - 1)      w' = (c - z) s

Rounding has the gradient 1, z has none, and what is clipped has none but that
of s. Codes here lie in two's complement, 2^(bits - 1) lower, and s is in
float16 (see `grid`). A NaN or an infinity makes s NaN or infinite.

Weights are those of `blocks.split`, `w_GIN`, maybe with leading axes; those
along I share a grid.
"""

import jax
from jax import lax
from jax import numpy as jnp

from qat.quant import blocks
from qat.quant import grid
from qat.quant import qtensor

# u and l: float32 `[..., G, 1, N]` each.
Clip = tuple[jax.Array, jax.Array]


def quantize(
  w_GIN: jax.Array, clip: Clip, bits: int, symmetric: bool
) -> qtensor.QTensor:
  """Weights rounded to the grids of clipped ranges.

  Args:
    w_GIN: float32 weights.
    clip: u and l.
    bits: of a code.
    symmetric: whether there is no zero point.

  Returns:
    The matrix `[..., K, N]`; scale and zero are `[..., G, N]`.
  """
  found, _ = _grid(w_GIN, clip, bits, symmetric)
  merged = grid.Grid(
    blocks.merge(found.scale), blocks.merge(found.zero), found.bits
  )
  codes_KN = blocks.merge(found.encode(w_GIN))
  return grid.tensor(codes_KN, merged, symmetric)


def fake_quantize(
  w_GIN: jax.Array, clip: Clip, bits: int, symmetric: bool
) -> jax.Array:
  """The values of `quantize`, up to the last bit, as a function with gradients.

  Args:
    w_GIN: float32 weights.
    clip: u and l.
    bits: of a code.
    symmetric: whether there is no zero point.

  Returns:
    The matrix `[..., K, N]`.
  """
  found, scale = _grid(w_GIN, clip, bits, symmetric)
  scale = _with_gradient(found.scale, scale)
  low, high = grid.limits(bits)
  steps_GIN = w_GIN / scale
  codes_GIN = lax.stop_gradient(jnp.round(w_GIN / found.scale) + found.zero)
  inside_GIN = (codes_GIN >= low) & (codes_GIN <= high)
  off_GIN = jnp.where(
    inside_GIN,
    _with_gradient(codes_GIN - found.zero, steps_GIN),
    jnp.clip(codes_GIN, low, high) - found.zero,
  )
  return blocks.merge(off_GIN * scale)


def _grid(
  w_GIN: jax.Array, clip: Clip, bits: int, symmetric: bool
) -> tuple[grid.Grid, jax.Array]:
  """The grid, without gradients, and its scale before rounding, with them."""
  least, most = grid.extent(w_GIN, symmetric=False)
  most = jax.nn.sigmoid(clip[0]) * most
  least = jax.nn.sigmoid(clip[1]) * least
  if symmetric:
    most = jnp.maximum(most, -least)
    least = -most
  found = grid.spanning(
    lax.stop_gradient(least), lax.stop_gradient(most), bits, symmetric
  )
  return found, (most - least) / (2**bits - 1)


def _with_gradient(value: jax.Array, like: jax.Array) -> jax.Array:
  """A value with the gradient of another, up to the last bit."""
  return like + lax.stop_gradient(value - like)
