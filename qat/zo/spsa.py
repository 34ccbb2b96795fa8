"""Two-point estimates of a gradient along random directions (SPSA).

With z ~ N(0, I), one direction's slope and the estimate from q of them:

  slope_j = (L(w + eps z_j) - L(w - eps z_j)) / (2 eps)
  g = 1/q sum_j slope_j z_j

(Spall 1992; MeZO 2305.17333, algorithm 1; ZeroQAT 2509.00031, equation 2.)
Without noise in L, the error of the estimate is sqrt((d + 1) / q) |gradient|
in d parameters (root of the mean square).
"""

from collections.abc import Callable
from collections.abc import Mapping
import dataclasses
import math
import re
from typing import Any

import jax
from jax import lax
from jax import numpy as jnp
import numpy as np

from qat.zo import noise
from qat.zo import perturb
from qat.zo import rounding

LossFn = Callable[[Any], jax.Array]
Number = jax.Array | float


@dataclasses.dataclass(frozen=True)
class Options:
  """How slopes are measured, and what moves.

  Attributes:
    eps: how far parameters are moved to both sides, times N(0, 1).
    directions: q, whose estimates are averaged.
    clip: a slope is clipped to +-clip / eps, so that the two losses differ by
      at most twice that; ZeroQAT's code: 0.2. 0: no clipping.
    perturbed: regex of the whole paths of the parameters that are trained; all
      others stay as they are.
    resolution: a power of two, of which parameters are multiples, so that
      steps can be undone exactly; 0: none. See `rounding`.
  """

  eps: float
  directions: int
  clip: float
  perturbed: str
  resolution: float

  def __post_init__(self):
    """Raises a ValueError for values that no step can be made with."""
    if not 0 < self.eps < math.inf:
      raise ValueError(f'eps={self.eps} must be greater than 0 and finite.')
    if self.directions < 1:
      raise ValueError(f'directions={self.directions}; at least 1.')
    if not 0 <= self.clip < math.inf:
      raise ValueError(f'clip={self.clip} must be finite, and 0 for none.')
    if self.resolution and math.frexp(self.resolution)[0] != 0.5:
      raise ValueError(
        f'resolution={self.resolution} is no power of two; take 2**-20, or 0'
        ' for none.'
      )
    try:
      re.compile(self.perturbed)
    except re.error as error:
      raise ValueError(
        f'perturbed={self.perturbed!r} is no regex: {error}.'
      ) from error


def losses(
  loss_fn: LossFn,
  params: Any,
  key: jax.Array,
  options: Options,
  lazy: bool = False,
) -> jax.Array:
  """L(w + eps z_j) and L(w - eps z_j), float32 `[q, 2]`.

  One compiled forward pass runs 2q times; of one direction there are two, one
  behind the other. Where parameters are read as a
  stacked array, its perturbed form would be a copy of all layers; a loss that
  is `lazy` gets the `perturb.Perturbed` leaves instead and reads each layer's
  in its loop (`perturb.read`).

  Args:
    loss_fn: of a parameter tree; a scalar. Perturbed leaves are float32, also
      of bfloat16 parameters.
    params: the tree; it is only read.
    key: a threefry key.
    options: see `Options`.
    lazy: whether `loss_fn` takes `perturb.Perturbed` leaves.
  """
  q = options.directions
  keys = jax.random.key_data(direction_keys(key, q))
  eps = np.float32(options.eps)

  def loss(params, key_data, scale):
    # Made inside, from what the loop counts: noise that is the same in all
    # turns would be taken out of the loop, and stored.
    moved = perturb.perturb(
      params, perturb.wrap_key(key_data), scale, options.perturbed
    )
    value = loss_fn(moved if lazy else perturb.read(moved))
    return value.astype(jnp.float32)

  if q == 1:
    # A loop around the model's over its layers would make XLA for TPUs turn all
    # stacked arrays for it, and keep them in both forms.
    first = loss(params, keys[0], eps)
    params, keys, first = lax.optimization_barrier((params, keys, first))
    return jnp.stack([first, loss(params, keys[0], -eps)])[None]
  scales = np.tile(np.array([eps, -eps]), q)
  found = lax.map(
    lambda at: loss(params, *at), (jnp.repeat(keys, 2, axis=0), scales)
  )
  return found.reshape(q, 2)


def slopes(losses_q2: jax.Array, options: Options) -> jax.Array:
  """Slopes along the directions `[q]`, clipped; NaN where a loss is not finite.

  Clipping must not make a number of an infinite loss.
  """
  difference = losses_q2[:, 0] - losses_q2[:, 1]
  if options.clip:
    difference = jnp.clip(difference, -2 * options.clip, 2 * options.clip)
  finite = jnp.isfinite(losses_q2).all(axis=1)
  return jnp.where(finite, difference / (2 * options.eps), jnp.nan)


def gradient(
  loss_fn: LossFn,
  params: Any,
  key: jax.Array,
  options: Options,
  lazy: bool = False,
) -> tuple[dict[str, jax.Array], Any]:
  """The estimate as a tree, for an optimizer that takes gradients.

  Args:
    loss_fn: see `losses`.
    params: the tree.
    key: a threefry key; another one for each step.
    options: see `Options`.
    lazy: see `losses`.

  Returns:
    The scalars of `measure`, and a float32 tree like `params`: zeros where
    nothing is perturbed, NaN where a loss was not finite.
  """
  losses_q2 = losses(loss_fn, params, key, options, lazy)
  slopes_q, found = measure(losses_q2, options)
  return found, along(params, key, slopes_q, options.perturbed)


