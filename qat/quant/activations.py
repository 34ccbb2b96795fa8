"""Activation quantizers: the inputs of a linear layer, as integers."""

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
  codes_MK, scale = _by_granularity(
    functools.partial(_absmax, most=2 ** (bits - 1) - 1),
    *(x_MK, granularity, group_size),
  )
  return qtensor.QTensor(codes_MK, scale, f'int{bits}')


def asymmetric(
  x_MK: jax.Array,
  granularity: str = 'token',
  group_size: int = 64,
  *,
  bits: int,
) -> qtensor.QTensor:
  """The range of x in 2^bits - 1 steps, with a code for 0 among its ends.

    s = (max(x, 0) - min(x, 0)) / (2^bits - 1)    z = round(-2^(bits-1) - min/s)
    c = round(x / s) + z, clipped to -2^(bits-1) .. 2^(bits-1) - 1

  OmniQuant (2308.13137) and ZeroQAT (2509.00031) quantize inputs so, token by
  token; the range here always has 0 in it.

  Args:
    x_MK: float, `[..., K]`; a token is a row.
    granularity: one of `GRANULARITIES`.
    group_size: of 'group'; must divide K.
    bits: of a code.

  Returns:
    Codes, and a scale and a zero point as of `absmax`.
  """
  codes_MK, scale, zero = _by_granularity(
    functools.partial(_asymmetric, bits=bits),
    *(x_MK, granularity, group_size),
  )
  return qtensor.QTensor(codes_MK, scale, f'int{bits}', zero)


def _by_granularity(quantize, x_MK, granularity, group_size):
  """Codes of the shape of `x_MK`, and numbers that have as many axes."""
  check(granularity, group_size, x_MK.shape[-1])
  x_MK = x_MK.astype(jnp.float32)
  if granularity != 'group':
    return quantize(x_MK, -1 if granularity == 'token' else None)
  groups = x_MK.shape[-1] // group_size
  x_MGI = x_MK.reshape(*x_MK.shape[:-1], groups, group_size)
  codes_MGI, *numbers = quantize(x_MGI, -1)
  return codes_MGI.reshape(x_MK.shape), *(n.squeeze(-1) for n in numbers)


def _absmax(x, axes, most):
  size = jnp.maximum(blocks.absmax(x, axes), 1e-5)
  codes = jnp.clip(jnp.round(x * (most / size)), -most - 1, most)
  return codes.astype(jnp.int8), size / most


def _asymmetric(x, axes, bits):
  steps, low = 2**bits - 1, -(2 ** (bits - 1))
  least, most = blocks.extent(x, axes)
  size = jnp.maximum(most - least, 1e-5)
  zero = low - jnp.round(least * (steps / size))
  codes = jnp.clip(jnp.round(x * (steps / size)) + zero, low, low + steps)
  return codes.astype(jnp.int8), size / steps, zero.astype(jnp.int8)


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
  'int8_asym': functools.partial(asymmetric, bits=8),
  'int6_asym': functools.partial(asymmetric, bits=6),
  'int4_asym': functools.partial(asymmetric, bits=4),
}
