"""SpQR (2306.03078): GPTQ on small groups, with a few weights kept as float16.

A weight is kept where rounding it would cost too much, by H's diagonal, when
its turn comes; scales are fitted without the weights for which that is likely.
Scales and zero points are themselves rounded, those of neighbouring outputs to
one grid.
"""

import dataclasses
import functools

import jax
from jax import numpy as jnp

from qat.ptq import gptq
from qat.ptq import hessian
from qat.ptq import statistics as statistics_lib
from qat.quant import blocks
from qat.quant import composed
from qat.quant import float16
from qat.quant import grid
from qat.quant import qtensor


@dataclasses.dataclass(frozen=True)
class Options:
  """The fields of `config.method`.

  Attributes:
    bits: of a code: 2, 3, 4, 6 or 8.
    group_size: inputs that share a scale; 0: all of an output.
    scale_bits: of the code of a scale; 0: scales are float16.
    zero_bits: of the code of a zero point, which is then no integer; 0: zero
      points are integers of `bits`.
    second_group_size: outputs whose scales, and whose zero points, share a
      grid; not read where both have 0 bits.
    outlier_threshold: the error above which a weight is kept, as a share of the
      mean over inputs of var(W_j) / U_jj^2; 0: no weight is kept.
    simplified_outliers: whether scales are fitted to all weights, rather than
      without those that are likely to be kept.
    percdamp: as in `gptq.Options`.
    act_order: as in `gptq.Options`; all scales are then fitted to the original
      weights.
    block_size: as in `gptq.Options`.
  """

  bits: int
  group_size: int
  scale_bits: int
  zero_bits: int
  second_group_size: int
  outlier_threshold: float
  simplified_outliers: bool
  percdamp: float
  act_order: bool
  block_size: int


def check(options: Options, shape: tuple[int, int]) -> None:
  """Raises a ValueError for options that a matrix `[K, N]` refuses."""
  inputs, columns = shape
  grid.check_bits(options.bits)
  for name in ('scale_bits', 'zero_bits'):
    if not 0 <= getattr(options, name) <= 8:
      raise ValueError(f'{name}={getattr(options, name)} must be from 0 to 8.')
  if options.block_size < 1:
    raise ValueError(f'block_size={options.block_size} must be at least 1.')
  if not options.outlier_threshold >= 0:
    raise ValueError(
      f'outlier_threshold={options.outlier_threshold} must not be negative;'
      ' 0 keeps no weight.'
    )
  if options.group_size:
    blocks.check_groups(options.group_size, inputs, 'group_size=0')
  size = options.second_group_size
  if (options.scale_bits or options.zero_bits) and (size < 1 or columns % size):
    raise ValueError(
      f'second_group_size={size} does not divide the {columns} outputs of a'
      ' layer; take a divisor of them, or scale_bits=0 and zero_bits=0.'
    )


def quantize(
  w_KN: jax.Array,
  statistics: statistics_lib.Statistics | hessian.Factor,
  options: Options,
) -> qtensor.QTensor | composed.TwoLevel:
  """Weights rounded by SpQR.

  Args:
    w_KN: weights.
    statistics: of the inputs, or what `hessian.factor` made of them with these
      `percdamp` and `act_order`.
    options: see there.

  Returns:
    TwoLevel, or QTensor where neither scales nor zero points have codes.
    `exact` holds what kept weights are beyond the level of their code: all of
    it, where zero points are integers.

  Raises:
    ValueError: for options or statistics that do not fit the matrix.
  """
  check(options, w_KN.shape)
  factor = hessian.factored(
    statistics, w_KN.shape, options.percdamp, options.act_order
  )
  return solve(w_KN, factor, options)


@functools.partial(jax.jit, static_argnames='options')
def solve(
  w_KN: jax.Array, factor: hessian.Factor, options: Options
) -> qtensor.QTensor | composed.TwoLevel:
  """`quantize` without its checks, for use under `jit` and `vmap`."""
  w_KN = jnp.where(factor.dead_K[:, None], 0, w_KN.astype(jnp.float32))
  diagonal_K = jnp.zeros_like(factor.diagonal_K)
  diagonal_K = diagonal_K.at[factor.order_K].set(factor.diagonal_K)
  limit = jnp.mean(jnp.var(w_KN, 1, ddof=1) / diagonal_K**2)
  limit = options.outlier_threshold * limit

  def fit(w_IN, rows_I):
    if options.outlier_threshold and not options.simplified_outliers:
      gain_IN = removal_gains(w_IN, diagonal_K[rows_I], options.bits)
      w_IN = grid.replace_ignored(w_IN, gain_IN > limit)
    return _two_levels(w_IN, options)

  def kept(w, q, rows):
    error = (w - q) / diagonal_K[rows].reshape(-1, *([1] * (w.ndim - 1)))
    return error**2 > limit

  codes_KN, found, exact_KN = gptq.compensate(
    w_KN,
    factor,
    fit,
    kept if options.outlier_threshold else None,
    group_size=options.group_size or w_KN.shape[0],
    static_groups=options.act_order or not options.group_size,
    block_size=options.block_size,
  )
  zero = found.zero if options.zero_bits else found.zero.astype(jnp.int8)
  two = options.scale_bits or options.zero_bits
  kind = composed.TwoLevel if two else qtensor.QTensor
  return kind(codes_KN, found.scale, f'int{options.bits}', zero, exact_KN)


