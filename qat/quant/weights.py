"""Weight quantizers: a latent float matrix in, a QTensor out.

Each takes `w_KN` (or a stack `[..., K, N]`; every matrix of a stack has its own
scales), a granularity and a group size, which say what weights share a scale
(see `blocks`). Fake quantization is `quantize(w).dequantize()` and is written
nowhere else, so that what is trained is what is exported. What learns its
scales is in `learned`.

A NaN or an infinity in `w` makes the scale NaN or infinite and so reaches the
output of the layer: nothing here hides it.
"""

from collections.abc import Callable
import functools

import jax
from jax import numpy as jnp

from qat.quant import blocks
from qat.quant import qtensor

# Keeps an all-zero matrix trainable: a scale of 0 would stop every gradient
# that passes through the layer. Far below any scale that training reaches.
TINY = 1e-8

GROUP = 64  # Weights of a group: pQuant's ablation (2602.22592, figure 7).
KEPT = 0.08  # Share of exact weights in its 'Native Mix', same figure.


def binary(
  w_KN: jax.Array, granularity: str = 'tensor', group_size: int = GROUP
) -> qtensor.QTensor:
  """BitNet and pQuant (2602.22592), eq. 3-6: sign(W - mean W), mean |W|.

  The mean absolute value is taken without subtracting the mean, as in eq. 6 and
  in BitNet's published code; sign(0) is -1, as in BitNet. By channel or group,
  mean and scale are those of the channel or group.

  Args:
    w_KN: latent weights, `[..., K, N]`.
    granularity: a key of `blocks.AXES`.
    group_size: of 'group': inputs that share a scale.

  Returns:
    Codes -1 and 1 and the scale of each matrix, column or group.
  """
  w_GIN, axes = _split(w_KN, granularity, group_size)
  mean = jnp.mean(w_GIN, axes, keepdims=True)
  scale = jnp.mean(jnp.abs(w_GIN), axes, keepdims=True)
  codes_GIN = jnp.where(w_GIN > mean, 1, -1)
  return _merge(codes_GIN, jnp.maximum(scale, TINY), 'binary')


def binary_mix(
  w_KN: jax.Array,
  granularity: str = 'tensor',
  group_size: int = GROUP,
  kept_share: float = KEPT,
) -> qtensor.QTensor:
  """Native Mix (pQuant 2602.22592, figure 7): BitNet with some exact weights.

  The paper says that 8 % of the weights keep a high precision. A reconstruction
  is which: those of largest |W - mean W| of all that share a scale, wherever
  they stand, as bfloat16. The scale is mean |W| of the others.

  Args:
    w_KN: latent weights, `[..., K, N]`.
    granularity: a key of `blocks.AXES`.
    group_size: of 'group': inputs that share a scale.
    kept_share: of the weights that share a scale; with ties, fewer.
  """
  w_GIN, axes = _split(w_KN, granularity, group_size)
  mean = jnp.mean(w_GIN, axes, keepdims=True)
  distance_GIN = jnp.abs(w_GIN - mean)
  columns = mean.shape[-1]
  shared = distance_GIN.reshape(*distance_GIN.shape[:-2], -1, columns)
  size = shared.shape[-2]
  edge = size - 1 - int(round(kept_share * size))
  last = jnp.sort(shared, axis=-2)[..., max(edge, 0), None, :]
  kept_GIN = distance_GIN > last
  left = jnp.sum(~kept_GIN, axes, keepdims=True, dtype=jnp.float32)
  rest_GIN = jnp.where(kept_GIN, 0, jnp.abs(w_GIN))
  scale = jnp.sum(rest_GIN, axes, keepdims=True) / left
  codes_GIN = jnp.where(w_GIN > mean, 1, -1)
  codes_GIN = jnp.where(kept_GIN, 0, codes_GIN)
  exact_GIN = jnp.where(kept_GIN, w_GIN, 0).astype(jnp.bfloat16)
  scale = jnp.maximum(scale, TINY)
  return _merge(codes_GIN, scale, 'binary_mix', exact=exact_GIN)


def ternary(
  w_KN: jax.Array, granularity: str = 'tensor', group_size: int = GROUP
) -> qtensor.QTensor:
  """BitNet b1.58 (2402.17764), eq. 1-3: round(W / mean |W|) in {-1, 0, 1}.

  The published training code keeps the scale above 1e-5.
  """
  w_GIN, axes = _split(w_KN, granularity, group_size)
  scale = jnp.mean(jnp.abs(w_GIN), axes, keepdims=True)
  scale = jnp.maximum(scale, 1e-5)
  codes_GIN = jnp.clip(jnp.round(w_GIN / scale), -1, 1)
  return _merge(codes_GIN, scale, 'ternary')


