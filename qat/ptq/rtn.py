"""Round to nearest: each weight to the next level, without any data."""

import dataclasses
import functools

import jax
from jax import numpy as jnp

from qat.quant import blocks
from qat.quant import grid
from qat.quant import qtensor


@dataclasses.dataclass(frozen=True)
class Options:
  """The fields of `config.method`.

  Attributes:
    bits: of a code: 2, 3, 4, 6 or 8.
    granularity: which weights share a scale, a key of `blocks.AXES`: 'tensor',
      'channel' (an output's) or 'group'.
    group_size: of 'group': inputs of an output that share a scale.
    symmetric: whether there is no zero point.
    mse: whether to search for a smaller range; see `grid.fit`.
  """

  bits: int
  granularity: str
  group_size: int
  symmetric: bool
  mse: bool


@functools.partial(jax.jit, static_argnames='options')
def quantize(w_KN: jax.Array, options: Options) -> qtensor.QTensor:
  """Weights rounded to the grid of those they share it with.

  Raises:
    ValueError: for bits, a granularity or groups that there are none of.
  """
  grid.check_bits(options.bits)
  w_GIN, axes = blocks.split(
    w_KN.astype(jnp.float32), options.granularity, options.group_size
  )
  found = grid.fit(
    w_GIN, options.bits, options.symmetric, options.mse, axes=axes
  )
  codes_KN = blocks.merge(found.encode(w_GIN))
  merged = grid.Grid(
    blocks.merge(found.scale), blocks.merge(found.zero), found.bits
  )
  return grid.tensor(codes_KN, merged, options.symmetric)
