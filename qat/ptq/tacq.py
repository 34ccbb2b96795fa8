"""TaCQ (2504.07389): GPTQ that keeps the weights on which a task hangs.

A weight's score is what the loss would change by, to first order, if it alone
were rounded, times its size. The weights of the highest scores of the whole
model are kept as float16; GPTQ rounds the others.
"""

from collections.abc import Sequence
import dataclasses

import jax
from jax import numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Options:
  """The fields of `config.method`.

  Attributes:
    share: of all weights that have a score, those that are kept; the paper's is
      0.0035.
  """

  share: float


def check(options: Options) -> None:
  """Raises a ValueError for a share that is none."""
  if not 0 <= options.share <= 1:
    raise ValueError(
      f'share={options.share} of the weights must be from 0 to 1.'
    )


@jax.jit
def scores(
  w_KN: jax.Array, gradient_KN: jax.Array, corrupted_KN: jax.Array
) -> jax.Array:
  """|W| |G| |Q(W) - W|, float32.

  Args:
    w_KN: weights.
    gradient_KN: the sum over examples of the absolute values of the gradient of
      each example's loss.
    corrupted_KN: the weights, quantized by GPTQ with as many bits.
  """
  w_KN, gradient_KN, corrupted_KN = (
    a.astype(jnp.float32) for a in (w_KN, gradient_KN, corrupted_KN)
  )
  # The distance last: two small factors first could leave float32's range.
  return jnp.abs(w_KN * (corrupted_KN - w_KN)) * jnp.abs(gradient_KN)


def threshold(score_arrays: Sequence[jax.Array], share: float) -> float:
  """What the int(share * total) highest of all scores are greater than.

  The scores are only counted, never sorted or copied into one array: positive
  float32 numbers are ordered as their bits are, which two passes look at 16 at
  a time.

  Args:
    score_arrays: of any shapes; none negative.
    share: of all scores, 0 to 1.

  Returns:
    A threshold; fewer scores are greater where several equal it.

  Raises:
    ValueError: for another share, no scores, or scores that are negative or not
      finite.
  """
  check(Options(share))
  total = sum(scores.size for scores in score_arrays)
  if not total:
    raise ValueError('No scores: give those of at least one matrix.')
  kept = int(share * total)
  if kept == total:
    return float('-inf')

  def count(digits, chosen):
    counts = np.zeros(2**16, np.int64)
    for scores in score_arrays:
      counts += np.bincount(digits(chosen(_bits(scores))), minlength=2**16)
    return counts

  def place(counts, rank):
    """Where the `rank`-th highest is, and its rank there."""
    above = np.cumsum(counts[::-1])[::-1] - counts  # How many are higher.
    at = int(np.max(np.nonzero(above + counts >= rank)))
    return at, rank - int(above[at])

  # The highest score that is not kept.
  rank = kept + 1
  high, rank = place(count(lambda bits: bits >> 16, lambda bits: bits), rank)
  low, _ = place(
    count(lambda bits: bits & 0xFFFF, lambda bits: bits[bits >> 16 == high]),
    rank,
  )
  return float(np.uint32(high << 16 | low).view(np.float32))


def _bits(scores: jax.Array) -> np.ndarray:
  scores = np.asarray(scores, np.float32).ravel()
  if not (np.isfinite(scores) & (scores >= 0)).all():
    raise ValueError(
      'A score is negative or not finite; look for NaN in the gradients and in'
      ' the weights.'
    )
  return np.abs(scores).view(np.uint32)  # -0 has other bits than 0.


def average_bits(bits: int, share: float) -> float:
  """Bits of a weight: a kept one takes 16 for its value, 16 for its place.

  So SpQR counts, and with it the paper's 2.1 and 3.1; scales are left out.
  """
  return bits + share * (32 - bits)
