"""BiLLM (2402.04291): weights binarized in three parts of a block of inputs.

Block after block of the inputs, with U the upper Cholesky factor of the damped
H^-1 (see `hessian`) and S = W^2 / diag(U)^2 the saliency of a weight:

1. Inputs are ordered by the sum of S over outputs. The first n are salient; n
   is that whose S is approximated best where the n are binarized twice, S and
   then what is left, and the rest `rest_order` times.
2. The rest is cut into small and large weights at a threshold of S, one of 81
   percentiles of S among the rest: that which approximates S best when each
   kind is binarized once.
3. W itself is binarized so: each output's weights of a part are m + s sign(w -
   m), with m their mean and s the mean of |w - m|; the salient ones twice.
4. (W - Q) / diag(U) times the rows of U changes the weights of later blocks.
   Within a block nothing is compensated.

sign(0) is -1 here: a code has one bit.
"""

import dataclasses
import functools

import jax
from jax import numpy as jnp

from qat.ptq import hessian
from qat.ptq import statistics as statistics_lib
from qat.quant import composed
from qat.quant import float16

# Shares of the rest that may count as small.
_PERCENTILES = tuple(p / 100 for p in range(10, 91))


@dataclasses.dataclass(frozen=True)
class Options:
  """The fields of `config.method`.

  Attributes:
    block_size: inputs of a block, which share levels.
    percdamp: what is added to H's diagonal, as a share of its mean.
    salient_limit: a block has fewer salient inputs than this.
    rest_order: how often the rest is binarized while the number of salient
      inputs is looked for: 2 in BiLLM's code, 1 in DBellQuant's.
  """

  block_size: int
  percdamp: float
  salient_limit: int
  rest_order: int


def check(options: Options, shape: tuple[int, int]) -> None:
  """Raises a ValueError for options that a matrix `[K, N]` refuses."""
  del shape  # The last block may be shorter.
  if options.block_size < 1:
    raise ValueError(f'block_size={options.block_size} must be at least 1.')
  if not options.percdamp >= 0:
    raise ValueError(f'percdamp={options.percdamp} must be at least 0.')
  if options.salient_limit < 2:
    raise ValueError(
      f'salient_limit={options.salient_limit} must be at least 2: one input of'
      ' a block is salient.'
    )
  if options.rest_order not in (1, 2):
    raise ValueError(f'rest_order={options.rest_order!r} must be 1 or 2.')


def quantize(
  w_KN: jax.Array,
  statistics: statistics_lib.Statistics | hessian.Factor,
  options: Options,
) -> composed.Binarized:
  """Weights binarized by BiLLM.

  Args:
    w_KN: weights.
    statistics: of the inputs, or `hessian.factor` of them in their order.
    options: see there.

  Raises:
    ValueError: for options or statistics that do not fit the matrix.
  """
  check(options, w_KN.shape)
  factor = hessian.factored(statistics, w_KN.shape, options.percdamp, False)
  return solve(w_KN, factor, options)


