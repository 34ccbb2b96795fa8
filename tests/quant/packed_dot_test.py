"""Packed products against float64 products of what matrices stand for."""

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch
from qat.quant import packed
from qat.quant import packed_dot
from qat.quant import rules

CPU, TPU = dispatch.Target('cpu'), dispatch.Target('tpu', 'v5e')
E, K, N, M = 3, 70, 11, 6


def stack(weight: str, target=CPU, gains=False) -> packed.PackedMatrix:
  kernel = jax.random.normal(jax.random.key(3), (E, K, N))
  spec = rules.Spec(weight, 'none', 'channel')
  q = spec.quantize({'kernel': kernel, **spec.start(kernel)})
  gain_EK = jax.random.normal(jax.random.key(1), (E, K)) if gains else None
  return packed.pack(q, target, gain_EK)


def inputs(int8: bool):
  """Rows, their scales, and what they stand for in float64."""
  rng = np.random.default_rng(0)
  if not int8:
    x_MK = rng.normal(size=(M, K)).astype(np.float32)
    return jnp.asarray(x_MK), None, np.float64(x_MK)
  x_MK = rng.integers(-127, 128, (M, K)).astype(np.int8)
  scale_M1 = rng.uniform(0.01, 0.1, (M, 1)).astype(np.float32)
  values = np.float64(x_MK) * scale_M1
  return jnp.asarray(x_MK), jnp.asarray(scale_M1), values


def close(found, expected):
  np.testing.assert_allclose(
    found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max()
  )


CASES = pytest.mark.parametrize(
  ('weight', 'gains', 'int8'),
  [
    ('binary', False, True),
    ('paretoq2', False, True),
    ('int8_asym', False, True),
    ('int4_asym', False, False),
    ('binary', True, False),
    ('binary', True, True),
  ],
)


@CASES
def test_a_product_is_that_of_the_values(weight, gains, int8):
  x_MK, scale_M1, values_MK = inputs(int8)
  weights = stack(weight, gains=gains)
  w_EKN = np.float64(weights.dequantize())
  found = packed_dot.matmul(x_MK, scale_M1, weights, jnp.float32, None)
  close(found, np.einsum('mk,ekn->men', values_MK, w_EKN))
  one = jax.tree.map(lambda a: a[1], weights)
  found = packed_dot.matmul(x_MK, scale_M1, one, jnp.float32, CPU)
  close(found, values_MK @ w_EKN[1])


@pytest.mark.parametrize('int8', [False, True])
def test_several_products_are_those_of_each(int8):
  x_MK, scale_M1, _ = inputs(int8)
  binary, zeros, gained = (
    jax.tree.map(lambda a: a[1], stack(*args))
    for args in (('binary',), ('int8_asym',), ('binary', CPU, True))
  )
  for weights in (
    [binary, binary],
    [zeros, zeros],
    [binary, zeros],
    [binary, gained],
    [binary, stack('binary')],
  ):
    found = packed_dot.several(x_MK, scale_M1, weights, jnp.float32, CPU)
    for y, w in zip(found, weights, strict=True):
      alone = packed_dot.matmul(x_MK, scale_M1, w, jnp.float32, CPU)
      np.testing.assert_array_equal(y, alone)


@CASES
@pytest.mark.parametrize('experts', [[2], [0, 2], [0, 1, 1]])
def test_a_tile_meets_its_expert(weight, gains, int8, experts):
  x_MK, scale_M1, values_MK = inputs(int8)
  weights = stack(weight, gains=gains)
  w_EKN = np.float64(weights.dequantize())[experts]
  found = packed_dot.grouped(
    *(x_MK, scale_M1, weights, jnp.array(experts, jnp.int32)),
    *(jnp.float32, None),
  )
  tiles = values_MK.reshape(len(experts), -1, K)
  close(found, (tiles @ w_EKN).reshape(M, N))


@pytest.mark.parametrize('gains', [False, True])
def test_a_chip_with_a_kernel_for_groups_uses_it(gains):
  weights = stack('int4_asym', TPU, gains)
  x_MK, scale_M1, _ = inputs(True)
  lowered = (
    jax.jit(lambda *a: packed_dot.by_group(*a, jnp.bfloat16, TPU))
    .trace(*(x_MK[None], scale_M1[None], weights, jnp.zeros((1, 2), jnp.int32)))
    .lower(lowering_platforms=('tpu',))
  )
  assert lowered.as_text().count('grouped_matmul_int4') == 1
  assert lowered.out_info.shape == (1, M, N)
