"""Uniform grids of levels for the columns of a matrix, and rounding to them.

The weights that share a grid are the rows of `w_IN`, for each of N columns by
itself; `I` is a whole column or a group of its inputs. Leading axes (groups)
are allowed. Codes are those of two's complement, as in `quant.weights`, and
scales are numbers that float16 holds: a file keeps 16 bits of each.
"""

import dataclasses
import functools

import jax
from jax import numpy as jnp

from qat.quant import blocks
from qat.quant import composed
from qat.quant import float16
from qat.quant import qtensor

BITS = (2, 3, 4, 6, 8)

# The search for a smaller range in GPTQ's released code, which TaCQ's and
# SliM-LLM's keep: shares 1, 0.99, ..., 0.21 of the range, and an error's power.
STEPS = 80
STEP = 0.01
NORM = 2.4


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=('scale', 'zero'),
  meta_fields=('bits',),
)
@dataclasses.dataclass(frozen=True)
class Grid:
  """The levels (c - zero) * scale of the codes c of so many bits.

  Attributes:
    scale: float32, broadcastable to the weights; or, of a grid that is only
      kept, `composed.Levels`.
    zero: float32, the code of the value 0, of the shape of `scale`; or Levels.
    bits: of a code.
  """

  scale: jax.Array | composed.Levels
  zero: jax.Array | composed.Levels
  bits: int

  def numbers(self) -> 'Grid':
    """The same grid, with the values of Levels in their place."""
    return Grid(
      composed.numbers(self.scale), composed.numbers(self.zero), self.bits
    )

  def encode(self, w: jax.Array) -> jax.Array:
    """The codes of the levels next to the weights, float32."""
    low, high = limits(self.bits)
    # An integer may be added after rounding, so that 0 has the code `zero`;
    # another number must be part of what is rounded.
    whole = jnp.round(self.zero)
    codes = jnp.round(w / self.scale + (self.zero - whole)) + whole
    return jnp.clip(codes, low, high)

  def decode(self, codes: jax.Array) -> jax.Array:
    """The levels of codes, float32."""
    return (codes - self.zero) * self.scale

  def round(self, w: jax.Array) -> jax.Array:
    """The levels next to the weights."""
    return self.decode(self.encode(w))


def limits(bits: int) -> tuple[int, int]:
  """The lowest and the highest code."""
  return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def check_bits(bits: int) -> None:
  """Raises a ValueError where no alphabet has codes of so many bits."""
  if bits not in BITS:
    raise ValueError(f'No grid has codes of bits={bits}; take one of {BITS}.')


def replace_ignored(w_IN: jax.Array, ignored_IN: jax.Array) -> jax.Array:
  """Weights with a column's ignored ones replaced by the mean of its others.

  TaCQ (2504.07389) and SpQR (2306.03078) fit grids so; where all weights of a
  column are ignored they become 0.
  """
  kept_IN = jnp.where(ignored_IN, 0, w_IN)
  count = jnp.sum(~ignored_IN, -2, keepdims=True, dtype=jnp.float32)
  mean = jnp.sum(kept_IN, -2, keepdims=True) / jnp.maximum(count, 1)
  return jnp.where(ignored_IN, mean, w_IN)


def extent(
  w_IN: jax.Array, symmetric: bool, axes: tuple[int, ...] = (-2,)
) -> tuple[jax.Array, jax.Array]:
  """The ends of the range that a grid covers, which contains 0.

  Args:
    w_IN: weights.
    symmetric: whether one end is the other's negative.
    axes: over which weights share a grid.

  Returns:
    The least and the most, the axes kept with length 1.
  """
  least, most = blocks.extent(w_IN, axes)
  if symmetric:
    most = jnp.maximum(most, -least)
    least = -most
  return least, most


def spanning(
  least: jax.Array, most: jax.Array, bits: int, symmetric: bool
) -> Grid:
  """The grid of 2^bits levels from `least` to `most`, one of which is 0.

    s = (most - least) / (2^bits - 1), rounded to float16
    z = round(-2^(bits - 1) - least / s), or 0 if symmetric

  A symmetric grid has a level more below 0 than above it; its ends lie half a
  step inside of one and outside of the other end of the range. The scale of a
  range of no extent is the smallest there is.
  """
  low, high = limits(bits)
  scale = float16.nearest((most - least) / (high - low))
  scale = jnp.maximum(scale, float16.SMALLEST)
  if symmetric:
    return Grid(scale, jnp.zeros_like(scale), bits)
  zero = jnp.clip(jnp.round(low - least / scale), low, high)
  return Grid(scale, zero, bits)


def fit(
  w_IN: jax.Array,
  bits: int,
  symmetric: bool,
  mse: bool,
  ignored_IN: jax.Array | None = None,
  axes: tuple[int, ...] = (-2,),
) -> Grid:
  """The grid of each column, or of all weights along `axes`.

  Args:
    w_IN: weights, `[..., I, N]`.
    bits: of a code.
    symmetric: whether the grid has no zero point.
    mse: whether to search for the share of the range, 1, 0.99, ..., 0.21, whose
      grid has the least sum of |error|^2.4; the first of those that do.
    ignored_IN: bool, weights that have no part in the fit (a mean takes their
      place); None: all have.
    axes: over which weights share a grid.

  Returns:
    Scale and zero with the length 1 at `axes`.
  """
  w_IN = w_IN.astype(jnp.float32)
  if ignored_IN is not None:
    w_IN = replace_ignored(w_IN, ignored_IN)
  least, most = extent(w_IN, symmetric, axes)
  if not mse:
    return spanning(least, most, bits, symmetric)

  def attempt(i, best):
    share, least_error = best
    tried = 1 - i * STEP
    grid = spanning(tried * least, tried * most, bits, symmetric)
    error = jnp.abs(grid.round(w_IN) - w_IN)
    error = jnp.exp(NORM * jnp.log(error))  # XLA's ** takes 4 times as long.
    error = jnp.sum(error, axes, keepdims=True)
    better = error < least_error
    share = jnp.where(better, tried, share)
    return share, jnp.where(better, error, least_error)

  start = jnp.ones_like(least), jnp.full_like(least, jnp.inf)
  share, _ = jax.lax.fori_loop(0, STEPS, attempt, start)
  return spanning(share * least, share * most, bits, symmetric)


def tensor(
  codes: jax.Array,
  grid: Grid,
  symmetric: bool,
  exact: jax.Array | None = None,
) -> qtensor.QTensor:
  """Codes of a grid whose zero points are integers, as a QTensor."""
  zero = None if symmetric else grid.zero.astype(jnp.int8)
  return qtensor.QTensor(
    codes.astype(jnp.int8), grid.scale, f'int{grid.bits}', zero, exact
  )
