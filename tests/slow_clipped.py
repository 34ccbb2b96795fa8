"""Learned clipping in float64 NumPy, from its formula."""

import numpy as np


def split(w, groups):
  """`[..., K, N]` as `[..., G, K / G, N]`."""
  *stack, inputs, columns = w.shape
  return np.float64(w).reshape(*stack, groups, inputs // groups, columns)


def raw_scale(w_GIN, high, low, bits, symmetric=False):
  """The least weight of the clipped range, and the scale before rounding.

  Args:
    w_GIN: weights.
    high: u, `[..., G, N]`.
    low: l.
    bits: of a code.
    symmetric: whether one end of the range is the other's negative.
  """
  shares = [1 / (1 + np.exp(-np.float64(end))) for end in (high, low)]
  most = shares[0] * np.maximum(w_GIN.max(-2), 0)
  least = shares[1] * np.minimum(w_GIN.min(-2), 0)
  if symmetric:
    most = np.maximum(most, -least)
    least = -most
  scale = (most - least) / (2**bits - 1)
  return least[..., None, :], scale[..., None, :]


def grid(w_GIN, high, low, bits, symmetric=False):
  """Scale and zero, `[..., G, 1, N]`."""
  least, scale = raw_scale(w_GIN, high, low, bits, symmetric)
  scale = np.maximum(np.float64(np.float16(scale)), 2.0**-24)
  bottom, top = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
  zero = np.clip(np.round(bottom - least / scale), bottom, top)
  return scale, 0 * zero if symmetric else zero


def quantize(w, high, low, bits, symmetric=False):
  """Codes and values of a matrix or a stack of them."""
  w_GIN = split(w, high.shape[-2])
  scale, zero = grid(w_GIN, high, low, bits, symmetric)
  bottom, top = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
  codes = np.clip(np.round(w_GIN / scale) + zero, bottom, top)
  return codes.reshape(w.shape), ((codes - zero) * scale).reshape(w.shape)


def smooth(w, high, low, bits):
  """A smooth function of w, u and l that has here the value of `quantize`.

  What rounding adds to w / s counts as constant, z too, and what is clipped is
  so many steps of s.

  Returns:
    The function, and which weights are clipped.
  """
  w_GIN = split(w, high.shape[-2])
  scale, zero = grid(w_GIN, high, low, bits)
  bottom, top = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
  codes = np.round(w_GIN / scale) + zero
  clipped = (codes < bottom) | (codes > top)
  steps = np.clip(codes, bottom, top) - zero
  residual = steps - w_GIN / scale
  _, start = raw_scale(w_GIN, high, low, bits)

  def value(w, high, low):
    w_GIN = split(w, high.shape[-2])
    now = scale + raw_scale(w_GIN, high, low, bits)[1] - start
    return (np.where(clipped, steps, w_GIN / now + residual) * now).reshape(
      w.shape
    )

  return value, clipped.reshape(w.shape)
