"""How well slopes along random directions, and STE, know a quantized model.

ZeroQAT (2509.00031) trains by slopes s_j = (L(w + eps z_j) - L(w - eps z_j)) /
2 eps of the quantized model's loss; what it is compared with trains by a
gradient g whose straight-through estimator (STE) takes rounding for the
identity. Neither is the other's truth, so both are set side by side:

  cosines   of 1/q sum_j s_j z_j and g, for q directions: about sqrt(q / d) in d
            parameters where g is right, whatever the method
  agreement of s_j and g . z_j over directions: their correlation is the cosine
            of g and the gradient of the loss, smoothed over N(0, eps^2), and a
            few dozen directions tell it in any number of parameters
"""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import functools
import math
from typing import Any
from typing import NamedTuple

import jax
from jax import numpy as jnp
import numpy as np

from qat import objective as objective_lib
from qat.infer import load
from qat.nn import transformer
from qat.zo import alignment
from qat.zo import noise
from qat.zo import perturb
from qat.zo import spsa

Loss = Callable[[Any], jax.Array]


class Agreement(NamedTuple):
  """Slopes of the loss and of the straight-through gradient, by directions.

  Attributes:
    correlation: sum s t / sqrt(sum s^2 sum t^2); both have mean 0.
    error: its standard error, (1 - correlation^2) / sqrt(directions).
    ratio: of the roots of the mean squares, s over t: above 1, the loss is
      rougher than the gradient says.
  """

  correlation: float
  error: float
  ratio: float


class Cosines(NamedTuple):
  """Of estimates from q directions each and the straight-through gradient.

  Attributes:
    directions: q.
    mean: over estimates that share no direction.
    spread: standard deviation of these; NaN of one.
    estimates: how many they are.
    expected: sqrt(q / (d + q + 1)), of an exact gradient's slopes. One
      direction alone has sqrt(2 / pi) of it.
  """

  directions: int
  mean: float
  spread: float
  estimates: int
  expected: float


class Study(NamedTuple):
  """What was found for one model and one batch.

  Attributes:
    parameters: d, how many are trained.
    loss: of the batch, nats per token.
    gradient_norm: of the straight-through gradient.
    straight_through: g . z_j, `[q]`.
    slopes: s_j by eps, `[q]` each.
    agreements: by eps.
    cosines: of the first eps, by rising q.
  """

  parameters: int
  loss: float
  gradient_norm: float
  straight_through: np.ndarray
  slopes: dict[float, np.ndarray]
  agreements: dict[float, Agreement]
  cosines: list[Cosines]


def loss_of(model: load.Loaded, batch: Mapping[str, np.ndarray]) -> Loss:
  """The mean loss of a batch, of a tree that may have `Perturbed` leaves."""
  reading = transformer.reading(model.model, perturb.read)

  def loss(params: Any) -> jax.Array:
    total, _ = objective_lib.loss_sum(
      reading, model.config, model.mesh, params, batch
    )
    return total / objective_lib.counted(batch)

  return loss


