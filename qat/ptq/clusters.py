"""The best three clusters of a matrix's weights: one-dimensional 3-means.

The optimum cuts the sorted weights at two places. Dynamic programming finds
them among all distinct weights, exactly and without a random start. However
large a matrix of 16-bit weights is, it holds at most 65,536 distinct ones,
which are counted rather than sorted. NumPy on the host, for `splitquant`.
"""

from collections.abc import Callable
from concurrent import futures
import dataclasses
import os

import jax
from jax import numpy as jnp
import numpy as np

WORDS = 1 << 16  # Of 16 bits; also cells in which many more weights are put.

_PIECE = 1 << 18  # Weights that are looked at once, per thread.
_TURNS = 1000  # Of Lloyd's algorithm, which stops long before.

Cuts = tuple[np.float32, np.float32]


@dataclasses.dataclass(frozen=True)
class Seen:
  """The distinct weights of a matrix by rising value.

  Attributes:
    values: float32; 0.0 and -0.0 may both be there.
    counts: how often each occurs.
    words: uint16, the bits of each in the matrix's dtype; None: it has more.
  """

  values: np.ndarray
  counts: np.ndarray
  words: np.ndarray | None = None


def cuts(seen: Seen) -> Cuts:
  """The largest weight of the lower cluster and the least of the upper one.

  The middle cluster is what lies between the two. Where there are fewer than
  three distinct weights, clusters are empty and a cut may be infinite.

  More than 65,536 distinct weights are cut between 65,536 cells of equally many
  of them, and Lloyd's algorithm goes on from there among all weights, to where
  no weight is nearer to another cluster's mean.

  Raises:
    ValueError: for weights that are not finite.
  """
  values, counts = seen.values, seen.counts
  size = values.size
  if not np.isfinite(values[[0, -1]]).all():
    raise ValueError('The weights to split are not all finite.')
  if size <= WORDS:
    i, j = three_means(values, counts)
  else:
    i, j = _lloyd(values, counts)
  infinity = np.float32(np.inf)
  return (
    values[i - 1] if i else -infinity,
    values[j] if j < size else infinity,
  )


def three_means(values: np.ndarray, counts: np.ndarray) -> tuple[int, int]:
  """The best cuts of sorted values into three clusters, by squared distance.

  Maximizes the sum over clusters of (sum of values)^2 / count, which is what
  the squares of the distances lack from the squares of the values. The best
  first cut does not fall as the second one rises, so that looking for it
  between those of neighbours, the middle first, takes O(n log n).

  Args:
    values: rising, at least one.
    counts: how often each occurs.

  Returns:
    i and j: the clusters are `values[:i]`, `values[i:j]` and `values[j:]`.
  """
  size = values.size
  weight = np.concatenate([[0.0], np.cumsum(counts, dtype=np.float64)])
  # Around their mean, so that squares of sums lose few digits.
  centred = np.float64(values)
  centred = centred - np.dot(centred, counts) / weight[-1]
  total = np.concatenate([[0.0], np.cumsum(centred * counts)])

  def gain(start, end):
    count = weight[end] - weight[start]
    square = np.square(total[end] - total[start])
    return np.divide(square, count, out=np.zeros_like(square), where=count > 0)

  # best[j], the first cut for the second cut j; -1: not known yet.
  best = np.full(size + 1, -1)
  gains = np.empty(size + 1)
  best[0] = gains[0] = 0
  step = 1 << size.bit_length()
  while step:
    second = np.arange(step, size + 1, 2 * step)
    if second.size:
      known = np.minimum(second + step, size)
      least = best[second - step]
      most = np.where(best[known] < 0, second, best[known])
      most = np.maximum(np.minimum(most, second), least)
      first, gains[second] = _largest(
        lambda i, k, second=second: gain(0, i) + gain(i, second[k]), least, most
      )
      best[second] = first
    step //= 2
  ends = np.arange(size + 1)
  j = int(np.argmax(gains + gain(ends, np.full(size + 1, size))))
  return int(best[j]), j


