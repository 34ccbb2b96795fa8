"""How much the output of a layer depends on each single weight.

The optimal-brain-surgeon sensitivity of pQuant (arXiv 2602.22592, section 2.3).
Its equation 1 defines the sensitivity of w_kn, the weight from input k to
output n, as the error of the layer's outputs when w_kn is set to 0 and the
other weights of that output are re-optimised for the same inputs X:

  e_kn = min_W' |X W - X W'|^2   subject to   w'_kn = 0
       = w_kn^2 / [(X^T X)^-1]_kk

Its equation 2, which the paper plots and this file computes, is half of that:

  s_kn = w_kn^2 / (2 [(X^T X)^-1]_kk) = e_kn / 2

so e = 2 s exactly, and every scalar and picture here, being relative to the
mean of s, is the same for either. (The half belongs to a loss |.|^2 / 2.
Kernels are [K, N] here and [N, K] in the paper, whose w_ij has j for the
input.) Before the inversion, `damping` times the mean of X^T X's diagonal is
added to it, as GPTQ does; e is then the minimum of
|X W - X W'|^2 + damping * mean * |W - W'|^2.

On exactly binary weights w^2 is one constant: s depends on the input channel
alone, and part of how even it looks is in the definition. So the latent
weights are always analysed as well.
"""

from collections.abc import Iterable
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from qat.nn import capture

# Bins of log10(s / mean s). What lies outside, zeros too, counts in the bin at
# that end. A layer whose weights all matter alike is one spike at 0.
EDGES = np.arange(-8.0, 4.25, 0.25)
MAP_SIDE = 96  # A picture has at most so many rows and columns.
KINDS = ('latent', 'quantized')


@dataclasses.dataclass(frozen=True)
class Stats:
  """What is kept of one kernel's K x N sensitivities s.

  Attributes:
    gini: inequality of s. 0: every weight matters alike; near 1: one does.
    top1: share of the sum of s that the most sensitive 1 % of weights hold.
    mean: of s; half the squared output error that a weight is worth.
    histogram: shares of the weights in the bins of log10(s / mean) at `EDGES`.
    map_NK: log10(s / mean), outputs x inputs, max-pooled to at most `MAP_SIDE`
      rows and columns, float16; -inf where s is 0.
  """

  gini: float
  top1: float
  mean: float
  histogram: np.ndarray
  map_NK: np.ndarray


# path -> 'latent', 'quantized' if the layer is, 'binarized' if asked for -> ...
Analysis = dict[str, dict[str, Stats]]


@jax.jit
def inverse_diagonal(x_MK: jax.Array, damping: float) -> jax.Array:
  """The diagonal of (X^T X + damping * mean diagonal * I)^-1, float32 [K].

  Args:
    x_MK: inputs of a layer; not all zero.
    damping: share of the mean diagonal that is added. With none, inputs that
      depend on each other make a singular matrix and NaN.
  """
  x_MK = x_MK.astype(jnp.float32)
  gram_KK = jnp.matmul(x_MK.T, x_MK, precision=jax.lax.Precision.HIGHEST)
  mean = jnp.mean(jnp.diagonal(gram_KK))
  eye_KK = jnp.eye(gram_KK.shape[0], dtype=jnp.float32)
  # In units of the mean the factorization neither over- nor underflows.
  lower_KK = jnp.linalg.cholesky(gram_KK / mean + damping * eye_KK)
  inverse_KK = jax.scipy.linalg.solve_triangular(lower_KK, eye_KK, lower=True)
  return jnp.sum(inverse_KK**2, axis=0) / mean


def scores(w_KN: jax.Array, inverse_K: jax.Array) -> jax.Array:
  """The sensitivity of every weight: s_KN of pQuant's equation 2.

  Args:
    w_KN: weights of a linear layer.
    inverse_K: the inverse's diagonal, from `inverse_diagonal`.

  Returns:
    s_KN, float32, not negative; squared units of the layer's output.
  """
  return w_KN.astype(jnp.float32) ** 2 / (2 * inverse_K[:, None])


@jax.jit
def gini(s_KN: jax.Array) -> jax.Array:
  """The Gini coefficient of scores that are not negative; 0 if all are 0.

  Scores that are not finite have none: NaN.
  """
  largest = jnp.max(s_KN)
  ranked_KN = jnp.sort(s_KN.ravel()).reshape(s_KN.shape)
  ranked_KN = ranked_KN / jnp.where(largest > 0, largest, 1)
  n = s_KN.size
  # (2 i - n - 1) / n for i = 1 .. n.
  place_KN = (2 * jnp.arange(n, dtype=jnp.float32) + (1 - n)) / n
  total = _sum(ranked_KN)
  weighted = _sum(place_KN.reshape(s_KN.shape) * ranked_KN)
  return jnp.where(total == 0, 0, weighted / jnp.where(total == 0, 1, total))