def along(
  params: Any, key: jax.Array, slopes_q: jax.Array, pattern: str
) -> Any:
  """1/q sum_j slope_j z_j, as a tree like `params`."""
  q = slopes_q.size
  names = {name for name, _ in perturb.chosen(params, pattern)}

  def add(total, at):
    key_data, slope = at
    keys = perturb.leaf_keys(params, perturb.wrap_key(key_data), pattern)
    return {
      name: value + slope / q * noise.normal(keys[name], value.shape)[0]
      for name, value in total.items()
    }, None

  zeros = {
    name: jnp.zeros(leaf.shape, jnp.float32)
    for name, leaf in perturb.chosen(params, pattern)
  }
  key_data = jax.random.key_data(direction_keys(key, q))
  total = lax.scan(add, zeros, (key_data, slopes_q))[0]

  def one(path, leaf):
    name = perturb.path_name(path)
    return total[name] if name in names else jnp.zeros_like(leaf)

  return jax.tree_util.tree_map_with_path(one, params)


def measure(
  losses_q2: jax.Array, options: Options
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """`slopes`, and what a step logs of them.

  Returns:
    Slopes `[q]`, and float32 scalars: 'loss' (mean of the 2q losses), 'slope'
    (root of the mean square of the slopes, clipped), 'clipped' (share of the
    directions).
  """
  slopes_q = slopes(losses_q2, options)
  difference = jnp.abs(losses_q2[:, 0] - losses_q2[:, 1])
  clips = options.clip and difference > 2 * options.clip
  return slopes_q, {
    'loss': jnp.mean(losses_q2),
    'slope': jnp.sqrt(jnp.mean(jnp.square(slopes_q))),
    'clipped': jnp.mean(jnp.asarray(clips, jnp.float32)),
  }


def step(
  loss_fn: LossFn,
  params: Any,
  key: jax.Array,
  rate: Number | Mapping[str, Number],
  options: Options,
  lazy: bool = False,
  decay: Number | Mapping[str, Number] = 0.0,
  healthy: jax.Array | bool = True,
) -> tuple[Any, dict[str, jax.Array]]:
  """w <- w - rate * (g + decay * w), without a gradient tree; donate `params`.

  Jitted with `params` donated, one copy of them lives: they are read until the
  last loss is known, and then every array is updated in its place.

  Args:
    loss_fn: see `losses`.
    params: the tree.
    key: a threefry key; another one for each step.
    rate: the learning rate; or one for each path.
    options: see `Options`.
    lazy: see `losses`.
    decay: decoupled weight decay (MeZO's); or one for each path.
    healthy: False: nothing moves.

  Returns:
    The new tree, and of `measure` the scalars and the bool 'healthy'. With a
    loss or a slope that is not finite, nothing moves, 'healthy' is False and
    'slope' shows it.
  """
  slopes_q, metrics = measure(
    losses(loss_fn, params, key, options, lazy), options
  )
  metrics['healthy'] = jnp.isfinite(slopes_q).all() & healthy
  slopes_q = jnp.where(metrics['healthy'], slopes_q, jnp.nan)
  return move(params, key, slopes_q, rate, options, decay), metrics


def move(
  params: Any,
  key: jax.Array,
  slopes_q: jax.Array,
  rate: Number | Mapping[str, Number],
  options: Options,
  decay: Number | Mapping[str, Number] = 0.0,
) -> Any:
  """w - rate * (1/q sum_j slope_j z_j + decay w), rounded as w is stored.

  A run is its first parameters, its keys and its slopes: this replays it. With
  a `resolution` and no decay, the same move with -rate undoes it bit for bit.

  Args:
    params: the tree.
    key: of the step.
    slopes_q: float32 `[q]`; if one is not finite, nothing moves.
    rate: the learning rate; or one for each path.
    options: see `Options`.
    decay: decoupled weight decay, a q-th of it with each direction; or one for
      each path.
  """
  q = options.directions
  finite = jnp.isfinite(slopes_q).all()
  arrays = dict(perturb.chosen(params, options.perturbed))

  def along_one(arrays, at):
    # Each direction is added to the parameters themselves: a sum of directions
    # would be an array more of each one's size.
    key_data, slope = at
    keys = perturb.leaf_keys(
      params, perturb.wrap_key(key_data), options.perturbed
    )
    moved = {}
    for name, w in arrays.items():
      z, bits = noise.normal(keys[name], w.shape)
      own_rate, own_decay = (_at(name, number) for number in (rate, decay))
      delta = -(own_rate * slope / q) * z
      if not (isinstance(own_decay, float) and own_decay == 0):
        delta -= own_rate * own_decay / q * w.astype(jnp.float32)
      new = rounding.add(w, delta, bits, options.resolution)
      moved[name] = jnp.where(finite, new, w)
    return moved, None

  key_data = jax.random.key_data(direction_keys(key, q))
  arrays = lax.scan(along_one, arrays, (key_data, slopes_q))[0]
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: arrays.get(perturb.path_name(path), leaf), params
  )


def _at(name: str, number: Number | Mapping[str, Number]) -> Number:
  return number[name] if isinstance(number, Mapping) else number


def direction_keys(key: jax.Array, directions: int) -> jax.Array:
  """A key for each direction, `[q]`; those of fewer are the first of them."""
  return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(directions))
