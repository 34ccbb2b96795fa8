"""The fused binary product against quantizer and quantized dot of a model."""

import hypothesis
from hypothesis import strategies as st
import jax
from jax import numpy as jnp
import numpy as np
import pytest

from pallas_kernels import slow
from pallas_kernels.quantized_train_matmul import api
from pallas_kernels.quantized_train_matmul import reference
from pallas_kernels.quantized_train_matmul import tpu
from qat.quant import dot
from qat.quant import operand as operand_lib
from qat.quant import qtensor
from qat.quant import weights
from tests.pallas_kernels import forms

IMPLEMENTATIONS = forms.of(
  reference.quantized_train_matmul, tpu.quantized_train_matmul
)


def draw(seed, rows, inputs, outputs, columns=False):
  """Int8 inputs, their scales, a latent weight, its mean and its scale."""
  rng = np.random.default_rng(seed)
  x = rng.integers(-127, 128, (rows, inputs)).astype(np.int8)
  x_scale = rng.uniform(0.1, 1, (rows, 1)).astype(np.float32)
  w = rng.normal(0.1, 1, (inputs, outputs)).astype(np.float32)
  axes = 0 if columns else None
  mean = w.mean(axes, keepdims=True)
  scale = np.abs(w).mean(axes, keepdims=True)
  return tuple(map(jnp.asarray, (x, x_scale, w, mean, scale)))


@pytest.mark.parametrize('name', IMPLEMENTATIONS)
@hypothesis.settings(max_examples=2)
@hypothesis.given(
  st.integers(1, 300),
  st.integers(1, 2100),
  st.integers(1, 300),
  st.booleans(),
  st.integers(0, 2**32 - 1),
)
@hypothesis.example(257, 1030, 257, True, 0)  # The last tiles are not full.
def test_sums_are_exact(name, rows, inputs, outputs, columns, seed):
  x, x_scale, w, mean, scale = draw(seed, rows, inputs, outputs, columns)
  y = jax.jit(IMPLEMENTATIONS[name])(x, x_scale, w, mean, scale)
  signs = np.where(np.asarray(w) > np.asarray(mean), 1, -1)
  want = slow.matmul(x, signs, x_scale, scale)
  np.testing.assert_allclose(y, want, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize('name', IMPLEMENTATIONS)
def test_it_is_the_product_of_a_model(name):
  x, x_scale, w, _, _ = draw(0, 20, 300, 60)
  q_w = weights.binary(w)
  q_x = qtensor.QTensor(x, x_scale, 'int8')
  source = operand_lib.Operand(q_x.dequantize(), q_x)
  method = dot.Method(int8=True, dtype='float32')
  want = dot.quantized_dot(source, operand_lib.Operand(w, q_w), method)
  run = jax.jit(IMPLEMENTATIONS[name])
  y = run(x, x_scale, w, jnp.mean(w, keepdims=True), q_w.scale)
  np.testing.assert_allclose(y, want, rtol=1e-6)


def test_a_weight_at_the_mean_is_minus_1():
  x, x_scale, w, _, scale = draw(0, 8, 128, 128)
  w = jnp.full_like(w, 0.5)
  for run in IMPLEMENTATIONS.values():
    y = run(x, x_scale, w, jnp.full((1, 1), 0.5), scale)
    want = slow.matmul(x, -np.ones((128, 128)), x_scale, scale)
    np.testing.assert_allclose(y, want, rtol=1e-6)


def test_the_simulator_of_a_tpu_finds_the_same():
  # Beyond the weights its memory holds NaN.
  x, x_scale, w, mean, scale = draw(1, 40, 1100, 130, True)
  y = forms.simulated(
    tpu.quantized_train_matmul, x, x_scale, w, mean, scale, forms.V5E
  )
  signs = np.where(np.asarray(w) > np.asarray(mean), 1, -1)
  want = slow.matmul(x, signs, x_scale, scale)
  np.testing.assert_allclose(y, want, rtol=1e-6)


def test_unasked_the_reference_runs_and_what_does_not_fit_is_an_error():
  x, x_scale, w, mean, scale = draw(0, 3, 20, 8)
  y = api.quantized_train_matmul(x, x_scale, w, mean, scale)
  signs = np.where(np.asarray(w) > np.asarray(mean), 1, -1)
  want = slow.matmul(x, signs, x_scale, scale)
  np.testing.assert_allclose(y, want, rtol=1e-6)
  run = api.quantized_train_matmul
  with pytest.raises(ValueError, match=r'want \[M, K\], \[K, N\]'):
    run(x, x_scale, w[1:], mean, scale)
  with pytest.raises(ValueError, match='want int8'):
    run(x.astype(jnp.float32), x_scale, w, mean, scale)
  with pytest.raises(ValueError, match='mean_1N has shape'):
    run(x, x_scale, w, mean[0], scale)
  with pytest.raises(ValueError, match=r'x_scale_M1 has shape \(3,\)'):
    run(x, x_scale[:, 0], w, mean, scale)
  with pytest.raises(ValueError, match='not on cpu'):
    run(x, x_scale, w, mean, scale, implementation='tpu')
