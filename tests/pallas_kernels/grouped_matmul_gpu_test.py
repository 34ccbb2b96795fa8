"""Routed products on GPUs, in an interpreter, against float64."""

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
from pallas_kernels.grouped_matmul import gpu
from tests.pallas_kernels import gpu_interpreter

H200 = dispatch.Target('gpu', '9.0')
PLACES = jax.jit(gpu.places, static_argnums=(1, 2))


@hypothesis.given(
  st.lists(st.integers(0, 5), min_size=30, max_size=30),
  st.sampled_from([1, 8]),
)
@hypothesis.example([5] * 30, 8)
@hypothesis.example([0, 1, 2, 3, 4] + [5] * 25, 8)  # As many tiles as can be.
def test_a_tile_has_tokens_of_one_expert_in_their_order(experts, tile):
  expert = np.sort(np.array(experts, np.int32))
  row, of_tile = map(np.asarray, PLACES(expert, 6, tile))
  assert np.all(np.diff(row) > 0) and 0 <= row[0]
  assert row[-1] < tile * len(of_tile)
  np.testing.assert_array_equal(of_tile[row // tile], expert)
  used = set((row // tile).tolist())
  # Those that are not computed come last.
  assert used == set(range(len(used))) and np.all(of_tile[len(used) :] == 6)


# Few tokens an expert, and many; experts without any; ragged tiles.
@pytest.mark.slow
@pytest.mark.parametrize(
  ('format', 'used'), [('1bit', [3, 0, 9]), ('int8', [0, 90, 0, 41])]
)
def test_a_token_meets_its_own_expert(format, used):
  rng = np.random.default_rng(0)
  rows, shape = sum(used), (len(used), 200, 140)
  codes = rng.integers(-128, 128, shape)
  codes = np.where(codes < 0, -1, 1) if format == '1bit' else codes
  scale = rng.uniform(0.1, 1, (len(used), 1, 1)).astype(np.float32)
  x = jnp.asarray(rng.integers(-127, 128, (rows, 200)), jnp.int8)
  x_scale = rng.uniform(0.1, 1, (rows, 1)).astype(np.float32)
  expert = np.repeat(np.arange(len(used), dtype=np.int32), used)
  pack = functools.partial(packing.pack, format=format, axis=-1, block=128)
  packed = jax.jit(pack)(jnp.asarray(codes, jnp.int8), jnp.asarray(scale))
  with gpu_interpreter.complete():
    y = jax.jit(
      lambda *arrays: gpu.grouped_matmul(
        *arrays, jnp.float32, H200, gpu_interpreter.PARAMS
      )
    )(x, packed, expert, x_scale)
  want = np.concatenate(
    [
      slow.matmul(x[m : m + 1], codes[e], x_scale[m], scale[e])
      for m, e in enumerate(expert)
    ]
  )
  np.testing.assert_allclose(y, want, rtol=1e-6)
