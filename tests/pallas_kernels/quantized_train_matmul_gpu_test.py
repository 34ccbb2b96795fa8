"""Latent weights times codes on GPUs, in an interpreter, against float64."""

import functools

import hypothesis
from hypothesis import strategies as st
import jax
from jax import numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch
from pallas_kernels import slow
from pallas_kernels.packed_matmul import api as packed_matmul
from pallas_kernels.quantized_train_matmul import gpu
from tests.pallas_kernels import gpu_interpreter

H200 = dispatch.Target('gpu', '9.0')


@pytest.fixture(autouse=True)
def interpreter():
  with gpu_interpreter.complete():
    yield


@jax.jit
def multiply(x, x_scale, w, mean, scale):
  return gpu.quantized_train_matmul(
    x, x_scale, w, mean, scale, H200, gpu_interpreter.PARAMS
  )


def draw(seed, rows, inputs, outputs, columns, dtype='float32'):
  """Int8 inputs, a latent weight, and its mean, all of it or by columns."""
  rng = np.random.default_rng(seed)
  x = jnp.asarray(rng.integers(-128, 128, (rows, inputs)), jnp.int8)
  w = jnp.asarray(rng.normal(0.1, 1, (inputs, outputs)), dtype)
  mean = jnp.mean(w, 0 if columns else None, keepdims=True, dtype=jnp.float32)
  return x, w, mean


def signs(w, mean):
  """The codes, by a comparison of each weight in float64."""
  return np.where(np.float64(w) > np.float64(mean), 1, -1)


@pytest.mark.slow
@hypothesis.settings(max_examples=1)
@hypothesis.given(
  st.sampled_from(['float32', 'bfloat16']),
  st.integers(1, 300),
  st.integers(1, 1100),
  st.integers(1, 140),
  st.booleans(),
  st.integers(0, 2**32 - 1),
)
# Ragged tiles of many tokens and of few, and more than one block.
@hypothesis.example('float32', 257, 1030, 129, True, 0)
@hypothesis.example('bfloat16', 17, 1025, 70, False, 0)
def test_sums_of_codes_are_exact(dtype, rows, inputs, outputs, columns, seed):
  x, w, mean = draw(seed, rows, inputs, outputs, columns, dtype)
  y = multiply(x, jnp.ones((rows, 1)), w, mean, jnp.ones((1, 1)))
  assert y.shape == (rows, outputs) and y.dtype == jnp.float32
  exact = slow.matmul(x, signs(w, mean), 1, 1)
  np.testing.assert_array_equal(y, exact.astype(np.float32))


@pytest.mark.parametrize('rows, columns', [(3, True), (40, False)])
def test_each_token_and_each_column_has_its_scale(rows, columns):
  x, w, mean = draw(1, rows, 200, 70, columns)
  rng = np.random.default_rng(2)
  x_scale = jnp.asarray(rng.uniform(0.1, 1, (rows, 1)), jnp.float32)
  scale = jnp.asarray(rng.uniform(0.1, 1, mean.shape), jnp.float32)
  y = multiply(x, x_scale, w, mean, scale)
  want = slow.matmul(x, signs(w, mean), x_scale, scale)
  np.testing.assert_allclose(y, want, rtol=1e-6)


def test_a_weight_at_the_mean_is_minus_1():
  x, w, _ = draw(0, 8, 128, 64, False)
  half = jnp.full((1, 1), 0.5)
  y = multiply(x, jnp.ones((8, 1)), jnp.full_like(w, 0.5), half, half)
  want = slow.matmul(x, np.full(w.shape, -1), 1, 0.5)
  np.testing.assert_array_equal(y, want.astype(np.float32))


def test_a_stack_of_layers_under_vmap():
  drawn = [draw(seed, 3, 150, 20, True) for seed in (3, 4)]
  x = drawn[0][0]
  w, mean = (jnp.stack([one[i] for one in drawn]) for i in (1, 2))
  ones = jnp.ones((3, 1)), jnp.ones((1, 1))
  y_LMN = jax.jit(
    jax.vmap(lambda w, mean: multiply(x, ones[0], w, mean, ones[1]))
  )(w, mean)
  for y_MN, (_, w_KN, mean_1N) in zip(y_LMN, drawn, strict=True):
    want = slow.matmul(x, signs(w_KN, mean_1N), 1, 1)
    np.testing.assert_array_equal(y_MN, want.astype(np.float32))


def test_more_inputs_than_sums_have_room_for_are_an_error():
  inputs = packed_matmul.MOST_INPUTS + 1
  shapes = [(1, inputs), (1, 1), (inputs, 8), (1, 1), (1, 1)]
  arrays = [
    jax.ShapeDtypeStruct(shape, dtype)
    for shape, dtype in zip(shapes, ['int8'] + ['float32'] * 4, strict=True)
  ]
  run = functools.partial(gpu.quantized_train_matmul, target=H200)
  with pytest.raises(ValueError, match='fit int32'):
    jax.eval_shape(run, *arrays)
