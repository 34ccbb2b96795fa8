"""Attention to cached keys and values against float64, token by token."""

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from pallas_kernels import native
from qat.nn import kv_cache
from qat.quant import activations
from tests import jaxprs

FORMS = [False]
if native.variants():
  FORMS.append(True)


def slow(q_BTNH, k_BSKH, v_BSKH, start_B):
  """Query t of row b sees the positions up to start_B[b] + t."""
  y_BTNH = np.zeros(q_BTNH.shape)
  group = q_BTNH.shape[2] // k_BSKH.shape[2]
  for b, t, n in np.ndindex(q_BTNH.shape[:3]):
    seen = slice(start_B[b] + t + 1)
    scores_S = k_BSKH[b, seen, n // group] @ q_BTNH[b, t, n]
    p_S = np.exp((scores_S - scores_S.max()) / np.sqrt(q_BTNH.shape[3]))
    y_BTNH[b, t, n] = p_S / p_S.sum() @ v_BSKH[b, seen, n // group]
  return y_BTNH


def draw(tokens, dtype, seed=0):
  """Two rows of a cache with room for 9 tokens, and some new ones."""
  rng = np.random.default_rng(seed)

  def normal(*shape):
    return jnp.asarray(rng.normal(size=shape), dtype)

  cache = kv_cache.Cache(normal(2, 9, 2, 8), normal(2, 9, 2, 8))
  new = [normal(2, tokens, heads, 8) for heads in (4, 2, 2)]
  return cache, new


@pytest.mark.parametrize('native_too', FORMS)
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('tokens', [1, 3])
@pytest.mark.parametrize('starts', [(4, 4), (5, 2)])
def test_new_tokens_are_added_and_attend(native_too, dtype, tokens, starts):
  cache, new = draw(tokens, dtype)
  positions = jnp.arange(tokens)[None] + jnp.array(starts)[:, None]
  if starts[0] == starts[1]:
    positions = positions[0]
  found, longer = jax.jit(kv_cache.Cache.attend, static_argnums=5)(
    cache, *new, positions, native_too
  )
  for old, there, added in zip(cache, longer, new[1:], strict=True):
    expected = np.array(old)
    for b, start in enumerate(starts):
      expected[b, start : start + tokens] = added[b]
    np.testing.assert_array_equal(there, expected)
  expected = slow(*map(np.float64, (new[0], *longer)), starts)
  assert found.dtype == dtype
  tolerance = 2e-2 if dtype == 'bfloat16' else 1e-5
  np.testing.assert_allclose(
    np.float64(found), expected, rtol=tolerance, atol=tolerance
  )


@pytest.mark.parametrize('native_too', FORMS)
def test_a_cache_of_codes_is_read_as_they_stand_for(native_too):
  cache, new = draw(1, 'float32')
  codes = kv_cache.Cache(*map(activations.QUANTIZERS['int8'], cache))
  found, longer = codes.attend(*new, jnp.array([6]), native_too)
  floats = kv_cache.Cache(*(a.dequantize() for a in longer))
  expected = slow(*map(np.float64, (new[0], *floats)), (6, 6))
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not native.variants(), reason='no C++ extension')
def test_one_token_is_one_call_of_the_extension():
  for tokens, calls in ((1, 1), (2, 0)):
    cache, new = draw(tokens, 'bfloat16')

    def attend(cache, *new, tokens=tokens):
      return cache.attend(*new, jnp.arange(tokens), True)

    assert jaxprs.count('ffi_call', attend, cache, *new) == calls
