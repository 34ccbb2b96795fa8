"""GPTQ (2210.17323): rounding whose errors the weights of later inputs absorb.

With U the upper Cholesky factor of the damped Hessian's inverse (see
`hessian`), the paper rounds input after input and subtracts
(w_i - q_i) / U_ii U_ij from the weights of each later input j. With R = U^-1,
what the weights of input j have become when their turn comes is

  w_j + sum_{i < j} (w_i - q_i) R_ij / R_jj

of the original w and the values q that were chosen. That is the same number,
needs no inverse and gathers the work in products of matrices.
"""

from collections.abc import Callable
import dataclasses
import functools
import math

import jax
from jax import numpy as jnp

from qat.ptq import hessian
from qat.ptq import statistics as statistics_lib
from qat.quant import blocks
from qat.quant import grid
from qat.quant import qtensor


@dataclasses.dataclass(frozen=True)
class Options:
  """The fields of `config.method`.

  Attributes:
    bits: of a code: 2, 3, 4, 6 or 8.
    group_size: inputs that share a scale; 0: all of an output.
    symmetric: whether there is no zero point.
    mse: whether to search for a smaller range; see `grid.fit`.
    percdamp: what is added to H's diagonal, as a share of its mean.
    act_order: whether inputs are rounded by falling diagonal of H rather than
      in their order. Groups stay those of neighbours, so that nothing but
      scales has to be stored, which needs `static_groups`.
    static_groups: whether the scales of all groups come from the original
      weights rather than from those there are when the group's turn comes.
    block_size: inputs between two products with everything before them; the
      result does not depend on it but for rounding errors.
  """

  bits: int
  group_size: int
  symmetric: bool
  mse: bool
  percdamp: float
  act_order: bool
  static_groups: bool
  block_size: int


def check(options: Options, inputs: int) -> None:
  """Raises a ValueError for options that a layer of so many inputs refuses."""
  grid.check_bits(options.bits)
  if options.block_size < 1:
    raise ValueError(f'block_size={options.block_size} must be at least 1.')
  if not options.group_size:
    return
  blocks.check_groups(options.group_size, inputs, 'group_size=0')
  if options.act_order and not options.static_groups:
    raise ValueError(
      'act_order=True with groups needs static_groups=True: scales of groups'
      ' in another order would need that order in the file.'
    )


def quantize(
  w_KN: jax.Array,
  statistics: statistics_lib.Statistics | hessian.Factor,
  options: Options,
  keep_KN: jax.Array | None = None,
) -> qtensor.QTensor:
  """Weights rounded by GPTQ.

  Weights of inputs that were always 0 become 0, before scales are fitted.

  Args:
    w_KN: weights.
    statistics: of the inputs, or what `hessian.factor` made of them with these
      `percdamp` and `act_order`: layers that read the same inputs can share it.
    options: see there.
    keep_KN: bool, weights that are not rounded but keep, as float16, what the
      errors of earlier inputs have made of them, and have no part in the fit of
      scales (TaCQ); None: all are rounded.

  Raises:
    ValueError: for options or statistics that do not fit the matrix.
  """
  check(options, w_KN.shape[0])
  found = hessian.factored(
    statistics, w_KN.shape, options.percdamp, options.act_order
  )
  return solve(w_KN, found, options, keep_KN)


@functools.partial(jax.jit, static_argnames='options')
def solve(
  w_KN: jax.Array,
  factor: hessian.Factor,
  options: Options,
  keep_KN: jax.Array | None = None,
) -> qtensor.QTensor:
  """`quantize` without its checks, for use under `jit` and `vmap`."""

  def fit(w_IN, rows_I):
    ignored_IN = None if keep_KN is None else keep_KN[rows_I]
    return grid.fit(
      w_IN, options.bits, options.symmetric, options.mse, ignored_IN
    )

  def kept(w, q, rows):
    del w, q
    return keep_KN[rows]

  codes_KN, found, exact_KN = compensate(
    w_KN,
    factor,
    fit,
    None if keep_KN is None else kept,
    group_size=options.group_size or w_KN.shape[0],
    static_groups=options.static_groups or not options.group_size,
    block_size=options.block_size,
  )
  return grid.tensor(codes_KN, found, options.symmetric, exact_KN)