def removal_gains(
  w_IN: jax.Array, diagonal_I: jax.Array, bits: int
) -> jax.Array:
  """How much less a group's error would be without each of its weights.

  The error is the sum of ((w - q) / U_jj)^2 over a column's group, on the grid
  that is fitted to it; without a weight, on the grid of the others. Zero points
  of these grids lie where they fall, as in the authors' code.

  Args:
    w_IN: weights of a group.
    diagonal_I: U_jj of its inputs.
    bits: of a code.

  Returns:
    `[I, N]`.
  """

  def error(w_IN, counts_I):
    scale, zero = _one_level(w_IN, bits)
    rest_IN = grid.Grid(scale, zero, bits).round(w_IN) - w_IN
    rest_IN = jnp.where(counts_I[:, None], rest_IN / diagonal_I[:, None], 0)
    return jnp.sum(rest_IN**2, 0)

  at_I = jnp.arange(w_IN.shape[0])

  def without(i):
    # A weight of 0 does not widen the range, which contains 0.
    return error(w_IN.at[i].set(0), at_I != i)

  everything = error(w_IN, at_I >= 0)
  return everything[None] - jax.lax.map(without, at_I, batch_size=16)


def _one_level(w_IN: jax.Array, bits: int) -> tuple[jax.Array, jax.Array]:
  """The scale and the zero point of each column, which is no integer."""
  low, _ = grid.limits(bits)
  least, most = grid.extent(w_IN, symmetric=False)
  scale = grid.spanning(least, most, bits, symmetric=False).scale
  return scale, low - least / scale


def _two_levels(w_IN: jax.Array, options: Options) -> grid.Grid:
  """The grid of each column, its numbers rounded further as options say."""
  low, high = grid.limits(options.bits)
  scale, _ = _one_level(w_IN, options.bits)
  size = options.second_group_size
  if options.scale_bits:
    scale = second_level(scale, options.scale_bits, size)
  least, _ = grid.extent(w_IN, symmetric=False)
  zero = jnp.clip(low - least / composed.numbers(scale), low, high)
  if options.zero_bits:
    zero = second_level(zero, options.zero_bits, size)
  else:
    zero = jnp.round(zero)
  return grid.Grid(scale, zero, options.bits)


def second_level(values_1N: jax.Array, bits: int, size: int) -> composed.Levels:
  """Values rounded to 2^bits levels between the least and most of neighbours.

  The least and the step are float16, and so are the values. Unlike the
  weights' range, this one does not contain 0: no scale becomes 0.

  Args:
    values_1N: float32.
    bits: of a code.
    size: how many neighbours share a grid, a divisor of N.
  """
  values_PS = values_1N.reshape(-1, size)
  base_P1 = float16.nearest(jnp.min(values_PS, 1, keepdims=True))
  span_P1 = jnp.max(values_PS, 1, keepdims=True) - base_P1
  step_P1 = jnp.maximum(
    float16.nearest(span_P1 / (2**bits - 1)), float16.SMALLEST
  )
  codes_PS = jnp.round((values_PS - base_P1) / step_P1)
  codes_PS = jnp.clip(codes_PS, 0, 2**bits - 1).astype(jnp.uint8)
  return composed.Levels(
    codes_PS.reshape(values_1N.shape), base_P1.T, step_P1.T, bits
  )


def average_bits(options: Options, inputs: int, outlier_share: float) -> float:
  """Bits of a weight, as the paper counts them.

  A group has the codes of a scale and of a zero point; `second_group_size`
  groups share four float16; an outlier takes 16 bits for its value and 16 for
  its place, beside the code that its weight still has.

  Args:
    options: see there.
    inputs: K, the length of a group where `group_size` is 0.
    outlier_share: kept weights, as a share of all.
  """
  group = options.group_size or inputs
  total = options.bits + 32 * outlier_share
  total += (options.scale_bits or 16) / group
  total += (options.zero_bits or options.bits) / group
  levels = bool(options.scale_bits) + bool(options.zero_bits)
  if levels:
    total += 32 * levels / (group * options.second_group_size)
  return total