@functools.partial(jax.jit, static_argnames='options')
def solve(
  w_KN: jax.Array, factor: hessian.Factor, options: Options
) -> composed.Binarized:
  """`quantize` without its checks, for use under `jit`."""
  inputs, outputs = w_KN.shape
  block = min(options.block_size, inputs)
  groups = -(-inputs // block)
  padding = groups * block - inputs
  w_KN = jnp.where(factor.dead_K[:, None], 0, w_KN.astype(jnp.float32))
  w_KN = jnp.pad(w_KN, ((0, padding), (0, 0)))
  root_KK = jnp.pad(hessian.inverse_root(factor), (0, padding))
  diagonal_K = jnp.pad(factor.diagonal_K, (0, padding), constant_values=1)
  column_K = jnp.arange(groups * block)

  def do_block(g, state):
    w_KN, signs_KN, second_KN, salient_K, levels_G7N = state
    start = g * block

    def rows(a):
      return jax.lax.dynamic_slice_in_dim(a, start, block)

    def put(a, part):
      return jax.lax.dynamic_update_slice_in_dim(a, part, start, 0)

    w_BN, diagonal_B = rows(w_KN), rows(diagonal_K)
    real_B = rows(column_K) < inputs
    salient_B, large_BN = masks(w_BN, diagonal_B, real_B, options)
    q_BN, signs_BN, second_BN, levels_7N = _binarize(
      w_BN, real_B, salient_B, large_BN
    )
    error_BN = jnp.where(real_B[:, None], w_BN - q_BN, 0)
    later_BK = jnp.where(column_K >= start + block, rows(root_KK), 0)
    change_KN = jnp.matmul(
      later_BK.T, error_BN / diagonal_B[:, None], precision='highest'
    )
    return (
      w_KN - change_KN,
      put(signs_KN, signs_BN),
      put(second_KN, second_BN),
      put(salient_K, salient_B),
      jax.lax.dynamic_update_slice_in_dim(levels_G7N, levels_7N[None], g, 0),
    )

  codes_KN = jnp.zeros(w_KN.shape, jnp.int8)
  state = (
    w_KN,
    codes_KN,
    codes_KN,
    jnp.zeros(w_KN.shape[0], bool),
    jnp.zeros((groups, 7, outputs), jnp.float32),
  )
  _, signs_KN, second_KN, salient_K, levels_G7N = jax.lax.fori_loop(
    0, groups, do_block, state
  )
  return composed.Binarized(
    signs_KN[:inputs],
    second_KN[:inputs],
    salient_K[:inputs],
    levels_G7N,
    block,
  )


# ---------------------------------------------------------------- which weights


def masks(
  w_BN: jax.Array, diagonal_B: jax.Array, real_B: jax.Array, options: Options
) -> tuple[jax.Array, jax.Array]:
  """The three parts of a block, by the saliency of its weights.

  Args:
    w_BN: weights.
    diagonal_B: diag(U).
    real_B: bool, which inputs there are; the others fill the last block.
    options: see there.

  Returns:
    bool `[B]`, the salient inputs, and bool `[B, N]`, the large weights of the
    other ones.
  """
  saliency_BN = jnp.square(w_BN / diagonal_B[:, None])
  saliency_BN = jnp.where(real_B[:, None], saliency_BN, 0)
  # The choices do not depend on its unit, and its square might overflow.
  largest = jnp.max(saliency_BN)
  saliency_BN = saliency_BN / jnp.where(largest > 0, largest, 1)

  score_B = jnp.where(real_B, jnp.sum(saliency_BN, 1), -1)
  rank_B = jnp.argsort(jnp.argsort(-score_B, stable=True))
  width = jnp.sum(real_B)
  limit = min(options.salient_limit, w_BN.shape[0] + 1)

  def error_of_count(count):
    first_B1 = (rank_B < count)[:, None]
    rest_B1 = ~first_B1 & real_B[:, None]
    error = _error(saliency_BN, first_B1, rest_B1, 2, options.rest_order)
    return jnp.where(count <= width, error, jnp.inf)

  counts = jnp.arange(1, limit)
  count = counts[jnp.argmin(jax.lax.map(error_of_count, counts))]
  salient_B = rank_B < count
  rest_B1 = (~salient_B & real_B)[:, None]

  def error_of_threshold(threshold):
    large_BN = rest_B1 & (saliency_BN >= threshold)
    return _error(saliency_BN, large_BN, rest_B1 & ~large_BN, 1, 1)

  thresholds = _percentiles(saliency_BN, rest_B1)
  errors = jax.lax.map(error_of_threshold, thresholds)
  threshold = thresholds[jnp.argmin(errors)]
  return salient_B, rest_B1 & (saliency_BN >= threshold)


def _percentiles(values_BN: jax.Array, which_B1: jax.Array) -> jax.Array:
  """Percentiles of some rows, linear between neighbours; none negative."""
  # The bits of such floats rise as they do, and XLA sorts integers far faster.
  bits = jnp.where(which_B1, values_BN, jnp.inf).reshape(-1)
  bits = jnp.sort(jax.lax.bitcast_convert_type(bits, jnp.int32))
  flat = jax.lax.bitcast_convert_type(bits, jnp.float32)
  last = jnp.sum(which_B1) * values_BN.shape[1] - 1
  position = jnp.array(_PERCENTILES) * last.astype(jnp.float32)
  below = jnp.clip(jnp.floor(position).astype(jnp.int32), 0, flat.size - 1)
  above = jnp.clip(below + 1, 0, jnp.maximum(last, 0))
  share = position - below
  return flat[below] * (1 - share) + flat[above] * share


def _error(
  x_BN: jax.Array,
  first: jax.Array,
  second: jax.Array,
  first_order: int,
  second_order: int,
) -> jax.Array:
  """The squared error of binarizing two parts of a matrix, each column alone.

  The parts have no weight in common; what is in neither counts as 0.
  """

  def spread(values_BN):
    """Each part's mean in every column, where its weights are."""
    means = []
    for part in (first, second):
      size = jnp.maximum(jnp.sum(part, 0, dtype=jnp.float32), 1)
      total = jnp.sum(jnp.where(part, values_BN, 0), 0)
      means.append((total / size)[None])
    return jnp.where(first, *means)

  left_BN = x_BN
  for order in range(max(first_order, second_order)):
    mean_BN = spread(left_BN)
    off_BN = left_BN - mean_BN
    scale_BN = spread(jnp.abs(off_BN))
    new_BN = off_BN - jnp.where(off_BN > 0, scale_BN, -scale_BN)
    if order >= first_order:
      new_BN = jnp.where(first, left_BN, new_BN)
    if order >= second_order:
      new_BN = jnp.where(second, left_BN, new_BN)
    left_BN = new_BN
  return jnp.sum(jnp.where(first | second, jnp.square(left_BN), 0))


# ----------------------------------------------------------------- what is kept


def _binarize(
  w_BN: jax.Array,
  real_B: jax.Array,
  salient_B: jax.Array,
  large_BN: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """The binarized block, its two codes and its levels `[7, N]`.

  Means and scales are numbers that float16 holds before signs are taken.
  """
  salient_B1 = (salient_B & real_B)[:, None]
  rest_BN = (~salient_B & real_B)[:, None] & jnp.ones_like(large_BN)

  def once(values_BN, part_BN, offset_N=0.0):
    """Mean, scale and signs; offset + mean is a float16."""
    size_N = jnp.maximum(jnp.sum(part_BN, 0, dtype=jnp.float32), 1)
    mean_N = jnp.sum(jnp.where(part_BN, values_BN, 0), 0) / size_N
    mean_N = float16.nearest(offset_N + mean_N) - offset_N
    off_BN = values_BN - mean_N[None]
    size = jnp.sum(jnp.where(part_BN, jnp.abs(off_BN), 0), 0) / size_N
    return mean_N, float16.nearest(size), jnp.where(off_BN > 0, 1, -1)

  small = once(w_BN, rest_BN & ~large_BN)
  large = once(w_BN, rest_BN & large_BN)
  mean_N, scale_N, signs_BN = once(w_BN, salient_B1)
  left_BN = w_BN - mean_N[None] - scale_N[None] * signs_BN
  more_N, scale2_N, signs2_BN = once(left_BN, salient_B1, mean_N)
  levels_7N = jnp.stack(
    [*small[:2], *large[:2], mean_N + more_N, scale_N, scale2_N]
  )
  plain_BN = jnp.where(large_BN, large[2], small[2])
  signs_BN = jnp.where(salient_B1, signs_BN, plain_BN)
  second_BN = jnp.where(salient_B1, signs2_BN, jnp.where(large_BN, 1, -1))
  block = composed.Binarized(
    signs_BN.astype(jnp.int8),
    second_BN.astype(jnp.int8),
    salient_B,
    levels_7N[None],
    w_BN.shape[0],
  )
  return block.dequantize(), block.signs, block.second, levels_7N
