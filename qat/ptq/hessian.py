"""The Hessian of a layer's outputs in its weights, damped and factored.

H = 2/n sum x^T x over n tokens, the same for every output. The papers take the
upper Cholesky factor U of its inverse, U^T U = H^-1. With R upper triangular
and H = R R^T, U is R^-1: its diagonal, and what GPTQ needs of the rest, come
from R without inverting anything, in a third of the work and with more digits.
"""

import dataclasses
import functools

import jax
from jax import numpy as jnp

from qat.ptq import statistics as statistics_lib

MAX_RAISES = 150  # How often the damping is added again, as in TaCQ's code.


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=('order_K', 'dead_K', 'feedback_KK', 'diagonal_K', 'raises'),
  meta_fields=(),
)
@dataclasses.dataclass(frozen=True)
class Factor:
  """A Hessian factored once for all layers that read the same inputs.

  Attributes:
    order_K: int32, the inputs in the order in which they are rounded; that of
      all arrays below but `dead_K`.
    dead_K: bool, inputs that were always 0, in their own order.
    feedback_KK: float32, R_ij / R_jj above the diagonal, else 0.
    diagonal_K: float32, U_jj = 1 / R_jj.
    raises: int32, how often the damping had to be added again.
  """

  order_K: jax.Array
  dead_K: jax.Array
  feedback_KK: jax.Array
  diagonal_K: jax.Array
  raises: jax.Array


def factor(
  statistics: statistics_lib.Statistics,
  percdamp: float,
  act_order: bool = False,
) -> Factor:
  """The damped Hessian's factor.

  Not for use under `jit`: it looks at the numbers.

  Args:
    statistics: of the inputs.
    percdamp: what is added to H's diagonal, as a share of its mean.
    act_order: whether inputs are ordered by falling diagonal of H, rather than
      as they are.

  Raises:
    ValueError: where no tokens were seen, or damping does not help.
  """
  if not float(statistics.tokens) > 0:
    raise ValueError(
      f'Statistics of tokens={float(statistics.tokens)}: calibrate with at'
      ' least one token before quantizing.'
    )
  attempts = MAX_RAISES + 1 if percdamp else 1  # 0 stays 0.
  for raises in range(attempts):
    found = attempt(
      jnp.array(statistics.gram_KK, jnp.float32),  # Always a copy.
      statistics.tokens,
      jnp.float32(percdamp),
      jnp.int32(raises),
      act_order,
    )
    if bool(jnp.all(jnp.isfinite(found.diagonal_K))):
      return found
    del found  # It is as large as the copy for the next attempt.
  raise ValueError(
    f'The Hessian of {statistics.absmax_K.size} inputs has no Cholesky factor'
    f' with percdamp={percdamp}, added {attempts} times; raise'
    ' percdamp, and look for NaN or infinite activations.'
  )


def factored(
  statistics: statistics_lib.Statistics | Factor,
  shape: tuple[int, int],
  percdamp: float,
  act_order: bool,
) -> Factor:
  """The factor of statistics, or the one that is given, for a matrix `[K, N]`.

  Raises:
    ValueError: for statistics of another number of inputs; see also `factor`.
  """
  if isinstance(statistics, statistics_lib.Statistics):
    inputs = statistics.gram_KK.shape[0]
  else:
    inputs = statistics.order_K.size
  if inputs != shape[0]:
    raise ValueError(
      f'Statistics of {inputs} inputs for a matrix {tuple(shape)}: it needs'
      f' those of {shape[0]}.'
    )
  if isinstance(statistics, Factor):
    return statistics
  return factor(statistics, percdamp, act_order)


@functools.partial(jax.jit, static_argnames='act_order', donate_argnums=0)
def attempt(
  gram_KK: jax.Array,
  tokens: jax.Array,
  percdamp: jax.Array,
  raises: jax.Array,
  act_order: bool,
) -> Factor:
  """The factor with the damping added `raises` times more than once.

  Two matrices live at once: the Hessian, which is factored in its place, and
  the Gram matrix, whose memory is then the result's.

  Args:
    gram_KK: of the inputs, float32; donated.
    tokens: how many there were.
    percdamp: as in `factor`.
    raises: int32.
    act_order: as in `factor`.

  Returns:
    A `diagonal_K` that is not finite where there is no such factor.
  """
  scale = 2 / tokens
  diagonal_K = jnp.diagonal(gram_KK) * scale
  dead_K = diagonal_K == 0
  diagonal_K = jnp.where(dead_K, 1, diagonal_K)
  order_K = jnp.arange(gram_KK.shape[0], dtype=jnp.int32)
  # Backwards, because the factor is to be upper triangular.
  if act_order:
    order_K = jnp.argsort(-diagonal_K, stable=True).astype(jnp.int32)
    diagonal_K = diagonal_K[order_K]
    # Rows and columns at once: one after the other is a matrix more.
    back_K = order_K[::-1]
    hessian_KK = gram_KK[back_K[:, None], back_K[None]] * scale
  else:
    hessian_KK = gram_KK[::-1, ::-1] * scale
  damp = percdamp * jnp.mean(diagonal_K)
  damped_K = diagonal_K + damp * (raises + 1)
  eye_KK = jnp.eye(order_K.size, dtype=bool)
  lower_KK = jax.lax.linalg.cholesky(
    jnp.where(eye_KK, damped_K[::-1][None], hessian_KK), symmetrize_input=False
  )
  root_K = jnp.diagonal(lower_KK)[::-1]
  feedback_KK = jnp.triu(lower_KK[::-1, ::-1] / root_K[None], 1)
  return Factor(order_K, dead_K, feedback_KK, 1 / root_K, raises)


def inverse_root(factor: Factor) -> jax.Array:
  """U, upper triangular, U^T U = H^-1, for methods that need all of it.

  Returns:
    float32 `[K, K]` in the order of `order_K`.
  """
  eye_KK = jnp.eye(factor.order_K.size, dtype=jnp.float32)
  inverse_KK = jax.scipy.linalg.solve_triangular(
    eye_KK + factor.feedback_KK, eye_KK, unit_diagonal=True
  )
  return factor.diagonal_K[:, None] * inverse_KK