def _largest(
  score: Callable[[np.ndarray, np.ndarray], np.ndarray],
  least: np.ndarray,
  most: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
  """For each k, the first i from least[k] to most[k] of the largest score."""
  lengths = most - least + 1
  starts = np.cumsum(lengths) - lengths
  k = np.repeat(np.arange(least.size), lengths)
  i = np.arange(k.size) - (starts - least)[k]
  scores = score(i, k)
  largest = np.maximum.reduceat(scores, starts)
  hits = np.flatnonzero(scores == largest[k])
  return i[hits[np.searchsorted(hits, starts)]], largest


def _lloyd(values: np.ndarray, counts: np.ndarray) -> tuple[int, int]:
  """Cuts where no value is nearer to another mean, from the best of cells."""
  weight = np.concatenate([[0.0], np.cumsum(counts, dtype=np.float64)])
  total = np.concatenate([[0.0], np.cumsum(np.float64(values) * counts)])
  ends = np.linspace(0, values.size, WORDS + 1).astype(int)
  shares = np.diff(weight[ends])
  cells = three_means(np.diff(total[ends]) / shares, shares)
  cut = [int(ends[c]) for c in cells]
  for _ in range(_TURNS):
    edges = [0, *cut, values.size]
    means = np.diff(total[edges]) / np.diff(weight[edges])
    middles = np.float32((means[1:] + means[:-1]) / 2)
    moved = [int(np.searchsorted(values, middle)) for middle in middles]
    if moved == cut or moved[0] == moved[1]:
      break
    cut = moved
  return cut[0], cut[1]


def floats(w: np.ndarray) -> np.ndarray:
  """Weights as float32."""
  return np.asarray(w, np.float32)


def narrow(w: jax.typing.ArrayLike) -> np.ndarray:
  """The same weights in 16 bits each, where those hold them all, or float32.

  What was read into float32 from a file of bfloat16 or float16 is found again.
  """
  w = np.asarray(w)
  if w.dtype in (jnp.bfloat16, np.float16):
    return w
  w = np.ascontiguousarray(floats(w))
  bits = w.view(np.uint32)
  if not any(np.any(piece & 0xFFFF) for piece in pieces(bits)):
    return (bits >> 16).astype(np.uint16).view(jnp.bfloat16)
  with np.errstate(over='ignore', invalid='ignore'):
    for piece in pieces(w):
      if not np.array_equal(floats(piece.astype(np.float16)), piece):
        return w
    return w.astype(np.float16)


def seen(w: np.ndarray) -> Seen:
  """The distinct weights of what `narrow` gave."""
  if w.dtype == np.float32:
    flat = np.sort(w, axis=None)
    new = np.concatenate([[True], flat[1:] != flat[:-1]])
    first = np.flatnonzero(new)
    return Seen(flat[first], np.diff(first, append=flat.size))

  def count(piece: np.ndarray) -> np.ndarray:
    return np.bincount(piece.reshape(-1), minlength=WORDS)

  with pool() as threads:
    counts = sum(threads.map(count, pieces(w.view(np.uint16))))
  words = np.flatnonzero(counts).astype(np.uint16)
  values = floats(words.view(w.dtype))
  order = np.argsort(values, kind='stable')  # NaNs last, as by np.sort.
  words, values = words[order], values[order]
  return Seen(values, counts[words], words)


def pieces(rows: np.ndarray) -> list[np.ndarray]:
  """Views of some rows each, which stay in the processor's cache."""
  rows = rows.reshape(-1, rows.shape[-1])
  count = max(_PIECE // rows.shape[-1], 1)
  return [rows[i : i + count] for i in range(0, rows.shape[0], count)]


def pool() -> futures.ThreadPoolExecutor:
  """A thread for each processor; NumPy's long loops run side by side."""
  return futures.ThreadPoolExecutor(os.cpu_count())
