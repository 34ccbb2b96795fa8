"""RMSNorm with int8 codes on GPUs, in an interpreter, against float64."""

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch
from pallas_kernels.act_quant import gpu
from tests.pallas_kernels import gpu_interpreter

H200 = dispatch.Target('gpu', '9.0')
EPS = 1e-5


# A width that is filled up, and one that is read eight numbers at a time.
@pytest.mark.parametrize('width', [300, 1024])
@pytest.mark.parametrize('dtype', ['bfloat16', 'float32'])
def test_codes_and_scales_are_those_of_the_normed_tokens(width, dtype):
  rng = np.random.default_rng(0)
  size = np.array([[1e-3], [1], [100], [0]])  # The last token is all zeros.
  x = jnp.asarray(rng.normal(size=(4, width)) * size, dtype)
  gain = jnp.asarray(rng.uniform(0.5, 2, width), jnp.float32)
  with gpu_interpreter.complete():
    codes, scale = jax.jit(
      lambda x, gain: gpu.act_quant(x, gain, EPS, H200, gpu_interpreter.PARAMS)
    )(x, gain)
  assert codes.shape == x.shape and codes.dtype == jnp.int8
  assert scale.shape == (4, 1) and scale.dtype == jnp.float32
  x64 = np.float64(x)
  y = x64 / np.sqrt((x64**2).mean(1, keepdims=True) + EPS) * np.float64(gain)
  # bfloat16 rounds y before it is quantized: to one part in 256.
  near = 2**-8 if dtype == 'bfloat16' else 1e-5
  want = np.maximum(np.abs(y).max(1, keepdims=True), 1e-5) / 127
  np.testing.assert_allclose(scale, want, rtol=near)
  error = np.abs(np.float64(codes) * np.float64(scale) - y)
  assert np.all(error <= 0.5001 * want + near * np.abs(y) + 1e-12)
  assert np.all(np.abs(np.int32(codes)).max(1) == [127, 127, 127, 0])
