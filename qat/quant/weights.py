"""Weight quantizers: a latent float matrix in, a QTensor out.

Each takes `w_KN` (or a stack `[..., K, N]`; every matrix of a stack has its own
scale) and a granularity: 'tensor' is one scale a matrix, 'channel' one for each
output column. Fake quantization is `quantize(w).dequantize()` and is written
nowhere else, so that what is trained is what is exported.

A NaN or an infinity in `w` makes the scale NaN or infinite and so reaches the
output of the layer: nothing here hides it.
"""

from collections.abc import Callable

import jax
from jax import numpy as jnp

from qat.quant import qtensor

# Keeps an all-zero matrix trainable: a scale of 0 would stop every gradient
# that passes through the layer. Far below any scale that training reaches.
TINY = 1e-8


def binary(w_KN: jax.Array, granularity: str = 'tensor') -> qtensor.QTensor:
  """BitNet and pQuant (2602.22592), eq. 3-6: sign(W - mean W), mean |W|.

  The mean absolute value is taken without subtracting the mean, as in eq. 6 and
  in BitNet's published code; sign(0) is -1, as in BitNet.

  Args:
    w_KN: latent weights, `[..., K, N]`.
    granularity: 'tensor' or 'channel'.

  Returns:
    Codes -1 and 1 and the scale of each matrix or column.
  """
  axes = _axes(granularity)
  w_KN = w_KN.astype(jnp.float32)
  mean = jnp.mean(w_KN, axes, keepdims=True)
  scale = jnp.mean(jnp.abs(w_KN), axes, keepdims=True)
  codes_KN = jnp.where(w_KN > mean, 1, -1).astype(jnp.int8)
  return qtensor.QTensor(codes_KN, jnp.maximum(scale, TINY), 'binary')


def ternary(w_KN: jax.Array, granularity: str = 'tensor') -> qtensor.QTensor:
  """BitNet b1.58 (2402.17764), eq. 1-3: round(W / mean |W|) in {-1, 0, 1}.

  The published training code keeps the scale above 1e-5.
  """
  w_KN = w_KN.astype(jnp.float32)
  scale = jnp.mean(jnp.abs(w_KN), _axes(granularity), keepdims=True)
  scale = jnp.maximum(scale, 1e-5)
  codes_KN = jnp.clip(jnp.round(w_KN / scale), -1, 1).astype(jnp.int8)
  return qtensor.QTensor(codes_KN, scale, 'ternary')


def int8(w_KN: jax.Array, granularity: str = 'tensor') -> qtensor.QTensor:
  """pQuant's narrow branch (section 3.2): AbsMax to [-127, 127].

  One scale a matrix is a reconstruction: the paper's figure 3(d) draws one.
  """
  w_KN = w_KN.astype(jnp.float32)
  absmax = jnp.max(jnp.abs(w_KN), _axes(granularity), keepdims=True)
  scale = jnp.maximum(absmax / 127, TINY)
  codes_KN = jnp.clip(jnp.round(w_KN / scale), -127, 127).astype(jnp.int8)
  return qtensor.QTensor(codes_KN, scale, 'int8')


QUANTIZERS: dict[str, Callable[..., qtensor.QTensor]] = {
  'binary': binary,
  'ternary': ternary,
  'int8': int8,
}

# The axes of a matrix whose entries share a scale.
GRANULARITIES: dict[str, tuple[int, ...]] = {
  'tensor': (-2, -1),
  'channel': (-2,),
}


def _axes(granularity: str) -> tuple[int, ...]:
  if granularity not in GRANULARITIES:
    raise ValueError(
      f'No granularity {granularity!r}; choose one of {list(GRANULARITIES)}.'
    )
  return GRANULARITIES[granularity]
