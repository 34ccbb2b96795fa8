"""Weight quantizers that learn their scales, and the gradients they publish.

What they learn, scales or what scales follow from, are parameters of the layer
beside its 'kernel'. A quantizer is three
functions: the parameters that a kernel starts with, the QTensor of a layer, and
the gradient of a layer's parameters given that of the dequantized weight.

As in `weights`, a NaN or an infinity in the kernel reaches the output.
"""

from collections.abc import Callable
from collections.abc import Mapping
import functools
import math
from typing import NamedTuple

import jax
from jax import numpy as jnp

from qat.quant import blocks
from qat.quant import clipped
from qat.quant import grid
from qat.quant import qtensor
from qat.quant import weights

Layer = Mapping[str, jax.Array]


class Learned(NamedTuple):
  """A quantizer that learns its scales, or what they follow from.

  Attributes:
    alphabet: of the codes.
    granularities: those it has, of `blocks.AXES`.
    parameters: the names of what it learns.
    start: (w_KN, granularity, group_size) -> these parameters.
    quantize: (layer, granularity, group_size) -> QTensor.
    gradient: (layer, dw_KN, granularity, group_size) -> the gradient of every
      array of the layer, where dw_KN is that of the dequantized weight.
  """

  alphabet: str
  granularities: tuple[str, ...]
  parameters: tuple[str, ...]
  start: Callable[..., dict[str, jax.Array]]
  quantize: Callable[..., qtensor.QTensor]
  gradient: Callable[..., dict[str, jax.Array]]


# ------------------------------------------------- one scale a block of weights


class Levels(NamedTuple):
  """A rounding of u = w / a to codes; the weight is codes * unit * a.

  Attributes:
    alphabet: of the codes.
    low: u below it is clipped, and has no gradient.
    high: u above it, likewise.
    encode: clipped u -> codes, floats.
    unit: what a code of 1 is worth, in a.
    start: a at the start, in mean |w| of the weights that share it.
    identity: whether the gradient of `encode` * unit counts as 1 where u is not
      clipped, so that the scale's gradient has a term -u; else it is 0 for the
      scale alone.
    positive: Q_p of the scale's gradient, which is divided by sqrt(n Q_p), n
      the number of weights that share it.
  """

  alphabet: str
  low: float
  high: float
  encode: Callable[[jax.Array], jax.Array]
  unit: float
  start: float
  identity: bool
  positive: int


def _sign(u: jax.Array) -> jax.Array:
  return jnp.where(u > 0, 1.0, -1.0)


def _lsq(bits: int) -> Levels:
  """LSQ (1902.08153): a is the step; it starts at 2 mean |w| / sqrt(Q_p)."""
  positive = 2 ** (bits - 1) - 1
  return Levels(
    f'int{bits}',
    -positive - 1,
    positive,
    jnp.round,
    1.0,
    2 / math.sqrt(positive),
    True,
    positive,
  )


# ParetoQ (2502.02631). Starts are reconstructions, for the paper starts from a
# trained model: a = mean |w| is BitNet's scale, and the others are, of normally
# distributed weights, those of least squared error.
LEVELS: dict[str, Levels] = {
  'lsq3': _lsq(3),
  'lsq4': _lsq(4),
  # sign(w) a. Its published gradient has no term -u.
  'paretoq1': Levels('binary', -1, 1, _sign, 1.0, 1.0, False, 1),
  # Stretched elastic: levels -2/3, 0, 2/3, each of a third of [-a, a].
  'paretoq_ternary': Levels(
    'ternary', -0.99, 0.99, lambda u: jnp.round(1.5 * u), 2 / 3, 2.3, True, 1
  ),
  # Levels -3/4, -1/4, 1/4, 3/4, each of a quarter of [-a, a].
  'paretoq2': Levels(
    'odd2',
    -0.99,
    0.99,
    lambda u: 2 * jnp.round(2 * u - 0.5) + 1,
    1 / 4,
    2.5,
    True,
    1,
  ),
}


def _parts(layer: Layer, granularity: str, group_size: int):
  """w_GIN, the axes that share a scale, and the scale of `[..., G, 1, .]`."""
  w_GIN, axes = blocks.split(
    layer['kernel'].astype(jnp.float32), granularity, group_size
  )
  # An update may carry a scale to 0 or beyond; its gradient brings it back.
  scale = jnp.maximum(layer['learned_scale'], weights.TINY)
  return w_GIN, axes, scale[..., None, :]


def _start(levels: Levels, w_KN, granularity, group_size):
  w_GIN, axes = blocks.split(w_KN, granularity, group_size)
  mean = jnp.mean(jnp.abs(w_GIN), axes, keepdims=True)
  scale = jnp.maximum(mean * levels.start, weights.TINY)
  return {'learned_scale': blocks.merge(scale)}


def _quantize(levels: Levels, layer, granularity, group_size):
  w_GIN, axes, scale = _parts(layer, granularity, group_size)
  u_GIN = jnp.clip(w_GIN / scale, levels.low, levels.high)
  codes_GIN = levels.encode(u_GIN).astype(jnp.int8)
  # A learned scale does not see the weights, and no code is a NaN.
  finite = jnp.isfinite(blocks.absmax(w_GIN, axes))
  scale = jnp.where(finite, scale * levels.unit, jnp.nan)
  return qtensor.QTensor(
    blocks.merge(codes_GIN), blocks.merge(scale), levels.alphabet
  )


