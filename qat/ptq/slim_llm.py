"""SliM-LLM (2405.14917): more bits for the groups of inputs that matter more.

Inputs are cut into groups. With U the upper Cholesky factor of the inverse of
the damped Hessian (`hessian`), the salience of a weight is w^2 / U_jj^2, and

1. the i groups of greatest salience get b + 1 bits, the i of least b - 1, the
   rest b: the mean stays b. Of all i that is taken whose outputs, with weights
   rounded to nearest, are the closest to the original ones: by the mean over
   calibration tokens of KL(softmax(x Q) || softmax(x W)).
2. the groups are rounded in turn, inside by GPTQ. The range of a group's scale
   is searched so that salient weights, those whose salience lies more than two
   standard deviations above the group's mean, count as they should.

Groups of 1 bit have the levels mean -+ mean |w|. The paper's code tries i from
1 to G / 2 - 1; here it is from 0 to G / 2, since narrow layers have few groups.
"""

import dataclasses
import functools

import jax
from jax import numpy as jnp

from qat.ptq import hessian
from qat.ptq import statistics as statistics_lib
from qat.quant import composed
from qat.quant import float16
from qat.quant import grid


@dataclasses.dataclass(frozen=True)
class Options:
  """The fields of `config.method`.

  Attributes:
    bits: of a weight on average, b: 2 to 7.
    group_size: inputs of a group, the last may be shorter; 0: one group.
    percdamp: what is added to the Hessian's diagonal, as a share of its mean.
    salient_deviations: how many standard deviations above the mean of its group
      the salience of a salient weight lies.
    salient_weight: of the errors of salient weights, in the search of scales;
      1 in the paper's code: they then count as any other.
    search_range: shares of a group's range that are searched: 1 -+ this.
    search_steps: how many to each side.
  """

  bits: int
  group_size: int
  percdamp: float
  salient_deviations: float
  salient_weight: float
  search_range: float
  search_steps: int


def check(options: Options) -> None:
  """Raises a ValueError for a value that cannot be used."""
  wrong = {
    'bits': not 2 <= options.bits <= 7,
    'group_size': options.group_size < 0,
    'salient_weight': not options.salient_weight >= 0,
    'search_range': not 0 <= options.search_range < 1,
    'search_steps': options.search_steps < 0,
  }
  for field, is_wrong in wrong.items():
    if is_wrong:
      raise ValueError(
        f'{field}={getattr(options, field)}; bits are 2 to 7, the mean of'
        ' groups of a bit more and a bit less; group_size, salient_weight and'
        ' search_steps are not negative, search_range is from 0 to below 1.'
      )


def quantize(
  w_KN: jax.Array, statistics: statistics_lib.Statistics, options: Options
) -> composed.MixedBits:
  """Weights rounded by SliM-LLM.

  Weights of inputs that were always 0 become 0 first.

  Args:
    w_KN: weights.
    statistics: of the inputs, with a sample of them.
    options: see there.

  Raises:
    ValueError: for options or statistics that do not fit the matrix.
  """
  check(options)
  if statistics.inputs_SK is None or not len(statistics.inputs_SK):
    raise ValueError(
      'SliM-LLM compares outputs, and the statistics have no inputs: keep some'
      ' (config.calibration.rows).'
    )
  factor = hessian.factored(statistics, w_KN.shape, options.percdamp, False)
  bits_G = allocate(w_KN, factor, statistics.inputs_SK, options)
  return solve(w_KN, factor, bits_G, options)