def study(
  loss: Loss,
  params: Any,
  *,
  pattern: str,
  eps: Sequence[float],
  groups: Sequence[int],
  directions: int,
  seed: int,
  show: Callable[[int, int], None] = lambda done, total: None,
) -> Study:
  """Measures slopes along random directions, and what STE says of them.

  Args:
    loss: of a parameter tree; see `loss_of`.
    params: the tree; frozen leaves may be quantized.
    pattern: regex of the whole paths of the parameters that are trained.
    eps: distances; estimates are made with the first.
    groups: numbers of directions of an estimate.
    directions: how many there are.
    seed: of the directions, which are those of a step with this key.
    show: told of how many losses of how many are known.

  Raises:
    ValueError: impossible arguments, or nothing to train.
  """
  check(eps, groups, directions)
  trained = dict(perturb.chosen(params, pattern))
  value, gradient = jax.jit(jax.value_and_grad(functools.partial(_at, loss)))(
    trained, params
  )
  size = sum(leaf.size for leaf in trained.values())
  keys = spsa.direction_keys(
    jax.random.key(seed, impl='threefry2x32'), directions
  )

  @jax.jit
  def pair(params, key_data, distance):
    def one(scale):
      key = perturb.wrap_key(key_data)
      return loss(perturb.perturb(params, key, scale, pattern))

    return jax.lax.map(one, jnp.stack([distance, -distance]))

  @functools.partial(jax.jit, donate_argnums=0)
  def add(totals, gradient, key_data, slope):
    """Adds slope * z to each total; returns g . z, too."""
    leaf_keys = perturb.leaf_keys(trained, perturb.wrap_key(key_data), '.*')
    z = {k: noise.normal(leaf_keys[k], v.shape)[0] for k, v in trained.items()}
    totals = [jax.tree.map(lambda t, z: t + slope * z, t, z) for t in totals]
    return totals, alignment.dot(gradient, z)

  slopes = {e: np.zeros(directions) for e in eps}
  through = np.zeros(directions)
  cosine = jax.jit(alignment.cosine)
  totals = {q: _zeros(trained) for q in groups}
  found = {q: [] for q in groups}
  norm = float(jnp.sqrt(alignment.dot(gradient, gradient)))
  for j in range(directions):
    key_data = jax.random.key_data(keys[j])
    for i, e in enumerate(eps):
      plus, minus = np.asarray(pair(params, key_data, np.float32(e)), float)
      slopes[e][j] = (plus - minus) / (2 * e)
      show(2 * (j * len(eps) + i + 1), 2 * directions * len(eps))
    made, dot = add(
      [*totals.values()], gradient, key_data, np.float32(slopes[eps[0]][j])
    )
    totals, through[j] = dict(zip(totals, made, strict=True)), float(dot)
    for q in groups:
      if (j + 1) % q == 0:
        found[q].append(float(cosine(totals[q], gradient)))
        totals[q] = _zeros(trained)
  return Study(
    parameters=size,
    loss=float(value),
    gradient_norm=norm,
    straight_through=through,
    slopes=slopes,
    agreements={e: agreement(slopes[e], through) for e in eps},
    cosines=[_cosines(q, found[q], size) for q in sorted(groups)],
  )


def agreement(slopes_q: np.ndarray, through_q: np.ndarray) -> Agreement:
  """How slopes of a loss and of a gradient agree along the same directions."""
  sizes = np.sum(slopes_q**2), np.sum(through_q**2)
  correlation = float(np.sum(slopes_q * through_q) / math.sqrt(np.prod(sizes)))
  return Agreement(
    correlation,
    (1 - correlation**2) / math.sqrt(len(slopes_q)),
    math.sqrt(sizes[0] / sizes[1]),
  )


def check(eps: Sequence[float], groups: Sequence[int], directions: int) -> None:
  """Raises a ValueError for numbers that no study can be made with."""
  if not eps or not 0 < min(eps) <= max(eps) < math.inf:
    raise ValueError(f'eps {list(eps)}: distances, each greater than 0.')
  if not groups or not 1 <= min(groups) <= max(groups) <= directions:
    raise ValueError(
      f'groups {list(groups)} of {directions} directions: numbers between 1 and'
      ' that.'
    )


def _at(loss: Loss, trained: dict[str, jax.Array], params: Any) -> jax.Array:
  """The loss with some leaves of a tree replaced, by their paths."""

  def one(path, leaf):
    return trained.get(perturb.path_name(path), leaf)

  return loss(jax.tree_util.tree_map_with_path(one, params))


def _cosines(q: int, found: Sequence[float], size: int) -> Cosines:
  spread = float(np.std(found, ddof=1)) if len(found) > 1 else math.nan
  expected = math.sqrt(q / (size + q + 1))
  return Cosines(q, float(np.mean(found)), spread, len(found), expected)


def _zeros(trained: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
  return {k: jnp.zeros(v.shape, jnp.float32) for k, v in trained.items()}
