"""Both branches on GPUs, in an interpreter, against float64."""

import functools

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch
from pallas_kernels import packing
from pallas_kernels import slow
from pallas_kernels.decoupled_ffn_up import gpu
from tests.pallas_kernels import gpu_interpreter

H200 = dispatch.Target('gpu', '9.0')


# Few tokens and many; the branches end in ragged tiles, and the wide one is
# filled up to more inputs.
@pytest.mark.parametrize('rows', [3, 40])
def test_each_branch_is_a_product_of_its_own(rows):
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.integers(-127, 128, (rows, 200)), jnp.int8)
  x_scale = jnp.asarray(rng.uniform(0.1, 1, (rows, 1)), jnp.float32)
  pack = functools.partial(packing.pack, axis=-1, block=128)
  branches = []
  for format, outputs in (('1bit', 140), ('int8', 20)):
    codes = rng.integers(-128, 128, (200, outputs))
    codes = np.where(codes < 0, -1, 1) if format == '1bit' else codes
    scale = jnp.asarray(rng.uniform(0.1, 1, (1, outputs)), jnp.float32)
    packed = pack(jnp.asarray(codes, jnp.int8), scale, format)
    branches.append((packed, slow.matmul(x, codes, x_scale, scale)))
  (wide, want_wide), (narrow, want_narrow) = branches
  with gpu_interpreter.complete():
    found = jax.jit(
      lambda *arrays: gpu.decoupled_ffn_up(
        *arrays, jnp.float32, H200, gpu_interpreter.PARAMS
      )
    )(x, wide, narrow, x_scale)
  for y, want in zip(found, (want_wide, want_narrow), strict=True):
    np.testing.assert_allclose(y, want, rtol=1e-6)
