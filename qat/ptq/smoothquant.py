"""SmoothQuant (2211.10438): scales that make inputs easier to quantize.

A linear layer computes x W = (x / t) (t W) for any scale t_j > 0 of each input.
A large t_j takes an outlier out of x_j and puts it into the weights, which are
easier to quantize. For inputs that a norm gives, 1 / t is folded into the
norm's gain (and bias), and t into the rows of all layers that read it.
"""

from collections.abc import Sequence
import dataclasses

import jax
from jax import numpy as jnp

# As in the paper's code: no scale is smaller.
SMALLEST = 1e-5


@dataclasses.dataclass(frozen=True)
class Options:
  """The fields of `config.method`.

  Attributes:
    alpha: from 0 to 1, how much of the difficulty moves from the inputs to the
      weights.
  """

  alpha: float


def check(options: Options) -> None:
  """Raises a ValueError where `alpha` is no share."""
  if not 0 <= options.alpha <= 1:
    raise ValueError(
      f'alpha={options.alpha} is not in 0..1: 0 smooths the weights alone, 1'
      ' the inputs.'
    )


def scales(
  absmax_K: jax.Array, kernels: Sequence[jax.Array], options: Options
) -> jax.Array:
  """Equation 4: t_j = max |x_j|^alpha / max |w_j|^(1 - alpha).

  An input that was always 0, or whose weights all are, has the scale 1: there
  is nothing to move, and the paper's formula would give it an extreme scale.

  Args:
    absmax_K: the largest |x| of each input of calibration.
    kernels: `[K, N]`, the weights of all layers that read the inputs; max |w_j|
      is over all of them.
    options: see there.

  Returns:
    T, float32 `[K]`: what the norm's gain is divided by, and rows are
    multiplied by.

  Raises:
    ValueError: for options or kernels that do not fit.
  """
  check(options)
  if not kernels or any(w.shape[0] != absmax_K.size for w in kernels):
    raise ValueError(
      f'{absmax_K.size} inputs, and kernels {[w.shape for w in kernels]}: the'
      ' layers that read them have so many rows.'
    )
  x_K = jnp.asarray(absmax_K, jnp.float32)
  w_K = jnp.max(
    jnp.stack([jnp.max(jnp.abs(w_KN), -1) for w_KN in kernels]), 0
  ).astype(jnp.float32)
  t_K = jnp.maximum(x_K, SMALLEST) ** options.alpha
  t_K = t_K / jnp.maximum(w_K, SMALLEST) ** (1 - options.alpha)
  empty_K = (x_K == 0) | (w_K == 0)
  return jnp.where(empty_K, 1.0, jnp.maximum(t_K, SMALLEST))
