"""Rounding: unbiased where it is coarse, undone where it says so."""

from hypothesis import given
from hypothesis import strategies as st
import jax
from jax import numpy as jnp
import numpy as np
import pytest

from qat.zo import rounding

GRID = 2.0**-20


def bits(n: int, seed: int = 0) -> jax.Array:
  return jax.random.bits(jax.random.key(seed), (n,), jnp.uint32)


@pytest.mark.parametrize('w', [1.0, -1.0, 0.02, -3.0, 0.0])
@pytest.mark.parametrize('share', [0.003, 0.5, 1.25, -0.25])
def test_bfloat16_is_unbiased(w, share):
  n = 1 << 18
  w = jnp.bfloat16(w)
  gap = float(jnp.finfo(jnp.bfloat16).eps) * max(abs(float(w)), 1e-3)
  delta = np.float32(share * gap)
  found = np.float64(
    rounding.add(jnp.full(n, w), jnp.full(n, delta), bits(n), 0)
  )
  total = float(np.float32(w) + delta)
  values = np.unique(found)
  assert len(values) <= 2  # The neighbours.
  assert values.min() <= total <= values.max()
  spread = (values.max() - values.min()) / 2
  assert abs(found.mean() - total) <= 4 * spread / n**0.5 + 1e-9


def test_steps_below_the_resolution_of_bfloat16_survive():
  n, steps, delta = 4096, 400, jnp.float32(1e-5)
  start = jnp.ones(n, jnp.bfloat16)  # Neighbours are 0.0039 and 0.0078 away.
  assert (start + delta.astype(jnp.bfloat16) == start).all()

  def one(w, key):
    u = jax.random.bits(key, (n,), jnp.uint32)
    return rounding.add(w, jnp.full(n, delta), u, 0), None

  keys = jax.random.split(jax.random.key(1), steps)
  end = np.float64(jax.jit(lambda w: jax.lax.scan(one, w, keys)[0])(start))
  # Each step is a coin that says 'one neighbour up' with probability p.
  gap = 2.0**-7
  error = gap * (steps * float(delta) / gap / n) ** 0.5
  assert abs(end.mean() - (1 + steps * float(delta))) < 4 * error
  assert error < 0.1 * steps * float(delta)


# Processors in XLA's hands take subnormal numbers for zero.
@given(st.floats(width=32, allow_subnormal=False), st.integers(0, 2**32 - 1))
def test_bfloat16_keeps_what_needs_no_rounding(value, u):
  w = jnp.asarray(value, jnp.bfloat16)
  same = rounding.add(w, jnp.float32(0), jnp.uint32(u), 0)
  assert same.dtype == jnp.bfloat16
  np.testing.assert_array_equal(np.float32(same), np.float32(w))


def test_float32_is_rounded_to_nearest():
  w, delta = jnp.float32(1.0), jnp.float32(1e-7)
  for u in (0, 2**32 - 1):
    assert rounding.add(w, delta, jnp.uint32(u), 0) == np.float32(1.0 + 1e-7)


@pytest.mark.parametrize('share', [1e-4, 0.5, 2.75, -0.125])
def test_a_grid_is_unbiased(share):
  n = 1 << 18
  delta = jnp.full(n, share * GRID, jnp.float32)
  found = rounding.add(jnp.full(n, 0.5), delta, bits(n), GRID)
  counts = (np.float64(found) - 0.5) / GRID
  assert set(counts) <= {np.floor(share), np.ceil(share)}
  p = abs(share) % 1
  assert abs(counts.mean() - share) <= 4 * (p * (1 - p) / n) ** 0.5 + 1e-9


@given(
  st.integers(-(2**23), 2**23),
  st.floats(-4, 4, width=32),
  st.integers(0, 2**32 - 1),
)
def test_on_a_grid_a_step_is_undone_bit_for_bit(count, delta, u):
  w = rounding.snap({'w': jnp.float32(count * GRID)}, 'w', GRID)['w']
  delta, u = jnp.float32(delta), jnp.uint32(u)
  there = rounding.add(w, delta, u, GRID)
  back = rounding.add(there, -delta, u, GRID)
  assert np.float32(back).tobytes() == np.float32(w).tobytes()


def test_without_a_grid_a_step_is_not_undone():
  rng = np.random.default_rng(0)
  w, delta = (jnp.asarray(rng.normal(size=999), jnp.float32) for _ in range(2))
  u = bits(999)
  there = rounding.add(w, delta, u, 0)
  assert (rounding.add(there, -delta, u, 0) != w).any()


def test_snap_moves_chosen_parameters_to_the_grid():
  rng = np.random.default_rng(0)
  params = {k: jnp.asarray(rng.normal(size=99), jnp.float32) for k in 'ab'}
  found = rounding.snap(params, 'a', GRID)
  assert found['b'] is params['b']
  counts = np.float64(found['a']) / GRID
  np.testing.assert_array_equal(counts, np.round(counts))
  np.testing.assert_allclose(found['a'], params['a'], rtol=0, atol=GRID / 2)
  zero = rounding.snap({'a': jnp.float32(-0.1 * GRID)}, 'a', GRID)['a']
  assert not np.signbit(zero)


@pytest.mark.parametrize(
  ('w', 'message'),
  [
    (jnp.ones(2, jnp.bfloat16), "'w' is bfloat16"),
    (jnp.float32([1, -9]), "'w' has a value of 9.0"),
    (jnp.float32([1, jnp.nan]), "'w' has a value of nan"),
  ],
)
def test_snap_refuses_what_the_grid_cannot_hold(w, message):
  with pytest.raises(ValueError, match=message):
    rounding.snap({'w': w}, 'w', GRID)
