"""DBellQuant (2507.01027): scales of the inputs that make weights binary.

A scale T for each input divides the gain of the norm before some layers and
multiplies the input's weights, which changes no output. T is trained so that
the weights of an output in a block of inputs lie close to two targets, m + b
and m - b, with m their mean and b the mean of |w - m|; large T also makes the
layers' inputs smaller, where they begin large. For each layer by itself:

  T    <- max(max |x|^epsilon / max |w|^(1 - epsilon), 1e-5) for each input
  S     = T w, t = the target of S that is nearer, d = |S - t|
  DTNP  = 100 mean d^2 / t^2, with gradients through m and b
  DTMD  = mean d
  T    <- T - lr dDTNP/dT, until DTMD rises; of all T the one that the step of
          least DTNP led to

Blocks are trained independently. Of the layers that read the same norm, the T
of the largest |T| is taken for each input. Then `billm` quantizes.

Reconstructions: what the released code leaves out and reviews of the paper
mention, `dtmd_weight` (a multiple of DTMD added to the loss) and `power` 1
(DTNP as the mean of d / |t|).
"""

from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import functools
from typing import Any

import jax
from jax import numpy as jnp

_LEAST = 1e-5  # Of T at the start.


@dataclasses.dataclass(frozen=True)
class Options:
  """The fields of `config.method`.

  Attributes:
    epsilon: how much of an input's range moves into the weights at the start:
      0 none, 1 all.
    lr: step of plain gradient descent.
    epochs: steps at most; 0: T stays what it is at the start.
    block_size: inputs that are trained together.
    power: of d / t in DTNP: 2 as released; 1 is a reconstruction of the
      paper's better one.
    dtmd_weight: of DTMD in the loss; 0: it only stops the training.
  """

  epsilon: float
  lr: float
  epochs: int
  block_size: int
  power: int
  dtmd_weight: float


def scales(
  absmax_K: jax.Array, kernels: Sequence[jax.Array], options: Options
) -> tuple[jax.Array, list[dict[str, float]]]:
  """The scale T of each input, for all layers that read one norm.

  Args:
    absmax_K: the largest |x| of each input.
    kernels: of the layers, `[K, N]` each.
    options: see there.

  Returns:
    float32 `[K]`, of any sign, and for each layer the means over its blocks of
    DTNP at the start and at the end, DTMD at the start, its least, and the
    number of steps. As released, T is the one after the step from the least
    loss, which need not have a smaller loss: where a target lies next to 0, a
    step can be huge, and DTNP at the end tells.

  Raises:
    ValueError: for options that there are none of, or shapes that do not fit.
  """
  check(options)
  if not kernels or any(w.shape[0] != absmax_K.size for w in kernels):
    raise ValueError(
      f'Kernels {[tuple(w.shape) for w in kernels]} for {absmax_K.size}'
      ' inputs: each needs as many rows.'
    )
  found = [train(absmax_K, w_KN, options) for w_KN in kernels]
  all_LK = jnp.stack([scale_K for scale_K, _ in found])
  largest_1K = jnp.argmax(jnp.abs(all_LK), 0)[None]
  scale_K = jnp.take_along_axis(all_LK, largest_1K, 0)[0]
  notes = [
    {name: float(jnp.mean(value)) for name, value in note.items()}
    for _, note in found
  ]
  return scale_K, notes


def check(options: Options) -> None:
  """Raises a ValueError for options that there are none of."""
  for name, fine, want in (
    ('epsilon', 0 <= options.epsilon <= 1, 'from 0 to 1'),
    ('lr', options.lr > 0, 'above 0'),
    ('epochs', options.epochs >= 0, 'at least 0'),
    ('block_size', options.block_size >= 1, 'at least 1'),
    ('power', options.power in (1, 2), '1 or 2'),
    ('dtmd_weight', options.dtmd_weight >= 0, 'at least 0'),
  ):
    if not fine:
      raise ValueError(f'{name}={getattr(options, name)!r} must be {want}.')


def fold(
  norm: Mapping[str, jax.Array],
  kernels: Sequence[jax.Array],
  scale_K: jax.Array,
) -> tuple[dict[str, jax.Array], list[jax.Array]]:
  """A norm's parameters divided by T, and its layers' rows times T.

  Args:
    norm: `[K]` each: 'scale', and 'bias' where it has one.
    kernels: `[K, N]` each.
    scale_K: T.
  """
  divided = {name: value / scale_K for name, value in norm.items()}
  return divided, [w_KN * scale_K[:, None] for w_KN in kernels]


def start(absmax_K: jax.Array, w_KN: jax.Array, epsilon: float) -> jax.Array:
  """T before training, `[K]`, from the ranges of the inputs and the weights.

  An input that was always 0, or whose weights all are, has T = 1: the formula
  would divide a gain by 1e-5, for nothing.
  """
  most_K = jnp.max(jnp.abs(w_KN), 1)
  scale_K = absmax_K**epsilon / jnp.maximum(most_K, _LEAST) ** (1 - epsilon)
  scale_K = jnp.maximum(scale_K.astype(jnp.float32), _LEAST)
  return jnp.where((absmax_K == 0) | (most_K == 0), 1, scale_K)


def losses(
  scale_B: jax.Array, w_BN: jax.Array, real_B: jax.Array, power: int
) -> tuple[jax.Array, jax.Array]:
  """DTNP and DTMD of a block; the arguments are those of `slope`."""
  return slope(scale_B, w_BN, real_B, power, 0.0)[:2]


