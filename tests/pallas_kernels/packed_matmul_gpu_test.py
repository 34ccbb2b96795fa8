"""The packed product on GPUs, in an interpreter, against float64 loops."""

import dataclasses
import functools

import hypothesis
from hypothesis import strategies as st
import jax
from jax import numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch
from pallas_kernels import packing
from pallas_kernels import slow
from pallas_kernels.packed_matmul import gpu
from tests.pallas_kernels import gpu_interpreter

pytestmark = pytest.mark.slow

H200 = dispatch.Target('gpu', '9.0')
ROW = dispatch.rows_for('packed_matmul', H200)[0]
PACK = jax.jit(
  functools.partial(packing.pack, axis=ROW.axis, block=ROW.block),
  static_argnames='format',
)


@pytest.fixture(autouse=True)
def interpreter():
  with gpu_interpreter.complete():
    yield


@functools.partial(jax.jit, static_argnames='out_dtype')
def multiply(x, packed, x_scale, out_dtype=jnp.float32):
  return gpu.packed_matmul(
    x, packed, x_scale, out_dtype, H200, gpu_interpreter.PARAMS
  )


def draw(seed, format, inputs, outputs):
  """Codes, all of the format's, and the same packed with a scale a column."""
  rng = np.random.default_rng(seed)
  _, base, step, low = packing.FORMATS[format]
  low = -128 if format == 'int8' else low
  codes = rng.integers(0, base, (inputs, outputs)) * step + low
  scale = rng.uniform(0.1, 1, (1, outputs))
  return codes, PACK(
    jnp.asarray(codes, jnp.int8), jnp.asarray(scale, jnp.float32), format=format
  )


@hypothesis.settings(max_examples=1)
@hypothesis.given(
  st.sampled_from(ROW.formats),
  st.integers(1, 300),
  st.integers(1, 1100),
  st.integers(1, 140),
  st.integers(0, 2**32 - 1),
)
# Ragged tiles, and more than one block.
@hypothesis.example('1bit', 257, 1025, 129, 0)
@hypothesis.example('2bit', 33, 1025, 8, 0)
@hypothesis.example('int8', 1, 129, 65, 0)
def test_sums_of_codes_are_exact(format, rows, inputs, outputs, seed):
  codes, packed = draw(seed, format, inputs, outputs)
  ones = dataclasses.replace(packed, scale=jnp.ones((1, 1)))
  rng = np.random.default_rng(seed)
  x = jnp.asarray(rng.integers(-128, 128, (rows, inputs)), jnp.int8)
  sums = multiply(x, ones, jnp.ones((rows, 1)))
  assert sums.shape == (rows, outputs) and sums.dtype == jnp.float32
  exact = slow.matmul(x, codes, 1, 1)
  np.testing.assert_array_equal(sums, exact.astype(np.float32))


@pytest.mark.parametrize('rows', [3, 40])
def test_each_token_and_each_column_has_its_scale(rows):
  codes, packed = draw(1, '1bit', 300, 70)
  rng = np.random.default_rng(2)
  x = jnp.asarray(rng.integers(-127, 128, (rows, 300)), jnp.int8)
  x_scale = jnp.asarray(rng.uniform(0.1, 1, (rows, 1)), jnp.float32)
  y = multiply(x, packed, x_scale, jnp.bfloat16)
  assert y.dtype == jnp.bfloat16
  want = slow.matmul(x, codes, x_scale, packed.scale)
  np.testing.assert_allclose(np.float32(y), want, rtol=2**-8, atol=1e-30)


@pytest.mark.parametrize('format', ['1bit', 'int4', 'int8'])
@pytest.mark.parametrize('rows', [3, 40])
def test_bfloat16_inputs_are_summed_in_float32(format, rows):
  codes, packed = draw(1, format, 300, 70)
  x = np.random.default_rng(2).normal(size=(rows, 300))
  x = jnp.asarray(x, jnp.bfloat16)
  y = multiply(x, packed, jnp.ones((rows, 1)))
  x64 = np.float64(x)
  want = slow.matmul(x64, codes, 1, packed.scale)
  # What is summed, and subtracted again, is as large as the largest index.
  size = np.abs(x64).sum(1, keepdims=True) * (np.abs(codes).max() + 1)
  assert np.all(np.abs(y - want) <= 1e-6 * size * np.asarray(packed.scale))


def test_a_stack_of_layers_under_vmap():
  codes, one = draw(0, '1bit', 300, 70)
  packed = jax.tree.map(lambda a: jnp.stack([a, 2 * a + 1]), one)
  x = np.random.default_rng(2).integers(-127, 128, (3, 300))
  x = jnp.asarray(x, jnp.int8)
  y_LMN = jax.jit(
    jax.vmap(lambda packed: multiply(x, packed, jnp.ones((3, 1))))
  )(packed)
  for y_MN, codes_KN, scale in zip(
    y_LMN, packing.unpack(packed), packed.scale, strict=True
  ):
    want = slow.matmul(x, codes_KN, 1, scale)
    np.testing.assert_allclose(y_MN, want, rtol=1e-6)
