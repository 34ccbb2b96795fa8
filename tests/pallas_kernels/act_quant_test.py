"""Norm and codes in one read against the layers of a model."""

import functools

import hypothesis
from hypothesis import strategies as st
import jax
from jax import numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch
from pallas_kernels.act_quant import api
from pallas_kernels.act_quant import reference
from pallas_kernels.act_quant import tpu
from qat.nn import layers
from qat.quant import activations
from tests.pallas_kernels import forms

V5E = dispatch.Target('tpu', 'v5e')
EPS = 1e-5
IMPLEMENTATIONS = {
  'reference': reference.act_quant,
  'tpu': functools.partial(tpu.act_quant, interpret=True),
}


def draw(seed, rows, width, dtype='float32'):
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(rows, width)) * rng.lognormal(0, 3, (rows, 1))
  gain = rng.uniform(0.5, 2, width)
  return jnp.asarray(x, dtype), jnp.asarray(gain, jnp.float32)


def model(x, gain):
  """What a layer of a model computes."""
  return activations.absmax(layers.rms_norm(x, gain, EPS), bits=8)


@pytest.mark.parametrize('name', IMPLEMENTATIONS)
@hypothesis.settings(max_examples=4)
@hypothesis.given(
  st.integers(1, 100),
  st.integers(1, 300),
  st.sampled_from(['float32', 'bfloat16']),
  st.integers(0, 2**32 - 1),
)
def test_codes_are_those_of_a_model(name, rows, width, dtype, seed):
  x, gain = draw(seed, rows, width, dtype)
  run = functools.partial(IMPLEMENTATIONS[name], eps=EPS, target=V5E)
  codes, scale = jax.jit(run)(x, gain)
  want = jax.jit(model)(x, gain)
  assert codes.dtype == jnp.int8 and scale.dtype == jnp.float32
  # Where the compiler adds in another order, y rounds to a neighbour: one unit
  # of its type, which is seldom across the middle between two codes.
  unit = 1e-6 if dtype == 'float32' else 2**-7
  np.testing.assert_allclose(scale, want.scale, rtol=unit)
  off = np.abs(np.int32(codes) - np.int32(want.codes))
  assert off.max() <= 1
  assert np.mean(off) <= (1e-3 if dtype == 'float32' else 1e-2)


def test_the_reference_is_a_model_bit_for_bit():
  for dtype in ('float32', 'bfloat16'):
    x, gain = draw(0, 33, 192, dtype)
    codes, scale = reference.act_quant(x, gain, EPS, V5E)
    want = model(x, gain)
    np.testing.assert_array_equal(codes, want.codes)
    np.testing.assert_array_equal(scale, want.scale)


@pytest.mark.parametrize('name', IMPLEMENTATIONS)
@pytest.mark.parametrize('rows', [1, 3, 33])
def test_a_nan_shows_in_the_scales_it_reaches(name, rows):
  x, gain = draw(0, rows, 192)
  run = jax.jit(functools.partial(IMPLEMENTATIONS[name], eps=EPS, target=V5E))
  _, scale = run(x.at[rows // 2, 5].set(jnp.nan), gain)
  np.testing.assert_array_equal(
    np.isnan(scale[:, 0]), np.arange(rows) == rows // 2
  )
  assert np.isnan(run(x, gain.at[7].set(jnp.nan))[1]).all()


@pytest.mark.parametrize('name', IMPLEMENTATIONS)
def test_halves_round_to_even_and_zeros_stay(name):
  # mean(x^2) = 1 for the first row: codes of 127 * x / 127 are x itself.
  x = np.zeros((2, 256), np.float32)
  x[0, :6] = [127, 0.5, 1.5, 2.5, -0.5, -1.5]
  run = IMPLEMENTATIONS[name]
  codes, scale = run(jnp.asarray(x), jnp.ones(256), EPS, V5E)
  rms = np.sqrt(np.mean(np.float64(x[0]) ** 2) + EPS)
  np.testing.assert_allclose(scale[0, 0], 1 / rms, rtol=1e-6)
  np.testing.assert_array_equal(codes[0, [0, 2]], [127, 2])
  np.testing.assert_array_equal(np.asarray(codes[1]), 0)
  np.testing.assert_allclose(scale[1, 0], 1e-5 / 127, rtol=1e-6)


def test_the_simulator_of_a_tpu_finds_the_same():
  x, gain = draw(3, 40, 200)
  codes, scale = forms.simulated(tpu.act_quant, x, gain, EPS, V5E)
  want = model(x, gain)
  np.testing.assert_allclose(scale, want.scale, rtol=1e-6)
  assert np.abs(np.int32(codes) - np.int32(want.codes)).max() <= 1


def test_unasked_the_reference_runs_and_what_does_not_fit_is_an_error():
  x, gain = draw(0, 5, 16)
  codes, _ = api.act_quant(x, gain, EPS)
  np.testing.assert_array_equal(codes, model(x, gain).codes)
  with pytest.raises(ValueError, match=r'want \[M, D\], \[D\]'):
    api.act_quant(x, gain[1:], EPS)
  with pytest.raises(ValueError, match='x is int8'):
    api.act_quant(codes, gain, EPS)
  with pytest.raises(ValueError, match='not on cpu'):
    api.act_quant(x, gain, EPS, implementation='tpu')
