"""float16 by arithmetic, against NumPy's conversion."""

import jax
from jax import numpy as jnp
import numpy as np

from qat.quant import float16


def test_nearest_is_the_conversion_there_and_back():
  rng = np.random.default_rng(0)
  values = rng.normal(size=4000) * 10.0 ** rng.uniform(-9, 5, 4000)
  values = values.astype(np.float32)
  edges = [0, 1e-8, 2.0**-24, 2.0**-14, 6.1e-5, 65504, -1e6, np.inf, -np.nan]
  values = np.concatenate([values, np.float32(edges)])
  with np.errstate(over='ignore'):
    expected = values.astype(np.float16).astype(np.float32)
  for apply in (float16.nearest, jax.jit(float16.nearest)):
    np.testing.assert_array_equal(apply(jnp.asarray(values)), expected)


def test_the_ends_of_float16():
  about = np.finfo(np.float16)
  assert float16.SMALLEST == about.smallest_subnormal
  assert float16.NORMAL == about.smallest_normal