def symmetric(
  w_KN: jax.Array,
  granularity: str = 'tensor',
  group_size: int = GROUP,
  *,
  bits: int,
) -> qtensor.QTensor:
  """AbsMax: round(W / s), s = max |W| / (2^(bits - 1) - 1).

  pQuant's narrow branch (2602.22592, section 3.2) is this with 8 bits; one
  scale a matrix is a reconstruction: the paper's figure 3(d) draws one. The
  lowest code is not used, so with 2 bits three values are left.
  """
  most = 2 ** (bits - 1) - 1
  w_GIN, axes = _split(w_KN, granularity, group_size)
  scale = jnp.maximum(blocks.absmax(w_GIN, axes) / most, TINY)
  codes_GIN = jnp.clip(jnp.round(w_GIN / scale), -most, most)
  return _merge(codes_GIN, scale, f'int{bits}')


def asymmetric(
  w_KN: jax.Array,
  granularity: str = 'tensor',
  group_size: int = GROUP,
  *,
  bits: int,
) -> qtensor.QTensor:
  """All 2^bits codes from the smallest to the largest weight, and 0 exactly.

    s = (max(W, 0) - min(W, 0)) / (2^bits - 1)
    z = round(-2^(bits - 1) - min(W, 0) / s)
    c = clip(round(W / s) + z, -2^(bits - 1), 2^(bits - 1) - 1)

  The range contains 0, whose code is the integer z; codes are those of two's
  complement rather than 0 to 2^bits - 1, so that they fit int8.
  """
  low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
  w_GIN, axes = _split(w_KN, granularity, group_size)
  least, most = blocks.extent(w_GIN, axes)
  scale = jnp.maximum((most - least) / (high - low), TINY)
  zero = jnp.clip(jnp.round(low - least / scale), low, high)
  codes_GIN = jnp.clip(jnp.round(w_GIN / scale) + zero, low, high)
  return _merge(codes_GIN, scale, f'int{bits}', zero=zero)


def float8(
  w_KN: jax.Array, granularity: str = 'tensor', group_size: int = GROUP
) -> qtensor.QTensor:
  """Float8 e4m3fn scaled by AbsMax: the largest weight becomes 448.

  For the narrow branch of pQuant in another format (2602.22592, section 3.1
  names FP8; that it is e4m3 and scaled so is a reconstruction).
  """
  w_GIN, axes = _split(w_KN, granularity, group_size)
  scale = jnp.maximum(blocks.absmax(w_GIN, axes) / 448, TINY)
  codes_GIN = jnp.clip(w_GIN / scale, -448, 448)
  return _merge(codes_GIN, scale, 'fp8', jnp.float8_e4m3fn)


QUANTIZERS: dict[str, Callable[..., qtensor.QTensor]] = {
  'binary': binary,
  'binary_mix': binary_mix,
  'ternary': ternary,
  'int2': functools.partial(symmetric, bits=2),
  'int3': functools.partial(symmetric, bits=3),
  'int4': functools.partial(symmetric, bits=4),
  'int8': functools.partial(symmetric, bits=8),
  'int2_asym': functools.partial(asymmetric, bits=2),
  'int3_asym': functools.partial(asymmetric, bits=3),
  'int4_asym': functools.partial(asymmetric, bits=4),
  'int8_asym': functools.partial(asymmetric, bits=8),
  'fp8': float8,
}


def _split(w_KN, granularity, group_size):
  return blocks.split(w_KN.astype(jnp.float32), granularity, group_size)


def _merge(
  codes_GIN: jax.Array,
  scale: jax.Array,
  alphabet: str,
  dtype: jax.typing.DTypeLike = jnp.int8,
  zero: jax.Array | None = None,
  exact: jax.Array | None = None,
) -> qtensor.QTensor:
  """A QTensor from arrays of the shape that `blocks.split` gives."""
  return qtensor.QTensor(
    blocks.merge(codes_GIN.astype(dtype)),
    blocks.merge(scale),
    alphabet,
    None if zero is None else blocks.merge(zero.astype(jnp.int8)),
    None if exact is None else blocks.merge(exact),
  )
