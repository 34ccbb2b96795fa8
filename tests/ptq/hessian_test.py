"""The factor of a Hessian against the inverse that it stands for."""

import dataclasses

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from qat.ptq import hessian
from qat.ptq import statistics
from tests import slow_gptq


def inputs(tokens=60, width=14, seed=0):
  rng = np.random.default_rng(seed)
  mix_KK = np.eye(width) + 0.3 * rng.normal(size=(width, width))
  return (rng.normal(size=(tokens, width)) @ mix_KK).astype(np.float32)


def of_gram(gram_KK):
  gram_KK = jnp.asarray(gram_KK, jnp.float32)
  return statistics.Statistics(
    gram_KK, jnp.float32(2), jnp.ones(gram_KK.shape[0])
  )


@pytest.mark.parametrize('act_order', [False, True])
def test_u_is_the_factor_of_the_inverse(act_order):
  x_MK = inputs() * np.linspace(0.5, 2, 14, dtype=np.float32)
  x_MK[:, 4] = 0
  found = hessian.factor(statistics.of(jnp.asarray(x_MK)), 0.01, act_order)
  H, dead_K, U = slow_gptq.hessian(x_MK, 0.01)
  order_K = np.arange(14)
  if act_order:
    order_K = np.argsort(-np.diag(H), kind='stable')
    U = np.linalg.cholesky(np.linalg.inv(H[order_K][:, order_K])).T
  np.testing.assert_array_equal(found.order_K, order_K)
  np.testing.assert_array_equal(found.dead_K, dead_K)
  np.testing.assert_allclose(found.diagonal_K, np.diag(U), rtol=1e-4)
  np.testing.assert_allclose(
    hessian.inverse_root(found), U, atol=1e-4 * np.abs(U).max()
  )
  R = np.linalg.inv(U)
  expected = np.triu(R / np.diag(R), 1)
  np.testing.assert_allclose(found.feedback_KK, expected, atol=1e-4)
  assert int(found.raises) == 0


def test_only_the_size_of_the_diagonal_depends_on_the_number_of_tokens():
  x_MK = inputs()
  once = hessian.factor(statistics.of(jnp.asarray(x_MK)), 0.01)
  tenfold = statistics.of(jnp.asarray(np.tile(x_MK, (10, 1))))
  again = hessian.factor(tenfold, 0.01)
  np.testing.assert_allclose(once.feedback_KK, again.feedback_KK, atol=1e-4)
  np.testing.assert_allclose(once.diagonal_K, again.diagonal_K, rtol=1e-4)


def test_damping_is_raised_until_there_is_a_factor():
  # The least eigenvalue is -0.025: 0.01 has to be added three times.
  gram_KK = np.array([[1, 1.025], [1.025, 1]])
  found = hessian.factor(of_gram(gram_KK), 0.01)
  assert int(found.raises) == 2
  U = np.array(hessian.inverse_root(found), np.float64)
  damped_KK = gram_KK + 0.03 * np.eye(2)
  np.testing.assert_allclose(U.T @ U @ damped_KK, np.eye(2), atol=2e-2)


@pytest.mark.parametrize('act_order', [False, True])
def test_the_statistics_stay_and_may_be_on_the_host(act_order):
  made = statistics.of(jnp.asarray(inputs()))
  before = np.array(made.gram_KK)
  on_host = dataclasses.replace(made, gram_KK=np.array(before))
  found = [hessian.factor(s, 0.01, act_order) for s in (made, on_host, made)]
  for other in found[1:]:
    jax.tree.map(np.testing.assert_array_equal, found[0], other)
  np.testing.assert_array_equal(made.gram_KK, before)
  np.testing.assert_array_equal(on_host.gram_KK, before)


def test_a_factor_takes_the_place_of_the_gram_matrix():
  gram_KK = jnp.asarray(inputs().T @ inputs())
  numbers = jnp.float32(60), jnp.float32(0.01), jnp.int32(0)
  compiled = hessian.attempt.lower(gram_KK, *numbers, False).compile()
  memory = compiled.memory_analysis()
  assert memory.alias_size_in_bytes >= gram_KK.nbytes
  # The Hessian, and what is small.
  assert memory.temp_size_in_bytes < 2 * gram_KK.nbytes


def test_fewer_tokens_than_inputs_are_enough():
  found = hessian.factor(statistics.of(jnp.asarray(inputs(5, 40))), 0.01)
  assert np.all(np.isfinite(found.feedback_KK))


@pytest.mark.parametrize(
  'gram_KK', [[[1, 3], [3, 1]], [[1, np.nan], [np.nan, 1]]]
)
def test_what_damping_does_not_help_is_refused(gram_KK):
  with pytest.raises(ValueError, match=r'percdamp=0.01, added 151 times'):
    hessian.factor(of_gram(gram_KK), 0.01)


def test_no_tokens_are_refused():
  with pytest.raises(ValueError, match='tokens=0.0'):
    hessian.factor(statistics.empty(3), 0.01)


def test_another_width_is_refused():
  found = hessian.factor(statistics.of(jnp.asarray(inputs())), 0.01)
  assert hessian.factored(found, (14, 3), 0.01, False) is found
  for given in (found, statistics.of(jnp.asarray(inputs()))):
    with pytest.raises(ValueError, match=r'14 inputs .* \(15, 3\)'):
      hessian.factored(given, (15, 3), 0.01, False)


def test_inverse_root_is_for_jit_too():
  found = hessian.factor(statistics.of(jnp.asarray(inputs())), 0.01)
  np.testing.assert_allclose(
    jax.jit(hessian.inverse_root)(found),
    hessian.inverse_root(found),
    rtol=1e-5,
    atol=1e-6,
  )
