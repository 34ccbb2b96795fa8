"""SplitQuantV2 (2503.07657): three layers, each with a grid of its own.

A matrix becomes the sum of three of its shape: the weights of the lower, the
middle or the upper of three clusters, and zeros elsewhere. Each is rounded to
2^bits levels from its least to its largest weight. No data are needed, and no
accelerator: all of this is NumPy on the host.

The clusters (see `clusters`) are those of one-dimensional 3-means. A matrix in
16 bits holds at most 65,536 distinct weights, however large it is: their codes
are computed once and looked up by the weight's 16 bits.

Reconstructions, for the paper's code is not public: the grids (asymmetric, with
an integer zero point), which share a scale, and how the clusters are found.
"""

from collections.abc import Callable
import dataclasses

import jax
import numpy as np

from qat.ptq import clusters
from qat.quant import composed
from qat.quant import float16
from qat.quant import grid
from qat.quant import qtensor

CLUSTERS = 3
GRANULARITIES = ('tensor', 'channel')
STORAGES = ('sum', 'masked')
BIASES = ('split', 'keep')

Grids = tuple[np.ndarray, np.ndarray]  # Scale and zero point.


@dataclasses.dataclass(frozen=True)
class Options:
  """The fields of `config.method`.

  Attributes:
    bits: of a code: 2, 3, 4, 6 or 8.
    granularity: which weights of a layer of the three share a scale: 'tensor'
      or 'channel' (an output's). The clusters are the matrix's either way.
    storage: 'sum', three layers, whose zeros are weights too and so within the
      range of each; or 'masked', an extension: one code a weight on its own
      cluster's grid, which needs no zero, and the number of its cluster.
    bias: 'split', quantized as a matrix is, by clusters of its own; or 'keep'.
  """

  bits: int
  granularity: str
  storage: str
  bias: str


def quantize(
  w_KN: jax.typing.ArrayLike, options: Options
) -> composed.Sum | composed.Clustered:
  """A matrix split and rounded; arrays of the host.

  Args:
    w_KN: weights, `[K, N]`, or `[N]` with granularity 'tensor'.
    options: see there.

  Raises:
    ValueError: for options that there are none of, or weights that are not
      finite.
  """
  check(options)
  w_KN = clusters.narrow(w_KN)
  rows = w_KN.reshape(-1, w_KN.shape[-1])
  seen = clusters.seen(rows)
  cut = clusters.cuts(seen)
  by_channel = options.granularity == 'channel'
  masked = options.storage == 'masked'
  # Where all weights share a grid, the distinct ones say as much as all.
  distinct = seen.values[None]
  least, most = _extent(rows if by_channel else distinct, cut, by_channel)
  grids = _grids(least, most, options.bits, masked)

  def encode(piece: np.ndarray) -> list[np.ndarray]:
    return _encode(clusters.floats(piece), cut, grids, options.bits, masked)

  if seen.words is not None and not by_channel:
    tables = np.zeros((2 if masked else CLUSTERS, clusters.WORDS), np.int8)
    tables[:, seen.words] = np.stack(encode(distinct))[:, 0]

    def look_up(piece: np.ndarray, outs: list[np.ndarray]) -> None:
      for table, out in zip(tables, outs, strict=True):
        np.take(table, piece, out=out, mode='clip')

    arrays = _mapped(look_up, rows.view(np.uint16), len(tables))
  else:

    def compute(piece: np.ndarray, outs: list[np.ndarray]) -> None:
      for codes, out in zip(encode(piece), outs, strict=True):
        out[:] = codes

    arrays = _mapped(compute, rows, 2 if masked else CLUSTERS)
  arrays = [a.reshape(w_KN.shape) for a in arrays]
  alphabet = f'int{options.bits}'
  if masked:
    return composed.Clustered(*arrays, *grids, alphabet)
  scales, zeros = (
    [row.reshape((1,) * (w_KN.ndim - 1) + row.shape) for row in numbers]
    for numbers in (grids[0], grids[1].astype(np.int8))
  )
  return composed.Sum(
    tuple(
      qtensor.QTensor(codes, scale, alphabet, zero)
      for codes, scale, zero in zip(arrays, scales, zeros, strict=True)
    )
  )


def quantize_bias(b_N: jax.typing.ArrayLike, options: Options) -> np.ndarray:
  """The bias that the three layers' biases sum up to, float32."""
  check(options)
  if options.bias == 'keep':
    return np.asarray(b_N, np.float32)
  whole = dataclasses.replace(options, granularity='tensor', storage='sum')
  return np.asarray(quantize(b_N, whole).dequantize())


