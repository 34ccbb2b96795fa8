"""Packed matrices against what they are packed from."""

import dataclasses
import functools

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch
from qat.quant import learned
from qat.quant import packed
from qat.quant import packing
from qat.quant import qtensor
from qat.quant import rules
from qat.quant import weights

TARGETS = [
  dispatch.Target('cpu'),
  dispatch.Target('tpu', 'v5e'),
  dispatch.Target('gpu', '9.0'),
  dispatch.Target('tpu', 'v9'),  # No kernel is for it.
]
CPU, TPU = TARGETS[:2]
K, N = 70, 11
# That have one scale, or one for each column.
PACKED = [
  *('binary', 'ternary', 'int2', 'int3', 'int4', 'int8'),
  *('int2_asym', 'int3_asym', 'int4_asym', 'int8_asym'),
  *('lsq3', 'lsq4', 'paretoq1', 'paretoq_ternary', 'paretoq2'),
  *('lwc2', 'lwc3', 'lwc4', 'lwc6', 'lwc8'),
]


@functools.cache
def quantized(weight: str, granularity: str = 'channel') -> qtensor.QTensor:
  kernel = jax.random.normal(jax.random.key(3), (2, K, N)) + 0.1
  spec = rules.Spec(weight, 'none', granularity, group_size=7)
  return spec.quantize({'kernel': kernel, **spec.start(kernel)})


@pytest.mark.parametrize('weight', PACKED)
def test_a_packed_matrix_stands_for_the_same_values(weight):
  q = quantized(weight)
  expected = np.asarray(q.dequantize())
  for target in TARGETS[: 4 if weight in ('binary', 'paretoq2') else 1]:
    made = packed.pack(q, target)
    assert made.shape == q.shape == (2, K, N)
    np.testing.assert_allclose(
      made.dequantize(), expected, rtol=1e-5, atol=2e-6 * np.abs(expected).max()
    )
    packed.check(made)


def test_every_quantizer_with_such_scales_has_a_format():
  without = {'binary_mix', 'fp8', 'onebit'}  # OneBit's scale is of rank 1.
  assert {*weights.QUANTIZERS, *learned.QUANTIZERS} == {*PACKED} | without
  for weight in ('binary_mix', 'fp8'):
    assert packed.pack(quantized(weight), CPU) is None
  assert packed.pack(quantized('int4', 'group'), CPU) is None
  assert packed.pack(quantized('int4', 'tensor'), CPU) is not None


def test_one_bit_takes_one_bit():
  made = packed.pack(quantized('binary'), CPU)
  assert made.format == '1bit'
  assert made.data.nbytes == 2 * 64 * N  # A block of 64 bytes has 512 inputs.


@pytest.mark.parametrize('weight', ['ternary', 'paretoq2', 'int8_asym'])
def test_another_layout_has_the_same_codes(weight):
  made = packed.pack(quantized(weight), CPU)
  assert packed.repack(made, CPU) is made
  other = packed.repack(made, TPU)
  assert (other.axis, other.block) != (made.axis, made.block)
  np.testing.assert_array_equal(other.dequantize(), made.dequantize())
  back = packed.repack(other, CPU)
  jax.tree.map(np.testing.assert_array_equal, back, made)


def test_gains_are_of_inputs():
  gain_EK = jnp.linspace(0.5, 2, 2 * K).reshape(2, K)
  made = packed.pack(quantized('binary'), CPU, gain_EK)
  plain = packed.pack(quantized('binary'), CPU)
  np.testing.assert_allclose(
    made.dequantize(), plain.dequantize() * gain_EK[:, :, None], rtol=1e-6
  )


@pytest.mark.parametrize('weight', ['binary', 'paretoq2', 'int4_asym'])
def test_a_file_keeps_it(weight):
  made = packed.pack(quantized(weight), TPU, jnp.ones((2, K)))
  arrays, meta = packing.pack(made)
  again = packing.unpack(arrays, meta)
  assert jax.tree.structure(again) == jax.tree.structure(made)
  jax.tree.map(np.testing.assert_array_equal, again, made)


@pytest.mark.parametrize(
  'changes',
  [
    {'data': np.zeros((2, N, 63), np.int8)},
    {'data': np.zeros((2, N - 1, 64), np.int8)},
    {'data': np.zeros((2, N, 64), np.uint8)},
    {'data': None},
    {'scale': np.ones((2, 1, N - 1), np.float32)},
    {'shift': np.ones((2, 1, N + 1), np.float32)},
    {'gain_K': np.ones((2, K - 1), np.float32)},
    {'format': '3bit'},
    {'block': 0},
  ],
)
def test_arrays_that_do_not_fit_are_refused(changes):
  made = packed.pack(quantized('binary'), CPU)
  with pytest.raises(ValueError, match='packed matrix|of a matrix of 70 x 11'):
    packed.check(dataclasses.replace(made, **changes))