def _gradient(levels: Levels, layer, dw_KN, granularity, group_size):
  w_GIN, axes, scale = _parts(layer, granularity, group_size)
  dw_GIN, _ = blocks.split(dw_KN, granularity, group_size)
  u_GIN = w_GIN / scale
  inside_GIN = (u_GIN >= levels.low) & (u_GIN <= levels.high)
  value_GIN = levels.unit * levels.encode(
    jnp.clip(u_GIN, levels.low, levels.high)
  )
  if levels.identity:
    value_GIN = value_GIN - jnp.where(inside_GIN, u_GIN, 0)
  shared = math.prod(w_GIN.shape[axis] for axis in axes)
  dscale = jnp.sum(dw_GIN * value_GIN, axes, keepdims=True)
  dscale = dscale / math.sqrt(shared * levels.positive)
  return {
    'kernel': blocks.merge(jnp.where(inside_GIN, dw_GIN, 0)),
    'learned_scale': blocks.merge(dscale),
  }


# ---------------------------------------------------------------------- OneBit


def _onebit_start(w_KN, granularity, group_size):
  """SVID (2402.11295): |W| is about gain_in gain_out^T, of rank 1.

  The first singular vectors, each times the root of the singular value, by
  power iteration. All entries of |W| are positive, so the first singular value
  is far above the second.
  """
  del granularity, group_size
  size_KN = jnp.abs(w_KN.astype(jnp.float32))
  largest = jnp.maximum(jnp.max(size_KN, (-2, -1), keepdims=True), weights.TINY)
  size_KN = size_KN / largest + weights.TINY
  right_N = jnp.ones(size_KN.shape[:-2] + size_KN.shape[-1:])

  def unit(v):
    return v / jnp.linalg.norm(v, axis=-1, keepdims=True)

  def turn(_, vectors):
    _, right_N = vectors
    left_K = unit(jnp.sum(size_KN * right_N[..., None, :], -1))
    return left_K, unit(jnp.sum(size_KN * left_K[..., :, None], -2))

  left_K = jnp.ones(size_KN.shape[:-1])
  left_K, right_N = jax.lax.fori_loop(0, 16, turn, (left_K, right_N))
  outer_KN = left_K[..., :, None] * right_N[..., None, :]
  value = jnp.sum(size_KN * outer_KN, (-2, -1)) * largest[..., 0, 0]
  root = jnp.sqrt(value)[..., None]
  return {'gain_in': left_K * root, 'gain_out': right_N * root}


def _onebit_scale(layer: Layer) -> jax.Array:
  return layer['gain_in'][..., :, None] * layer['gain_out'][..., None, :]


def _onebit_quantize(layer, granularity, group_size):
  del granularity, group_size
  w_KN = layer['kernel'].astype(jnp.float32)
  scale_KN = jnp.where(jnp.isfinite(w_KN), _onebit_scale(layer), jnp.nan)
  return qtensor.QTensor(_sign(w_KN).astype(jnp.int8), scale_KN, 'binary')


def _onebit_gradient(layer, dw_KN, granularity, group_size):
  """Sign counts as tanh(w) + 0.001 w: no weight is ever without a gradient."""
  del granularity, group_size
  w_KN = layer['kernel']
  slope_KN = 1.001 - jnp.square(jnp.tanh(w_KN))
  dscale_KN = dw_KN * _sign(w_KN)
  return {
    'kernel': dw_KN * _onebit_scale(layer) * slope_KN,
    'gain_in': jnp.sum(dscale_KN * layer['gain_out'][..., None, :], -1),
    'gain_out': jnp.sum(dscale_KN * layer['gain_in'][..., :, None], -2),
  }


# ------------------------------------------------------------ learned clipping

# u and l of `clipped` at the start, OmniQuant's (2308.13137): a grid covers
# 0.982 of the range of its weights.
CLIP = 4.0


def _clipped_parts(layer: Layer, granularity: str, group_size: int):
  """w_GIN, and u and l of `[..., G, 1, N]`."""
  w_GIN, _ = blocks.split(
    layer['kernel'].astype(jnp.float32), granularity, group_size
  )
  ends = layer['clip_high'], layer['clip_low']
  return w_GIN, tuple(end[..., None, :] for end in ends)


def _clipped_start(w_KN, granularity, group_size):
  w_GIN, _ = blocks.split(w_KN, granularity, group_size)
  *stack, _, columns = w_GIN.shape
  first = jnp.full((*stack, columns), CLIP, jnp.float32)
  return {'clip_high': first, 'clip_low': first}


def _clipped_quantize(bits: int, layer, granularity, group_size):
  w_GIN, clip = _clipped_parts(layer, granularity, group_size)
  return clipped.quantize(w_GIN, clip, bits, symmetric=False)


def _clipped_gradient(bits: int, layer, dw_KN, granularity, group_size):
  """Weights have one through the ends of the range, too, if they are these."""

  def value(layer: Layer) -> jax.Array:
    w_GIN, clip = _clipped_parts(layer, granularity, group_size)
    return clipped.fake_quantize(w_GIN, clip, bits, symmetric=False)

  _, vjp = jax.vjp(value, layer)
  return vjp(dw_KN.astype(jnp.float32))[0]


QUANTIZERS: dict[str, Learned] = {
  **{
    name: Learned(
      levels.alphabet,
      tuple(blocks.AXES),
      ('learned_scale',),
      functools.partial(_start, levels),
      functools.partial(_quantize, levels),
      functools.partial(_gradient, levels),
    )
    for name, levels in LEVELS.items()
  },
  'onebit': Learned(
    'binary',
    ('channel',),
    ('gain_in', 'gain_out'),
    _onebit_start,
    _onebit_quantize,
    _onebit_gradient,
  ),
  **{
    f'lwc{bits}': Learned(
      f'int{bits}',
      ('channel', 'group'),
      ('clip_high', 'clip_low'),
      _clipped_start,
      functools.partial(_clipped_quantize, bits),
      functools.partial(_clipped_gradient, bits),
    )
    for bits in grid.BITS
  },
}
