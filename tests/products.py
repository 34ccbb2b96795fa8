"""Quantized products to test, and slow ones in float64 to compare them with."""

import dataclasses

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from pallas_kernels.quantized_train_matmul import cpu as scaled_matmul
from qat.quant import dot
from qat.quant import operand as operand_lib
from qat.quant import rules

FLOAT32 = dot.Method(int8=False, dtype='float32')
# Each pair of values of (int8, dtype, transpose_in_loop) once.
METHODS = [
  dot.Method(False, 'float32', False),
  dot.Method(False, 'bfloat16', True),
  dot.Method(True, 'float32', True),
  dot.Method(True, 'bfloat16', False),
]
if scaled_matmul.runs_here():
  METHODS.append(dot.Method(False, 'bfloat16', True, native=True))
# Every weight and every activation quantizer, every granularity of both, codes
# and dequantized values on each side and on both; groups are of 4 inputs.
SPECS = [
  rules.Spec(*fields, group_size=4)
  for fields in (
    ('none', 'none', 'tensor'),
    ('none', 'int8', 'tensor', 'token'),
    ('none', 'int4', 'tensor', 'group'),
    ('binary', 'none', 'channel'),
    ('binary', 'int8', 'tensor', 'token'),
    ('binary_mix', 'int8', 'tensor', 'token'),
    ('ternary', 'int8', 'channel', 'tensor'),
    ('ternary', 'none', 'group'),
    ('int2', 'int4', 'tensor', 'token'),
    ('int3', 'int6', 'tensor', 'tensor'),
    ('int4', 'int4', 'group', 'group'),
    ('int8', 'int8', 'channel', 'token'),
    ('int2_asym', 'none', 'group'),
    ('int3_asym', 'int8_asym', 'tensor', 'group'),
    ('int4_asym', 'int4_asym', 'channel', 'token'),
    ('int8_asym', 'int6_asym', 'tensor', 'tensor'),
    ('fp8', 'int8', 'tensor', 'token'),
    ('fp8', 'none', 'group'),
  )
]


def name(fields):
  return '-'.join(map(str, dataclasses.astuple(fields)))


for_specs = pytest.mark.parametrize('spec', SPECS, ids=name)
for_methods = pytest.mark.parametrize('method', METHODS, ids=name)
BINARY = rules.Spec('binary', 'int8', 'tensor')


def normal(*shape, seed=0):
  values = np.random.default_rng(seed).normal(0.1, 1, size=shape)
  return values.astype(np.float32)


def apply(x, w, spec, method):
  return dot.quantized_dot(
    operand_lib.make_input(x, spec), make_weight(w, spec), method
  )


def make_weight(w, spec):
  return operand_lib.make_weight({'kernel': jnp.asarray(w)}, spec)


def quantize(spec, w):
  return spec.quantize({'kernel': jnp.asarray(w)})


def value_and_gradients(x, w, dy, spec, method):
  # Not compiled as a whole: most specs and methods share their operations.
  y, vjp = jax.vjp(lambda x, w: apply(x, w, spec, method), x, w)
  return y, *vjp(dy)


def plain(spec, side):
  """Whether codes with one scale a row, or a column, are what is multiplied."""
  if side == 'x':
    whole = spec.activation != 'none' and not spec.activation.endswith('_asym')
    return whole and spec.activation_granularity != 'group'
  whole = spec.weight not in ('none', 'binary_mix')
  whole &= not spec.weight.endswith('_asym')
  return whole and spec.granularity != 'group'


def parts(q, a, dtype, plain):
  """Codes and scale in float64; where it is not those, rounded values and 1."""
  if plain:
    return np.float64(q.codes), np.float64(q.scale)
  values = jnp.asarray(a) if q is None else q.dequantize()
  return np.float64(values.astype(dtype)), np.ones((1, 1))


def rounded(a, dtype):
  """From float32, as the method rounds it; then float64."""
  return np.float64(jnp.asarray(np.float32(a)).astype(dtype))


def slow(x_MK, w_KN, dy_MN, spec, dtype):
  """y, dx and dw of one matrix by the formulas, in float64."""
  x, w = spec.quantize_input(jnp.asarray(x_MK)), quantize(spec, w_KN)
  xc, xs = parts(x, x_MK, dtype, plain(spec, 'x'))
  wc, ws = parts(w, w_KN, dtype, plain(spec, 'w'))
  y = (xc @ wc) * xs * ws
  dy_x = rounded(np.float32(dy_MN) * np.float32(xs), dtype)
  if ws.size == 1 and plain(spec, 'w') and spec.weight != 'none':
    dx = (dy_x @ wc.T) * ws / xs
  else:
    dx = rounded(np.float32(dy_MN) * np.float32(ws), dtype) @ wc.T
  return y, dx, xc.T @ dy_x


def close(actual, expected, tolerance=2e-6):
  size = np.abs(expected).max()
  np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * size)
