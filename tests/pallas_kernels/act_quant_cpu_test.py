"""Codes of a few tokens in C++, every variant of this machine."""

import hypothesis
from hypothesis import strategies as st
import jax
from jax import numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch
from pallas_kernels import native
from pallas_kernels.act_quant import api
from pallas_kernels.act_quant import cpu
from qat.nn import layers
from qat.quant import activations

CPU = dispatch.Target('cpu')
EPS = 1e-5
pytestmark = pytest.mark.skipif(
  not native.variants(), reason=f'the C++ extension is {native.status()}'
)
variants = pytest.mark.parametrize('variant', native.variants())
types = pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
shapes = pytest.mark.parametrize(
  'shape', [(1, 1024), (1, 2400), (3, 1), (3, 77), (8, 200), (0, 5)]
)


def draw(shape, dtype, seed=0):
  rng = np.random.default_rng(seed)
  x = rng.normal(size=shape) * rng.lognormal(0, 3, (shape[0], 1))
  gain = rng.uniform(0.5, 2, shape[1])
  return jnp.asarray(x, dtype), jnp.asarray(gain, jnp.float32)


@jax.jit
def quantizer(x):
  q = activations.absmax(x, bits=8)
  return q.codes, q.scale


def slow(x, gain=None):
  """Number by number in float64: values of codes before they are rounded."""
  values, scales = np.zeros(x.shape), np.zeros((x.shape[0], 1))
  for m, row in enumerate(np.float64(x)):
    if gain is not None:
      mean = sum(v * v for v in row) / len(row)
      row = [
        v / np.sqrt(mean + EPS) * g for v, g in zip(row, gain, strict=True)
      ]
      row = np.float64(jnp.asarray(row, x.dtype))
    size = max(max(abs(v) for v in row), 1e-5)
    scales[m] = size / 127
    values[m] = [v * 127 / size for v in row]
  return values, scales


@variants
@types
@shapes
def test_codes_and_scales_are_the_quantizers_bit_for_bit(variant, dtype, shape):
  x, _ = draw(shape, dtype)
  codes, scale = cpu.codes(x, variant)
  assert codes.dtype == jnp.int8 and scale.dtype == jnp.float32
  for found, want in zip((codes, scale), quantizer(x), strict=True):
    np.testing.assert_array_equal(found, want)


@variants
@types
@hypothesis.settings(max_examples=4, deadline=None)
@hypothesis.given(
  st.integers(1, 8), st.integers(1, 300), st.integers(0, 2**32 - 1)
)
def test_codes_are_those_of_float64(variant, dtype, rows, width, seed):
  x, _ = draw((rows, width), dtype, seed)
  codes, scale = cpu.codes(x, variant)
  values, scales = slow(x)
  assert np.abs(codes - values).max() <= 0.5 + 1e-4
  np.testing.assert_allclose(scale, scales, rtol=1e-6)


@variants
@types
@hypothesis.settings(max_examples=4, deadline=None)
@hypothesis.given(
  st.integers(1, 8), st.integers(1, 300), st.integers(0, 2**32 - 1)
)
def test_codes_of_the_norm_are_those_of_float64(
  variant, dtype, rows, width, seed
):
  x, gain = draw((rows, width), dtype, seed)
  codes, scale = cpu.act_quant(x, gain, EPS, CPU, variant)
  values, scales = slow(x, np.float64(gain))
  # Of y a rounding to its type may be another: a unit of it, of 127 codes.
  unit = 1e-6 if dtype == 'float32' else 2**-7
  assert np.abs(codes - values).max() <= 0.5 + 127 * unit + 1e-3
  np.testing.assert_allclose(scale, scales, rtol=unit)


@variants
@types
@shapes
def test_the_norm_is_that_of_a_model(variant, dtype, shape):
  x, gain = draw(shape, dtype)
  codes, scale = cpu.act_quant(x, gain, EPS, CPU, variant)
  want = quantizer(jax.jit(lambda x: layers.rms_norm(x, gain, EPS))(x))
  # Squares are added in another order.
  off = np.abs(np.int32(codes) - np.int32(want[0]))
  assert off.sum() <= (0.001 if dtype == 'float32' else 0.02) * off.size
  unit = 1e-6 if dtype == 'float32' else 2**-7
  np.testing.assert_allclose(scale, want[1], rtol=unit)


@variants
@types
def test_halves_round_to_even_and_zeros_stay(variant, dtype):
  row = [127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, -127]
  x = jnp.asarray([row, [0] * len(row), [1e-7] * len(row)], dtype)
  codes, scale = cpu.codes(x, variant)
  want = [127, 0, 2, 2, 0, -2, -2, 126, -127]
  np.testing.assert_array_equal(codes[0], want)
  np.testing.assert_array_equal(codes[1], 0)
  np.testing.assert_array_equal(codes[2], 1)
  np.testing.assert_allclose(scale[:, 0], [1, 1e-5 / 127, 1e-5 / 127], 1e-6)


@variants
@types
@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_shows_in_the_scale_of_its_token(
  variant, dtype, bad
):
  for width in (1, 33, 1000):
    for at in {0, width // 2, width - 1}:
      x, gain = draw((1, width), dtype)
      x = x.at[0, at].set(bad)
      codes, scale = cpu.codes(x, variant)
      want_codes, want = quantizer(x)
      np.testing.assert_array_equal(codes, want_codes)
      np.testing.assert_array_equal(scale, want)
      assert not np.isfinite(scale[0, 0])
      assert np.isnan(cpu.act_quant(x, gain, EPS, CPU, variant)[1][0, 0])
  # Of several tokens, the others are what they are without it.
  x, gain = draw((8, 1000), dtype)
  clean = cpu.codes(x, variant)
  codes, scale = cpu.codes(x.at[3, 400].set(bad), variant)
  assert not np.isfinite(scale[3, 0]) and not np.any(codes[3])
  rest = np.arange(8) != 3
  np.testing.assert_array_equal(codes[rest], clean[0][rest])
  np.testing.assert_array_equal(scale[rest], clean[1][rest])


def test_unasked_it_takes_few_tokens():
  for rows, name in ((1, 'cpu'), (8, 'cpu'), (9, 'reference')):
    call = dispatch.Call(CPU, 'bfloat16', rows)
    assert dispatch.choose('act_quant', call) == name
  x, gain = draw((2, 70), 'bfloat16')
  for found, want in zip(
    api.act_quant(x, gain, EPS), cpu.act_quant(x, gain, EPS, CPU), strict=True
  ):
    np.testing.assert_array_equal(found, want)


def test_stacks():
  x, _ = draw((6, 40), 'float32')
  codes, scale = jax.vmap(cpu.codes)(x.reshape(3, 2, 40))
  np.testing.assert_array_equal(codes.reshape(6, 40), cpu.codes(x)[0])
  np.testing.assert_array_equal(scale.reshape(6, 1), cpu.codes(x)[1])


def test_what_does_not_fit_is_an_error():
  with pytest.raises(jax.errors.JaxRuntimeError, match='float32 or bfloat16'):
    cpu.codes(jnp.ones((1, 4), jnp.float16))[0].block_until_ready()
