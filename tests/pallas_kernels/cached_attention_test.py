"""Attention to a cache in C++ against float64, by every variant there is."""

import hypothesis
from hypothesis import strategies as st
import jax
from jax import numpy as jnp
import numpy as np
import pytest

from pallas_kernels import native
from pallas_kernels.cached_attention import cpu

pytestmark = pytest.mark.skipif(
  not native.variants(), reason=f'the C++ extension is {native.status()}'
)


def slow(q_BNH, keys_BSKH, values_BSKH, position_B):
  y_BNH = np.zeros(q_BNH.shape)
  group = q_BNH.shape[1] // keys_BSKH.shape[2]
  for b, n in np.ndindex(q_BNH.shape[:2]):
    seen = position_B[b] + 1
    scores_S = keys_BSKH[b, :seen, n // group] @ q_BNH[b, n]
    p_S = np.exp((scores_S - scores_S.max()) / np.sqrt(q_BNH.shape[2]))
    y_BNH[b, n] = p_S / p_S.sum() @ values_BSKH[b, :seen, n // group]
  return y_BNH


def draw(batch, heads, group, width, length, dtype, seed=0):
  rng = np.random.default_rng(seed)

  def normal(*shape):
    return jnp.asarray(rng.normal(size=shape), dtype)

  return (
    normal(batch, heads * group, width),
    *(normal(batch, heads, width) for _ in range(2)),
    *(normal(batch, length, heads, width) for _ in range(2)),
    jnp.asarray(rng.integers(0, length, batch), jnp.int32),
  )


@pytest.mark.parametrize('variant', native.variants())
@pytest.mark.parametrize('dtype', cpu.DTYPES)
@hypothesis.given(
  st.integers(1, 3),
  st.integers(1, 3),
  st.integers(1, 3),
  st.integers(1, 140),
  st.integers(1, 40),
  st.integers(0, 9),
)
@hypothesis.settings(max_examples=12)
def test_it_is_attention_to_the_longer_cache(
  variant, dtype, batch, heads, group, width, length, seed
):
  arrays = draw(batch, heads, group, width, length, dtype, seed)
  q, k, v, keys, values, position_B = map(np.asarray, arrays)
  found, *longer = cpu.attend(*arrays, variant)
  rows = np.arange(batch)
  for cache, new, one in zip(longer, (keys, values), (k, v), strict=True):
    expected = new.copy()
    expected[rows, position_B] = one
    np.testing.assert_array_equal(cache, expected)
  expected = slow(*map(np.float64, (q, *longer)), position_B)
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(found, expected, atol=2e-5)


def test_many_heads_are_shared_among_threads():
  arrays = draw(2, 8, 2, 64, 600, 'bfloat16')
  *rest, position_B = arrays
  found, *longer = cpu.attend(*rest, jnp.full_like(position_B, 599))
  expected = slow(*map(np.float64, (rest[0], *longer)), np.full(2, 599))
  np.testing.assert_allclose(found, expected, atol=2e-5)


def test_what_was_cached_is_left_alone_where_it_is_needed_again():
  arrays = draw(1, 2, 1, 16, 8, 'float32')
  before = np.array(arrays[3])
  step = jax.jit(lambda *a: (cpu.attend(*a), a[3] + 0))
  (_, keys, _), kept = step(*arrays)
  np.testing.assert_array_equal(kept, before)
  np.testing.assert_array_equal(arrays[3], before)
  assert np.any(np.asarray(keys) != before)


def test_a_step_that_is_handed_its_cache_copies_nothing():
  arrays = draw(1, 2, 1, 16, 8, 'bfloat16')
  step = jax.jit(cpu.attend, donate_argnums=(3, 4))
  text = step.lower(*arrays).compile().as_text()
  assert 'copy(' not in text


def test_what_is_not_finite_is_not_hidden():
  q, k, v, keys, values, _ = draw(1, 1, 1, 16, 4, 'float32')
  place = jnp.array([3], jnp.int32)
  for bad in (np.nan, np.inf):
    y, *_ = cpu.attend(q, k, v.at[0, 0, 2].set(bad), keys, values, place)
    assert not np.isfinite(y[0, 0, 2]) and np.isfinite(y[0, 0, 3])
    y, *_ = cpu.attend(q, k.at[0, 0, 2].set(np.nan), v, keys, values, place)
    assert np.all(np.isnan(y))


def test_other_dtypes_and_shapes_are_refused():
  q, k, v, keys, values, position_B = draw(1, 2, 1, 8, 4, 'float32')
  with pytest.raises(ValueError, match='bfloat16.*float32'):
    cpu.attend(q, k.astype('bfloat16'), v, keys, values, position_B)
  with pytest.raises(ValueError, match='int8'):
    cpu.attend(*(a.astype('int8') for a in (q, k, v, keys, values)), position_B)
  with pytest.raises(Exception, match='do not fit'):
    cpu.attend(q[..., :7], k, v, keys, values, position_B)