def _grouped(
  w_KN: jax.Array, factor: hessian.Factor, options: Options
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Weights and saliences `[G, I, N]`, filled up with 0, and which are there.

  The last is bool `[G, I, 1]`.
  """
  inputs = w_KN.shape[0]
  size = options.group_size or inputs
  w_KN = jnp.where(factor.dead_K[:, None], 0, w_KN.astype(jnp.float32))
  salience_KN = jnp.square(w_KN / factor.diagonal_K[:, None])
  there_K1 = jnp.ones((inputs, 1), bool)
  fill = ((0, -inputs % size), (0, 0))
  return tuple(
    jnp.pad(a, fill).reshape(-1, size, a.shape[1])
    for a in (w_KN, salience_KN, there_K1)
  )


@functools.partial(jax.jit, static_argnames='options')
def allocate(
  w_KN: jax.Array,
  factor: hessian.Factor,
  inputs_SK: jax.Array,
  options: Options,
) -> jax.Array:
  """Step 1, salience-determined bit allocation: int8 `[G]`, bits of a group.

  A last group that is shorter is compared by the mean salience of its weights.

  Args:
    w_KN: weights.
    factor: from `hessian.factor`, of the inputs in their order.
    inputs_SK: a sample of the inputs.
    options: see there.
  """
  w_GIN, salience_GIN, there_GI1 = _grouped(w_KN, factor, options)
  groups, size, _ = w_GIN.shape
  count_G = jnp.sum(there_GI1, (1, 2))
  order_G = jnp.argsort(jnp.sum(salience_GIN, (1, 2)) / count_G)
  fill = ((0, 0), (0, groups * size - inputs_SK.shape[1]))
  x_SGI = jnp.pad(inputs_SK, fill).reshape(-1, groups, size)

  def outputs(g, change):
    """What the outputs gain where group g has `change` more bits than b."""
    w_IN, there_I1 = w_GIN[g], there_GI1[g]
    more_IN, plain_IN = (
      _nearest(w_IN, there_I1, jnp.int32(bits))
      for bits in (options.bits + change, options.bits)
    )
    return jnp.matmul(x_SGI[:, g], more_IN - plain_IN, precision='highest')

  x_SK = x_SGI.reshape(len(x_SGI), -1)
  plain_GIN = jax.vmap(_nearest, (0, 0, None))(
    w_GIN, there_GI1, jnp.int32(options.bits)
  )
  target_SN, y_SN = (
    jnp.matmul(x_SK, a_GIN.reshape(groups * size, -1), precision='highest')
    for a_GIN in (w_GIN, plain_GIN)
  )
  log_p_SN = jax.nn.log_softmax(target_SN, -1)

  def distance(y_SN):
    log_q_SN = jax.nn.log_softmax(y_SN, -1)
    return jnp.mean(jnp.sum(jnp.exp(log_q_SN) * (log_q_SN - log_p_SN), -1))

  def one_more(y_SN, i):
    y_SN = y_SN + outputs(order_G[-1 - i], 1) + outputs(order_G[i], -1)
    return y_SN, distance(y_SN)

  _, rest = jax.lax.scan(one_more, y_SN, jnp.arange(groups // 2))
  best = jnp.argmin(jnp.append(distance(y_SN), rest))
  rank_G = jnp.argsort(order_G)
  change_G = jnp.where(rank_G >= groups - best, 1, 0) - (rank_G < best)
  return (options.bits + change_G).astype(jnp.int8)


@functools.partial(jax.jit, static_argnames='options')
def solve(
  w_KN: jax.Array, factor: hessian.Factor, bits_G: jax.Array, options: Options
) -> composed.MixedBits:
  """Step 2, GPTQ from group to group with the bits of each.

  Args:
    w_KN: weights.
    factor: from `hessian.factor`, of the inputs in their order.
    bits_G: int8, from `allocate`.
    options: see there.
  """
  inputs, columns = w_KN.shape
  w_GIN, _, there_GI1 = _grouped(w_KN, factor, options)
  groups, size, _ = w_GIN.shape
  fill = (0, groups * size - inputs)
  feedback_KK = jnp.pad(factor.feedback_KK, fill)
  diagonal_GI = jnp.pad(factor.diagonal_K, fill, constant_values=1.0)
  diagonal_GI = diagonal_GI.reshape(groups, size)

  def do_group(g, state):
    error_KN, codes_KN, scale_GN, zero_GN = state
    start, bits = g * size, bits_G[g].astype(jnp.int32)
    feedback_KI = jax.lax.dynamic_slice_in_dim(feedback_KK, start, size, 1)
    feedback_II = jax.lax.dynamic_slice_in_dim(feedback_KI, start, size)
    change_IN = jnp.matmul(feedback_KI.T, error_KN, precision='highest')
    now_IN = w_GIN[g] + change_IN
    # What the weights of the whole group are before any of it is rounded: row
    # by row, `change_IN` becomes this once the rows above it have their turn.
    fit_IN = w_GIN[g] + jax.scipy.linalg.solve_triangular(
      jnp.eye(size) + feedback_II,
      change_IN,
      trans=1,
      unit_diagonal=True,
    )
    salience_IN = jnp.square(fit_IN / diagonal_GI[g][:, None])
    scale_1N, zero_1N = _search(
      fit_IN, salience_IN, there_GI1[g], bits, options
    )

    def do_row(i, now_IN):
      now_1N = jax.lax.dynamic_slice_in_dim(now_IN, i, 1)
      q_1N = _round(now_1N, scale_1N, zero_1N, bits)
      w_1N = jax.lax.dynamic_slice_in_dim(w_GIN[g], i, 1)
      return now_IN + feedback_II[i][:, None] * (w_1N - q_1N)

    now_IN = jax.lax.fori_loop(0, size, do_row, now_IN)
    codes_IN = _encode(now_IN, scale_1N, zero_1N, bits)
    q_IN = _decode(codes_IN, scale_1N, zero_1N)
    # Inputs that fill the last group have no errors to pass on.
    error_IN = jnp.where(there_GI1[g], w_GIN[g] - q_IN, 0)
    put = jax.lax.dynamic_update_slice_in_dim
    return (
      put(error_KN, error_IN, start, 0),
      put(codes_KN, codes_IN.astype(jnp.int8), start, 0),
      put(scale_GN, scale_1N, g, 0),
      put(zero_GN, zero_1N, g, 0),
    )

  zeros_KN = jnp.zeros((groups * size, columns), jnp.float32)
  zeros_GN = jnp.zeros((groups, columns), jnp.float32)
  _, codes_KN, scale_GN, zero_GN = jax.lax.fori_loop(
    0,
    groups,
    do_group,
    (zeros_KN, zeros_KN.astype(jnp.int8), zeros_GN, zeros_GN),
  )
  return composed.MixedBits(codes_KN[:inputs], scale_GN, zero_GN, bits_G, size)


# Levels of a group whose number of bits is known only when it runs.


def _limits(bits: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The lowest and the highest code; those of 1 bit are 0 and 1."""
  low = jnp.where(bits == 1, 0, -(2 ** (bits - 1)))
  return low, low + 2**bits - 1


def _encode(w, scale, zero, bits: jax.Array) -> jax.Array:
  """The codes of the levels next to the weights, float32."""
  # An integer is added after rounding, so that 0 has the code `zero`.
  whole = jnp.round(zero)
  codes = jnp.round(w / scale + (zero - whole)) + whole
  return jnp.clip(codes, *_limits(bits))


def _decode(codes, scale, zero) -> jax.Array:
  return (codes - zero) * scale


def _round(w, scale, zero, bits: jax.Array) -> jax.Array:
  return _decode(_encode(w, scale, zero, bits), scale, zero)


def _spanning(least, most, bits: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Scale and zero of all codes from `least` to `most`; see `grid.spanning`."""
  low, high = _limits(bits)
  scale = float16.nearest((most - least) / (high - low))
  scale = jnp.maximum(scale, float16.SMALLEST)
  return scale, jnp.clip(jnp.round(low - least / scale), low, high)


def _binary(
  w_IN: jax.Array, there_I1: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Scale and zero of the two levels mean -+ mean |w| of each column."""
  count = jnp.sum(there_I1)
  mean_1N = jnp.sum(w_IN, 0, where=there_I1, keepdims=True) / count
  size_1N = jnp.sum(jnp.abs(w_IN), 0, where=there_I1, keepdims=True) / count
  scale_1N = jnp.maximum(float16.nearest(2 * size_1N), float16.SMALLEST)
  return scale_1N, float16.nearest(0.5 - mean_1N / scale_1N)


def _of_share(
  w_IN: jax.Array, there_I1: jax.Array, bits: jax.Array, share: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Scale and zero `[1, N]` over a share of the range, or of two levels."""
  least, most = grid.extent(w_IN, symmetric=False)
  span = _spanning(share * least, share * most, bits)
  two = _binary(w_IN, there_I1)
  return tuple(
    jnp.where(bits == 1, a, b) for a, b in zip(two, span, strict=True)
  )


def _nearest(
  w_IN: jax.Array, there_I1: jax.Array, bits: jax.Array
) -> jax.Array:
  """A group rounded to nearest, over its whole range; 0 where nothing is."""
  levels = _of_share(w_IN, there_I1, bits, jnp.float32(1))
  return jnp.where(there_I1, _round(w_IN, *levels, bits), 0)


def _search(
  w_IN: jax.Array,
  salience_IN: jax.Array,
  there_I1: jax.Array,
  bits: jax.Array,
  options: Options,
) -> tuple[jax.Array, jax.Array]:
  """Salience-weighted quantizer calibration: scale and zero `[1, N]`.

  Of the shares of the range 1, then above 1, then below it, the first with the
  least sum of |error|^2.4; errors of salient weights times `salient_weight`.
  """
  there_IN = jnp.broadcast_to(there_I1, w_IN.shape)
  mean = jnp.mean(salience_IN, where=there_IN)
  deviation = jnp.std(salience_IN, where=there_IN, ddof=1)
  salient_IN = salience_IN - mean > options.salient_deviations * deviation
  weight_IN = jnp.where(salient_IN, options.salient_weight, 1.0) * there_I1
  least_1N, most_1N = grid.extent(w_IN, symmetric=False)
  steps = options.search_steps
  step = options.search_range / max(steps, 1)

  def attempt(i, best):
    share_1N, least_error_1N = best
    tried = 1 + step * jnp.where(i <= steps, i, steps - i)
    levels = _spanning(tried * least_1N, tried * most_1N, bits)
    error_IN = jnp.abs(_round(w_IN, *levels, bits) - w_IN)
    error_1N = jnp.sum(weight_IN * error_IN**grid.NORM, 0, keepdims=True)
    better_1N = error_1N < least_error_1N
    return (
      jnp.where(better_1N, tried, share_1N),
      jnp.where(better_1N, error_1N, least_error_1N),
    )

  start = jnp.ones_like(least_1N), jnp.full_like(least_1N, jnp.inf)
  share_1N, _ = jax.lax.fori_loop(0, 2 * steps + 1, attempt, start)
  return _of_share(w_IN, there_I1, bits, share_1N)
