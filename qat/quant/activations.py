"""Activation quantizers: the inputs of a linear layer, token by token."""

from collections.abc import Callable

import jax
from jax import numpy as jnp

from qat.quant import qtensor


def int8_per_token(x_MK: jax.Array) -> qtensor.QTensor:
  """Absmax int8: scale max |x| / 127 for each token, rounded half to even.

  pQuant (2602.22592) eq. 7-9 with the practical bounds of BitNet's training
  code ("The Era of 1-bit LLMs: Training Tips", figure 5): 127 instead of
  2^7 - eps, and max |x| kept above 1e-5.

  Args:
    x_MK: float, `[..., K]`; a token is a row.

  Returns:
    Codes in [-127, 127] and a scale of shape `[..., 1]`.
  """
  x_MK = x_MK.astype(jnp.float32)
  absmax = jnp.maximum(jnp.max(jnp.abs(x_MK), -1, keepdims=True), 1e-5)
  codes_MK = jnp.clip(jnp.round(x_MK * (127 / absmax)), -128, 127)
  return qtensor.QTensor(codes_MK.astype(jnp.int8), absmax / 127, 'int8')


QUANTIZERS: dict[str, Callable[[jax.Array], qtensor.QTensor]] = {
  'int8': int8_per_token,
}