def slope(
  scale_B: jax.Array,
  w_BN: jax.Array,
  real_B: jax.Array,
  power: int,
  dtmd_weight: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """DTNP and DTMD of a block, and the gradient of the loss in T.

  The gradient is written down rather than left to autodiff, which takes 1.5
  times as long on a CPU. With s the sign of S - m, a target is t = m + s b, and
  S has a part in the loss by itself and by m and b:

    dm / dS_i = 1 / B,   db / dS_i = (s_i - mean s) / B   for B inputs

  Args:
    scale_B: T.
    w_BN: weights.
    real_B: bool, which inputs there are; the others fill the last block.
    power: see `Options`.
    dtmd_weight: see `Options`.
  """
  share_1B = (real_B / jnp.sum(real_B))[None]
  outputs = w_BN.shape[1]

  def over_inputs(values_BN):
    # A product: XLA:CPU is faster at it than at a sum.
    return jnp.matmul(share_1B, values_BN, precision='highest')

  scaled_BN = w_BN * scale_B[:, None]
  mean_1N = jnp.matmul(share_1B * scale_B[None], w_BN, precision='highest')
  above_BN = scaled_BN > mean_1N
  sign_BN = jnp.where(above_BN, 1.0, -1.0)
  size_BN = jnp.abs(scaled_BN - mean_1N)
  width_1N = over_inputs(size_BN)
  lean_1N = over_inputs(sign_BN)
  # S - t for the nearer target t, and that over t. A target is 0 in a column of
  # zeros; there is no distance to measure in it.
  distance_BN = sign_BN * (size_BN - width_1N)
  inverse_BN = jnp.where(
    above_BN, _inverse(mean_1N + width_1N), _inverse(mean_1N - width_1N)
  )
  ratio_BN = distance_BN * inverse_BN
  if power == 2:
    loss_BN, change_BN = jnp.square(ratio_BN), 2 * ratio_BN
  else:
    loss_BN, change_BN = jnp.abs(ratio_BN), jnp.sign(ratio_BN)
  dtnp = 100 * jnp.mean(over_inputs(loss_BN))
  dtmd = jnp.mean(over_inputs(jnp.abs(distance_BN)))
  # In S alone, and in t; then in m and in b.
  direct_BN = 100 * change_BN * inverse_BN
  target_BN = -direct_BN * scaled_BN * inverse_BN
  if dtmd_weight:
    more_BN = dtmd_weight * jnp.sign(distance_BN)
    direct_BN, target_BN = direct_BN + more_BN, target_BN - more_BN
  to_mean_1N = over_inputs(target_BN)
  to_width_1N = over_inputs(sign_BN * target_BN)
  by_scaled_BN = (
    direct_BN + to_mean_1N + to_width_1N * (sign_BN - lean_1N)
  ) / outputs
  slope_B = share_1B[0] * jnp.sum(w_BN * by_scaled_BN, 1)
  return dtnp, dtmd, slope_B


def _inverse(a: jax.Array) -> jax.Array:
  """1 / a, and 0 for 0."""
  return jnp.where(a == 0, 0, 1 / jnp.where(a == 0, 1, a))


@functools.partial(jax.jit, static_argnames='options')
def train(
  absmax_K: jax.Array, w_KN: jax.Array, options: Options
) -> tuple[jax.Array, dict[str, Any]]:
  """T of one layer, and `[G]` of each number that `scales` tells about it."""
  w_KN = w_KN.astype(jnp.float32)
  inputs, outputs = w_KN.shape
  block = min(options.block_size, inputs)
  padding = -inputs % block
  scale_K = start(absmax_K, w_KN, options.epsilon)
  blocks = (
    jnp.pad(scale_K, (0, padding), constant_values=1).reshape(-1, block),
    jnp.pad(w_KN, ((0, padding), (0, 0))).reshape(-1, block, outputs),
    (jnp.arange(inputs + padding) < inputs).reshape(-1, block),
  )
  scale_GB, notes = jax.lax.map(lambda b: _train_block(*b, options), blocks)
  return scale_GB.reshape(-1)[:inputs], notes


def _train_block(
  scale_B: jax.Array, w_BN: jax.Array, real_B: jax.Array, options: Options
) -> tuple[jax.Array, dict[str, jax.Array]]:
  def step(state):
    epoch, now_B, previous, _, best, best_B, least = state
    dtnp, dtmd, slope_B = slope(
      now_B, w_BN, real_B, options.power, options.dtmd_weight
    )
    total = dtnp + options.dtmd_weight * dtmd
    rises = dtmd > previous
    moved_B = now_B - options.lr * slope_B
    better = ~rises & (total < best)
    return (
      epoch + ~rises,
      moved_B,
      dtmd,
      rises,
      jnp.where(better, total, best),
      jnp.where(better, moved_B, best_B),
      jnp.minimum(least, dtmd),
    )

  def goes_on(state):
    epoch, stopped = state[0], state[3]
    return (epoch < options.epochs) & ~stopped

  dtnp, dtmd = losses(scale_B, w_BN, real_B, options.power)
  never = jnp.float32(jnp.inf)
  state = (jnp.int32(0), scale_B, never, False, never, scale_B, dtmd)
  epoch, _, _, _, _, best_B, least = jax.lax.while_loop(goes_on, step, state)
  return best_B, {
    'dtnp_start': dtnp,
    'dtnp_end': losses(best_B, w_BN, real_B, options.power)[0],
    'dtmd_start': dtmd,
    'dtmd_least': least,
    'epochs': epoch,
  }
