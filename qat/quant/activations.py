"""Activation quantizers: the inputs of a linear layer, AbsMax to integers."""

from collections.abc import Callable
import functools

import jax
from jax import numpy as jnp

from qat.quant import blocks
from qat.quant import qtensor

# What shares a scale: all inputs of a step, those of a token (a row), or groups
# of `group_size` neighbours of a token.
GRANULARITIES = ('tensor', 'token', 'group')


def absmax(
  x_MK: jax.Array,
  granularity: str = 'token',
  group_size: int = 64,
  *,
  bits: int,
) -> qtensor.QTensor:
  """Scale max |x| / (2^(bits - 1) - 1), rounded half to even.

  With 8 bits and a scale for each token: pQuant (2602.22592) eq. 7-9 with the
  practical bounds of BitNet's training code ("The Era of 1-bit LLMs: Training
  Tips", figure 5): 127 instead of 2^7 - eps, and max |x| kept above 1e-5.

  'tensor' is BitNet's (2310.11453) in training. Its scale is that of the whole
  batch: the result of a token then depends on the tokens beside it, and
  generation, token by token, computes something else than training did.

  Args:
    x_MK: float, `[..., K]`; a token is a row.
    granularity: one of `GRANULARITIES`.
    group_size: of 'group'; must divide K.
    bits: of a code.

  Returns:
    Codes from -(2^(bits - 1) - 1) to 2^(bits - 1) - 1 and a scale of as many
    axes: `[..., 1]`, `[1, ..., 1]` or `[..., K / group_size]`.
  """
  check(granularity, group_size, x_MK.shape[-1])
  most = 2 ** (bits - 1) - 1
  x_MK = x_MK.astype(jnp.float32)
  if granularity == 'group':
    groups = x_MK.shape[-1] // group_size
    x_MGI = x_MK.reshape(*x_MK.shape[:-1], groups, group_size)
    codes_MGI, scale_MG1 = _absmax(x_MGI, -1, most)
    codes_MK, scale = codes_MGI.reshape(x_MK.shape), scale_MG1.squeeze(-1)
  else:
    axes = -1 if granularity == 'token' else None
    codes_MK, scale = _absmax(x_MK, axes, most)
  return qtensor.QTensor(codes_MK, scale, f'int{bits}')


def _absmax(x, axes, most):
  # An input without tokens has no largest entry: `initial`.
  size = jnp.max(jnp.abs(x), axes, keepdims=True, initial=0)
  size = jnp.maximum(size, 1e-5)
  codes = jnp.clip(jnp.round(x * (most / size)), -most - 1, most)
  return codes.astype(jnp.int8), size / most


def check(granularity: str, group_size: int, width: int) -> None:
  """Raises a ValueError where inputs of `width` have no such scales."""
  if granularity not in GRANULARITIES:
    raise ValueError(
      f'No activation_granularity {granularity!r}; choose one of'
      f' {list(GRANULARITIES)}.'
    )
  if granularity == 'group':
    blocks.check_groups(group_size, width, "activation_granularity='token'")


QUANTIZERS: dict[str, Callable[..., qtensor.QTensor]] = {
  'int8': functools.partial(absmax, bits=8),
  'int6': functools.partial(absmax, bits=6),
  'int4': functools.partial(absmax, bits=4),
}