def split(w_KN: jax.typing.ArrayLike) -> tuple[np.ndarray, ...]:
  """The three layers before they are rounded, in the dtype of the weights.

  Their sum is the matrix bit for bit: what belongs to another layer is -0.0,
  for x + -0.0 is x even where x is -0.0.
  """
  w_KN = np.asarray(w_KN)
  nothing = np.asarray(-0.0, w_KN.dtype)
  cut = clusters.cuts(clusters.seen(clusters.narrow(w_KN)))
  masks = _masks(clusters.floats(w_KN), cut)
  return tuple(np.where(mask, w_KN, nothing) for mask in masks)


def _mapped(
  function: Callable[[np.ndarray, list[np.ndarray]], None],
  rows: np.ndarray,
  count: int,
) -> list[np.ndarray]:
  """`count` int8 arrays of the shape of `rows`, filled piece by piece."""
  arrays = [np.empty(rows.shape, np.int8) for _ in range(count)]
  with clusters.pool() as threads:
    outs = zip(*(clusters.pieces(array) for array in arrays), strict=True)
    list(threads.map(function, clusters.pieces(rows), outs))
  return arrays


# ------------------------------------------------------------------------ grids


def _masks(values: np.ndarray, cut: clusters.Cuts) -> list[np.ndarray]:
  """The members of the lower, the middle and the upper cluster."""
  lower, upper = values <= cut[0], values >= cut[1]
  return [lower, ~(lower | upper), upper]


def _extent(
  rows: np.ndarray, cut: clusters.Cuts, by_channel: bool
) -> tuple[np.ndarray, np.ndarray]:
  """The least and the most of each cluster, `[3, 1 or N]`.

  Infinite where a cluster has no member.
  """
  least = np.full((CLUSTERS, rows.shape[-1]), np.inf, np.float32)
  most = -least
  for piece in clusters.pieces(rows):
    values = clusters.floats(piece)
    for c, mask in enumerate(_masks(values, cut)):
      low, high = (np.where(mask, values, e) for e in (np.inf, -np.inf))
      least[c] = np.minimum(least[c], low.min(0))
      most[c] = np.maximum(most[c], high.max(0))
  if by_channel:
    return least, most
  return least.min(-1, keepdims=True), most.max(-1, keepdims=True)


def _grids(
  least: np.ndarray, most: np.ndarray, bits: int, masked: bool
) -> Grids:
  """The scale and the zero point of each cluster, of the shape of `least`.

    s = (most - least) / (2^bits - 1), rounded to float16 where that is normal
    z = -2^(bits - 1) - least / s, rounded to an integer unless `masked`

  What is not masked has zeros in its range.
  """
  low, high = grid.limits(bits)
  empty = least > most
  least, most = np.where(empty, 0, least), np.where(empty, 0, most)
  if not masked:
    least, most = np.minimum(least, 0), np.maximum(most, 0)
  # In parts: the difference of two float32 may be too large for one.
  scale = most / (high - low) - least / (high - low)
  # One value, which has to be a level, or none.
  scale = np.where(scale > 0, scale, np.abs(least))
  scale = np.where(scale > 0, scale, 1).astype(np.float32)
  normal = (scale >= float16.NORMAL) & (scale < 65504)
  rounded = np.where(normal, scale, 1).astype(np.float16).astype(np.float32)
  scale = np.where(normal, rounded, scale)
  zero = low - least / scale
  if not masked:
    zero = np.clip(np.round(zero), low, high)
  return scale, np.float32(zero)


def _encode(
  values: np.ndarray,
  cut: clusters.Cuts,
  grids: Grids,
  bits: int,
  masked: bool,
) -> list[np.ndarray]:
  """The codes of the three layers, or if `masked` the codes and the clusters.

  Args:
    values: float32 `[I, 1 or N]`.
    cut: of `cuts`.
    grids: scale and zero point, `[3, 1 or N]`.
    bits: of a code.
    masked: see `Options`.
  """
  low, high = grid.limits(bits)
  layers = []
  for mask, scale, zero in zip(_masks(values, cut), *grids, strict=True):
    # An integer is added after rounding, so that 0 has the code `zero`.
    whole = np.round(zero)
    layer = np.round(np.where(mask, values, 0) / scale + (zero - whole))
    layers.append(np.clip(layer + whole, low, high).astype(np.int8))
  if not masked:
    return layers
  lower, _, upper = _masks(values, cut)
  cluster = np.where(lower, 0, np.where(upper, 2, 1)).astype(np.int8)
  codes = np.where(lower, layers[0], np.where(upper, layers[2], layers[1]))
  return [codes, cluster]


def check(options: Options) -> None:
  """Raises a ValueError for options that there are none of."""
  grid.check_bits(options.bits)
  for name, choices in (
    ('granularity', GRANULARITIES),
    ('storage', STORAGES),
    ('bias', BIASES),
  ):
    value = getattr(options, name)
    if value not in choices:
      raise ValueError(f'No {name}={value!r}; choose one of {choices}.')
