"""Sums over a layer's inputs."""

import jax
from jax import numpy as jnp
import numpy as np

from qat.ptq import statistics


def inputs(tokens=40, width=9, seed=0):
  rng = np.random.default_rng(seed)
  return rng.normal(size=(tokens, width)).astype(np.float32)


def test_sums_are_those_of_float64():
  x_MK = inputs()
  found = statistics.of(jnp.asarray(x_MK))
  x64_MK = x_MK.astype(np.float64)
  np.testing.assert_allclose(found.gram_KK, x64_MK.T @ x64_MK, atol=1e-4)
  assert float(found.tokens) == 40
  np.testing.assert_array_equal(found.absmax_K, np.abs(x_MK).max(0))
  assert found.inputs_SK is None


def test_batches_add_up_to_the_whole():
  x_MK = inputs()
  add = jax.jit(statistics.add)
  found = statistics.empty(9)
  for part_MK in (x_MK[:7], x_MK[7:14], x_MK[14:]):
    found = add(found, jnp.asarray(part_MK))
  whole = statistics.of(jnp.asarray(x_MK))
  np.testing.assert_allclose(found.gram_KK, whole.gram_KK, atol=1e-4)
  assert float(found.tokens) == float(whole.tokens)
  np.testing.assert_array_equal(found.absmax_K, whole.absmax_K)


def test_padding_changes_nothing_whatever_it_holds():
  x_MK = inputs()
  padded_MK = np.concatenate(
    [x_MK[:3], np.full((2, 9), np.nan), x_MK[3:], np.full((1, 9), np.inf)]
  ).astype(np.float32)
  weight_M = np.isfinite(padded_MK[:, 0]).astype(np.float32)
  found = statistics.of(jnp.asarray(padded_MK), jnp.asarray(weight_M), 50)
  whole = statistics.of(jnp.asarray(x_MK))
  np.testing.assert_allclose(found.gram_KK, whole.gram_KK, atol=1e-4)
  assert float(found.tokens) == 40
  np.testing.assert_array_equal(found.absmax_K, whole.absmax_K)
  np.testing.assert_array_equal(found.inputs_SK[:40], x_MK)
  np.testing.assert_array_equal(found.inputs_SK[40:], 0)


def test_a_weight_of_two_is_a_token_twice():
  x_MK = inputs()
  weight_M = np.where(np.arange(40) % 3 == 0, 2, 1).astype(np.float32)
  found = statistics.of(jnp.asarray(x_MK), jnp.asarray(weight_M))
  twice_MK = np.repeat(x_MK, weight_M.astype(int), 0)
  whole = statistics.of(jnp.asarray(twice_MK))
  np.testing.assert_allclose(found.gram_KK, whole.gram_KK, atol=1e-4)
  assert float(found.tokens) == float(whole.tokens)


def test_the_sample_is_of_the_first_rows():
  x_MK = inputs()
  found = statistics.of(jnp.asarray(x_MK), sample=5)
  np.testing.assert_array_equal(found.inputs_SK, x_MK[:5])
  later = statistics.add(found, jnp.asarray(x_MK))
  np.testing.assert_array_equal(later.inputs_SK, x_MK[:5])


def test_half_precision_inputs_are_summed_in_float32():
  x_MK = jnp.full((3000, 2), 1.0, jnp.bfloat16)
  found = statistics.of(x_MK, sample=1)
  np.testing.assert_array_equal(found.gram_KK, 3000)
  assert found.inputs_SK.dtype == jnp.float32
