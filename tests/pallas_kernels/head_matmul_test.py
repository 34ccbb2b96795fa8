"""The head's product in C++ against float64, every variant of this machine."""

import hypothesis
from hypothesis import strategies as st
from jax import numpy as jnp
import numpy as np
import pytest

from pallas_kernels import native
from pallas_kernels.head_matmul import cpu

pytestmark = pytest.mark.skipif(
  not native.variants(), reason=f'the C++ extension is {native.status()}'
)


@pytest.mark.parametrize('variant', native.variants())
@hypothesis.given(
  st.integers(1, 9), st.integers(1, 140), st.integers(1, 70), st.integers(0, 9)
)
@hypothesis.settings(max_examples=15)
def test_it_is_the_product(variant, rows, inputs, outputs, seed):
  rng = np.random.default_rng(seed)
  x_MK = jnp.asarray(rng.normal(size=(rows, inputs)), jnp.bfloat16)
  w_NK = jnp.asarray(rng.normal(size=(outputs, inputs)), jnp.bfloat16)
  found = cpu.matmul(x_MK, w_NK, variant)
  expected = np.float64(x_MK) @ np.float64(w_NK).T
  size = np.abs(np.float64(x_MK)) @ np.abs(np.float64(w_NK)).T
  assert found.dtype == jnp.float32
  assert np.all(np.abs(found - expected) <= 1e-6 * inputs * size + 1e-7)


def test_rows_of_a_table():
  table_VD = jnp.asarray(
    np.random.default_rng(0).normal(size=(7, 5)), 'bfloat16'
  )
  ids = jnp.array([6, 0, 3, 3, 7, -1], jnp.int32)
  found = np.float32(cpu.rows(table_VD, ids))
  np.testing.assert_array_equal(found[:4], np.float32(table_VD)[[6, 0, 3, 3]])
  assert np.all(np.isnan(found[4:]))
