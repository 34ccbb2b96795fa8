"""The gradient from exact slopes along random directions (forward mode).

g = 1/q sum_j (grad L . z_j) z_j, with z ~ N(0, I) (Baydin et al. 2202.08587).
SPSA's estimate without its eps: the same expected error, no rounding of a
difference, for the price of a tangent beside every activation of a pass.

What has a `jax.custom_vjp` has no forward mode; a quantizer written as
x + stop_gradient(quantized - x) has one, with the straight-through slope.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
from jax import lax
from jax import numpy as jnp

from qat.zo import perturb
from qat.zo import spsa


@dataclasses.dataclass(frozen=True)
class Options:
  """Which directions.

  Attributes:
    directions: q, whose estimates are averaged.
    perturbed: regex of the whole paths of the parameters that are trained.
  """

  directions: int
  perturbed: str


def slopes(
  loss_fn: Callable[[Any], jax.Array],
  params: Any,
  key: jax.Array,
  options: Options,
) -> tuple[jax.Array, jax.Array]:
  """The loss, and its slopes `[q]` along the directions of `spsa.gradient`.

  Args:
    loss_fn: of a parameter tree whose chosen leaves are float32; a scalar.
    params: the tree.
    key: a threefry key; another one for each step.
    options: see `Options`.

  Raises:
    TypeError: the loss goes through a `jax.custom_vjp`.
  """

  def slope(key_data):
    # Forward through one number, the distance along the direction: noise and
    # tangent are never stored.
    def at(distance):
      moved = perturb.perturb(
        params, perturb.wrap_key(key_data), distance, options.perturbed
      )
      return loss_fn(perturb.read(moved)).astype(jnp.float32)

    return jax.jvp(at, (jnp.float32(0),), (jnp.float32(1),))

  keys = spsa.direction_keys(key, options.directions)
  try:
    losses_q, slopes_q = lax.map(slope, jax.random.key_data(keys))
  except TypeError as error:
    if 'custom_vjp' not in str(error):
      raise
    raise TypeError(
      'The loss goes through a jax.custom_vjp, which has no forward mode; take'
      ' spsa.gradient, or a model whose quantizers are written as'
      ' x + stop_gradient(quantized - x).'
    ) from error
  return losses_q[0], slopes_q


def gradient(
  loss_fn: Callable[[Any], jax.Array],
  params: Any,
  key: jax.Array,
  options: Options,
) -> tuple[dict[str, jax.Array], Any]:
  """What a step logs, and the estimate: a float32 tree like `params`.

  The scalars are 'loss', and 'slope', the root of the mean square of the
  slopes. The tree has zeros where nothing is chosen. For arguments and errors,
  see `slopes`.
  """
  loss, slopes_q = slopes(loss_fn, params, key, options)
  found = {'loss': loss, 'slope': jnp.sqrt(jnp.mean(jnp.square(slopes_q)))}
  return found, spsa.along(params, key, slopes_q, options.perturbed)