@jax.jit
def top_share(s_KN: jax.Array) -> jax.Array:
  """The share of the sum of scores that the largest 1 % of them hold.

  1 % is rounded to whole scores and is at least one. Scores that are all 0 are
  all equal: their largest 1 % hold 1 %. Scores that are not finite: NaN.
  """
  largest = jnp.max(s_KN)
  s_KN = jnp.where(largest == 0, 1, s_KN / jnp.where(largest == 0, 1, largest))
  top = max(1, round(s_KN.size / 100))
  return jnp.sum(jnp.sort(s_KN.ravel())[-top:]) / _sum(s_KN)


@functools.partial(jax.jit, static_argnames='side')
def max_pool(s_KN: jax.Array, side: int = MAP_SIDE) -> jax.Array:
  """The largest score of each window, outputs x inputs, as the paper draws it.

  Args:
    s_KN: scores, not negative.
    side: rows and columns of the result, at most. The windows of an axis are of
      one length, as short as that allows; the last may hang over the end.
  """
  k, n = s_KN.shape
  window_k, window_n = -(-k // side), -(-n // side)
  # Zeros lose against every score, so padding changes no maximum.
  padded_KN = jnp.pad(s_KN, ((0, -k % window_k), (0, -n % window_n)))
  windows = padded_KN.reshape(-1, window_k, padded_KN.shape[1])
  windows = jnp.max(windows, axis=1).reshape(windows.shape[0], -1, window_n)
  return jnp.max(windows, axis=2).T


def _sum(s_KN: jax.Array) -> jax.Array:
  # In two steps: one running float32 sum of 10^7 scores loses three digits.
  return jnp.sum(jnp.sum(s_KN, axis=1))


@jax.jit
def _stats(s_KN: jax.Array) -> dict[str, jax.Array]:
  mean = _sum(s_KN) / s_KN.size
  relative_KN = s_KN / jnp.where(mean > 0, mean, 1)
  inner = jnp.asarray(10.0 ** EDGES[1:-1], jnp.float32)
  below = jnp.searchsorted(jnp.sort(relative_KN.ravel()), inner)
  counts = jnp.diff(below, prepend=0, append=s_KN.size)
  return {
    'gini': gini(s_KN),
    'top1': top_share(s_KN),
    'mean': mean,
    'histogram': counts / s_KN.size,
    'map_NK': jnp.log10(max_pool(relative_KN)).astype(jnp.float16),
  }


def analyse(
  records: Iterable[capture.LinearRecord],
  damping: float,
  *,
  binarized: bool = False,
) -> Analysis:
  """The sensitivity of every layer, of its latent and its quantized weights.

  A layer that saw no input but zeros, such as an expert that no token went to,
  has scores of 0.

  Args:
    records: one of each layer; read one at a time, so that an iterator needs
      the memory of one layer.
    damping: share of the mean diagonal that is added before the inversion.
    binarized: analyse also the weights that each layer would have if all were
      of one size: how unequal the inputs alone make them.

  Returns:
    path -> kind of weights -> Stats; a layer that is not quantized has no
    'quantized'.

  Raises:
    ValueError: values that are not finite, or inputs that need more damping.
  """
  analysis = {}
  for record in records:
    weights = {'latent': record.latent_KN}
    if record.quantized_KN is not None:
      weights['quantized'] = record.quantized_KN
    read = {f'{kind}_KN': w_KN for kind, w_KN in weights.items()}
    for name, values in {'x_MK': record.x_MK, **read}.items():
      if not jnp.all(jnp.isfinite(values)):
        raise ValueError(
          f'{record.path!r}: {name} has values that are not finite.'
        )
    if binarized:  # Whatever the signs: scores have squares of weights.
      weights['binarized'] = jnp.ones_like(record.latent_KN)
    if jnp.any(record.x_MK):
      inverse_K = inverse_diagonal(record.x_MK, damping)
      if not jnp.all(jnp.isfinite(inverse_K)):
        raise ValueError(
          f'The inputs of {record.path!r} depend on each other too closely for '
          f'damping {damping}; raise config.sensitivity.damping, or --damping.'
        )
    else:
      inverse_K = jnp.full(record.x_MK.shape[1], jnp.inf)
    analysis[record.path] = {
      kind: _to_host(_stats(scores(w_KN, inverse_K)))
      for kind, w_KN in weights.items()
    }
  return analysis


def scalars(analysis: Analysis) -> dict[str, float]:
  """The numbers of an analysis, under the keys of metrics.jsonl."""
  return {
    f'sensitivity/{kind}/{name}/{path}': getattr(stats, name)
    for path, kinds in analysis.items()
    for kind, stats in kinds.items()
    for name in ('gini', 'top1')
  }


def _to_host(stats: dict[str, jax.Array]) -> Stats:
  host = jax.device_get(stats)
  numbers = {name: float(host[name]) for name in ('gini', 'top1', 'mean')}
  return Stats(**host | numbers)
