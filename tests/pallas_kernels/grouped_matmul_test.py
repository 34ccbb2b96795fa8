"""Routed products of sorted tokens against each token's own matrix."""

import functools

import hypothesis
from hypothesis import strategies as st
import jax
from jax import numpy as jnp
import numpy as np
import pytest

from pallas_kernels import packing
from pallas_kernels import slow
from pallas_kernels.grouped_matmul import api
from pallas_kernels.grouped_matmul import reference
from pallas_kernels.grouped_matmul import tpu
from tests.pallas_kernels import forms

IMPLEMENTATIONS = forms.of(reference.grouped_matmul, tpu.grouped_matmul)
PACK = jax.jit(packing.pack, static_argnames='format')
VISITS = jax.jit(tpu.visits, static_argnums=(1, 2))


def draw(seed, rows, inputs, outputs, experts, format='int8', used=None):
  """Inputs, scales, the experts of rows, codes and the codes packed."""
  rng = np.random.default_rng(seed)
  codes = rng.integers(-127, 128, (experts, inputs, outputs)).astype(np.int8)
  if format == '1bit':
    codes = np.where(codes > 0, 1, -1).astype(np.int8)
  scale = rng.uniform(0.1, 1, (experts, 1, 1)).astype(np.float32)
  x = rng.integers(-127, 128, (rows, inputs)).astype(np.int8)
  x_scale = rng.uniform(0.1, 1, (rows, 1)).astype(np.float32)
  some = rng.permutation(experts)[: used or experts]
  expert = np.sort(rng.choice(some, rows)).astype(np.int32)
  packed = PACK(jnp.asarray(codes), jnp.asarray(scale), format=format)
  return *map(jnp.asarray, (x, x_scale, expert)), codes, packed


def by_row(x, x_scale, expert, codes, packed):
  return np.concatenate(
    [
      slow.matmul(x[m : m + 1], codes[e], x_scale[m], packed.scale[e])
      for m, e in enumerate(np.asarray(expert))
    ]
  )


@pytest.mark.parametrize('name', IMPLEMENTATIONS)
@hypothesis.settings(max_examples=2)
@hypothesis.given(
  st.integers(1, 300),
  st.integers(1, 400),
  st.integers(1, 300),
  st.integers(1, 8),
  st.integers(1, 8),
  st.integers(0, 2**32 - 1),
)
@hypothesis.example(300, 130, 257, 8, 3, 0)  # Experts without a token.
@hypothesis.example(1, 64, 32, 4, 1, 0)
def test_a_token_meets_its_own_expert(
  name, rows, inputs, outputs, experts, used, seed
):
  x, x_scale, expert, codes, packed = draw(
    seed, rows, inputs, outputs, experts, used=min(used, experts)
  )
  run = functools.partial(IMPLEMENTATIONS[name], out_dtype=jnp.float32)
  y = jax.jit(run)(x, packed, expert, x_scale)
  want = by_row(x, x_scale, expert, codes, packed)
  np.testing.assert_allclose(y, want, rtol=1e-6, atol=1e-30)


@hypothesis.given(
  st.lists(st.integers(0, 5), min_size=30, max_size=30),
  st.sampled_from([1, 4, 7]),
)
def test_every_tile_is_visited_with_every_expert_it_holds(experts, tile):
  expert = np.sort(np.array(experts, np.int32))
  of_tile, of_expert = map(np.asarray, VISITS(expert, 6, tile))
  assert len(of_tile) == -(-len(expert) // tile) + 5
  assert np.all(np.diff(of_tile) >= 0)  # A tile is left once and for all.
  made = set(zip(of_tile.tolist(), of_expert.tolist(), strict=True))
  needed = {(m // tile, int(e)) for m, e in enumerate(expert)}
  assert needed <= made
  assert of_expert.min() >= 0 and of_expert.max() <= 5


def test_the_simulator_of_a_tpu_finds_the_same_with_1_bit_experts():
  x, x_scale, expert, codes, packed = draw(0, 150, 1024, 130, 3, '1bit')
  y = forms.simulated(
    tpu.grouped_matmul, x, packed, expert, x_scale, jnp.float32, forms.V5E
  )
  want = by_row(x, x_scale, expert, codes, packed)
  np.testing.assert_allclose(y, want, rtol=1e-6)


def test_unasked_the_reference_runs_and_what_does_not_fit_is_an_error():
  x, _, expert, codes, packed = draw(0, 9, 20, 8, 3)
  y = api.grouped_matmul(x, packed, expert)
  want = by_row(x, np.ones((9, 1)), expert, codes, packed)
  np.testing.assert_allclose(y, want, rtol=1e-6)
  with pytest.raises(ValueError, match='want a stack'):
    api.grouped_matmul(x, jax.tree.map(lambda a: a[0], packed), expert)
  with pytest.raises(ValueError, match=r'want int32 \(9,\)'):
    api.grouped_matmul(x, packed, expert[1:])
  with pytest.raises(ValueError, match='not on cpu'):
    api.grouped_matmul(x, packed, expert, implementation='tpu')