def compensate(
  w_KN: jax.Array,
  factor: hessian.Factor,
  fit: Callable[[jax.Array, jax.Array], grid.Grid],
  kept: Callable[..., jax.Array] | None,
  *,
  group_size: int,
  static_groups: bool,
  block_size: int,
) -> tuple[jax.Array, grid.Grid, jax.Array | None]:
  """GPTQ's loop, for any fit of scales and any choice of weights to keep.

  Args:
    w_KN: weights.
    factor: of their Hessian.
    fit: from weights `[group_size, N]` and their inputs, `[group_size]`, to a
      grid with one scale a column, its arrays `[1, ...]`.
    kept: from weights, the levels next to them and their inputs (one or many,
      with the axis that weights have) to the bools of those that are not
      rounded; None: all are.
    group_size: inputs of a group, a divisor of K.
    static_groups: whether all grids are fitted before any weight is rounded.
    block_size: as in `Options`.

  Returns:
    int8 codes `[K, N]`; the grids of `fit`, their arrays `[G, ...]`; what kept
    weights are beyond the level of their code, float16 `[K, N]`, or None.
  """
  inputs = w_KN.shape[0]
  groups = inputs // group_size
  w_KN = w_KN.astype(jnp.float32)
  w_KN = jnp.where(factor.dead_K[:, None], 0, w_KN)
  block = min(block_size, inputs)
  if not static_groups:  # A group begins where a block does.
    block = math.gcd(block, group_size)

  rows_GI = jnp.arange(inputs).reshape(groups, group_size)
  if static_groups:
    found = jax.lax.map(
      lambda each: fit(*each), (w_KN.reshape(groups, group_size, -1), rows_GI)
    )
    found = jax.tree.map(lambda a: a[:, 0], found)
  else:
    found = jax.eval_shape(fit, w_KN[:group_size], rows_GI[0])
    found = jax.tree.map(
      lambda a: jnp.zeros((groups, *a.shape[1:]), a.dtype), found
    )

  # Rows in the order of rounding. Those that fill the last block are all 0 and
  # nothing depends on them.
  padding = -inputs % block
  order_K = jnp.pad(factor.order_K, (0, padding))
  w_KN = jnp.pad(w_KN[factor.order_K], ((0, padding), (0, 0)))
  feedback_KK = jnp.pad(factor.feedback_KK, (0, padding))

  def change(error_KN, start, size):
    """What the errors of all rows before `start` add to `size` rows.

    That is all there is to add for the first; a later row also has to be given
    the errors of those between.
    """
    feedback_KI = jax.lax.dynamic_slice_in_dim(feedback_KK, start, size, 1)
    return jnp.matmul(feedback_KI.T, error_KN, precision='highest')

  def compensated(error_KN, g):
    """The weights of a group as they are best when none of it is rounded."""
    start = g * group_size
    between_II = jax.lax.dynamic_slice(
      feedback_KK, (start, start), (group_size, group_size)
    )

    # Each row's change is an error for the rows after it. (Substitution by
    # hand: a library's triangular solve costs more than a small group's work.)
    def do_row(i, change_IN):
      return change_IN - between_II[i][:, None] * change_IN[i][None]

    change_IN = change(error_KN, start, group_size)
    change_IN = jax.lax.fori_loop(0, group_size, do_row, change_IN)
    return jax.lax.dynamic_slice_in_dim(w_KN, start, group_size) + change_IN

  def do_block(b, state):
    error_KN, codes_KN, exact_KN, found = state
    start = b * block
    w_BN = jax.lax.dynamic_slice_in_dim(w_KN, start, block)
    rows_B = jax.lax.dynamic_slice_in_dim(order_K, start, block)
    now_BN = w_BN + change(error_KN, start, block)
    if not static_groups:

      def refit(old):
        g = start // group_size
        new = fit(compensated(error_KN, g), start + jnp.arange(group_size))
        return jax.tree.map(
          lambda a, b: jax.lax.dynamic_update_slice_in_dim(a, b, g, 0), old, new
        )

      found = jax.lax.cond(
        start % group_size == 0, refit, lambda old: old, found
      )
    group_B = rows_B // group_size
    levels = jax.tree.map(lambda a: a[group_B], found).numbers()
    feedback_BB = jax.lax.dynamic_slice(
      feedback_KK, (start, start), (block, block)
    )

    def do_row(i, now_BN):
      mine = jax.tree.map(lambda a: a[i], levels)
      value_N = now_BN[i]
      q_N = mine.round(value_N)
      if kept is not None:
        q_N = jnp.where(kept(value_N, q_N, rows_B[i]), value_N, q_N)
      # Rows up to this one have no feedback from it and stay as they are.
      return now_BN + feedback_BB[i][:, None] * (w_BN[i] - q_N)[None]

    now_BN = jax.lax.fori_loop(0, block, do_row, now_BN)
    new_BN = levels.encode(now_BN)
    q_BN = levels.decode(new_BN)
    if kept is not None:
      kept_BN = kept(now_BN, q_BN, rows_B)
      new_BN = jnp.where(kept_BN, levels.encode(jnp.zeros_like(q_BN)), new_BN)
      rest_BN = jnp.where(kept_BN, now_BN - levels.decode(new_BN), 0)
      q_BN = jnp.where(kept_BN, now_BN, q_BN)
      exact_KN = jax.lax.dynamic_update_slice_in_dim(
        exact_KN, rest_BN.astype(jnp.float16), start, 0
      )
    return (
      jax.lax.dynamic_update_slice_in_dim(error_KN, w_BN - q_BN, start, 0),
      jax.lax.dynamic_update_slice_in_dim(
        codes_KN, new_BN.astype(jnp.int8), start, 0
      ),
      exact_KN,
      found,
    )

  state = (
    jnp.zeros_like(w_KN),
    jnp.zeros(w_KN.shape, jnp.int8),
    None if kept is None else jnp.zeros(w_KN.shape, jnp.float16),
    found,
  )
  _, codes_KN, exact_KN, found = jax.lax.fori_loop(
    0, w_KN.shape[0] // block, do_block, state
  )
  back_K = jnp.argsort(factor.order_K)
  exact_KN = None if exact_KN is None else exact_KN[back_K]
  return codes_KN[back_K], found, exact_KN
