"""Cross-entropy in chunks against log-softmax in float64."""

import functools

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from qat.nn import loss
from tests import jaxprs

B, T, D, V = 2, 12, 4, 40


def inputs(seed=0):
  rng = np.random.default_rng(seed)
  x_BTD = rng.normal(size=(B, T, D)).astype(np.float32)
  head_VD = rng.normal(size=(V, D)).astype(np.float32)
  targets_BT = rng.integers(0, V, (B, T)).astype(np.int32)
  weights_BT = rng.uniform(0.2, 2, (B, T)).astype(np.float32)
  weights_BT[0, 3:5] = 0
  return x_BTD, head_VD, targets_BT, weights_BT


def slow(x_BTD, head_VD, targets_BT, weights_BT):
  """The sum, and its gradients by x and by the head, in float64."""
  x, head = np.float64(x_BTD), np.float64(head_VD)
  logits = x @ head.T
  logits -= logits.max(-1, keepdims=True)
  log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  hit = np.eye(V)[targets_BT]
  total = -(weights_BT * (log_p * hit).sum(-1)).sum()
  dlogits = (np.exp(log_p) - hit) * weights_BT[..., None]
  return total, dlogits @ head, np.einsum('btv,btd->vd', dlogits, x)


@functools.partial(jax.jit, static_argnums=(4, 5))
def value_and_gradients(x, head, targets, weights, chunk, dtype='float32'):
  return jax.value_and_grad(
    lambda x, head: loss.cross_entropy(
      x, head, targets, weights, chunk=chunk, dtype=dtype
    ),
    (0, 1),
  )(x, head)


def value(*args, chunk, dtype='float32'):
  return loss.cross_entropy(*args, chunk=chunk, dtype=dtype)


@pytest.mark.parametrize('chunk', [1, 3, 12])
def test_value_and_gradients_are_those_of_float64(chunk):
  args = inputs()
  found, (dx, dhead) = value_and_gradients(*args, chunk)
  expected, slow_dx, slow_dhead = slow(*args)
  assert found.dtype == jnp.float32 and found.shape == ()
  np.testing.assert_allclose(found, expected, rtol=1e-6)
  np.testing.assert_allclose(value(*args, chunk=chunk), found, rtol=1e-6)
  np.testing.assert_allclose(dx, slow_dx, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(dhead, slow_dhead, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('chunk', [5, 7, 64])
def test_a_chunk_that_does_not_divide_gives_the_same(chunk):
  args = inputs()
  np.testing.assert_allclose(
    value(*args, chunk=chunk), slow(*args)[0], rtol=1e-6
  )


def test_bfloat16_is_near():
  x_BTD, *rest = inputs()
  x_BTD = jnp.asarray(x_BTD, jnp.bfloat16)
  found, (dx, dhead) = value_and_gradients(x_BTD, *rest, 4, 'bfloat16')
  expected, slow_dx, slow_dhead = slow(x_BTD, *rest)
  assert found.dtype == jnp.float32
  assert dx.dtype == jnp.bfloat16 and dhead.dtype == jnp.float32
  assert float(found) == pytest.approx(expected, rel=2e-3)
  for actual, exact in ((dx, slow_dx), (dhead, slow_dhead)):
    error = np.abs(np.float64(actual) - exact).max()
    assert error < 0.01 * np.abs(exact).max()


def test_a_token_of_weight_0_is_left_out():
  x_BTD, head_VD, targets_BT, weights_BT = inputs()
  found = value_and_gradients(x_BTD, head_VD, targets_BT, weights_BT, 4)
  np.testing.assert_array_equal(found[1][0][weights_BT == 0], 0)
  other = np.where(weights_BT == 0, (targets_BT + 1) % V, targets_BT)
  again = value_and_gradients(x_BTD, head_VD, other, weights_BT, 4)
  jax.tree.map(np.testing.assert_array_equal, found, again)


def test_gradients_follow_what_the_loss_is_multiplied_by():
  args = inputs()
  _, (dx, dhead) = value_and_gradients(*args, 4)

  def objective(x, head):
    return 3 * value(x, head, *args[2:], chunk=4) ** 2

  total = float(value(*args, chunk=4))
  found = jax.grad(objective, (0, 1))(*args[:2])
  for actual, base in zip(found, (dx, dhead), strict=True):
    np.testing.assert_allclose(actual, 6 * total * base, rtol=1e-4, atol=1e-3)


def test_large_logits_stay_finite():
  x_BTD, *rest = inputs()
  found = value_and_gradients(1000 * x_BTD, *rest, 4)
  expected = slow(1000 * x_BTD, *rest)
  np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
  np.testing.assert_allclose(found[1][0], expected[1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('differentiate', [False, True])
def test_logits_of_a_chunk_are_all_that_lives(differentiate):
  args = inputs()
  f = functools.partial(value, chunk=3)
  if differentiate:
    f = jax.value_and_grad(f, (0, 1))
  assert jaxprs.largest(f, *args) == B * 3 * V
  whole = functools.partial(value, chunk=T)
  assert jaxprs.largest(whole, *args) == B * T * V


def test_a_target_outside_of_the_vocabulary_is_no_number():
  x_BTD, head_VD, targets_BT, weights_BT = inputs()
  targets_BT[1, 2] = V
  found = value(x_BTD, head_VD, targets_BT, weights_BT, chunk=4)
  assert np.isnan(found)


def test_equal_logits_cost_the_logarithm_of_the_vocabulary():
  _, head_VD, targets_BT, _ = inputs()
  x_BTD, ones_BT = np.zeros((B, T, D), np.float32), np.ones((B, T), np.float32)
  found = value(x_BTD, head_VD, targets_BT, ones_BT, chunk=4)
  assert float(found) == pytest.approx(B * T * np.log(V), rel=1e-6)


@pytest.mark.parametrize('chunk', [3, 5])
def test_nats_by_row_are_the_sums_of_rows(chunk):
  args = inputs()
  found = loss.nats_by_row(*args, chunk=chunk, dtype='float32')
  x, head, targets, weights = args
  expected = [
    slow(x[i : i + 1], head, targets[i : i + 1], weights[i : i + 1])[0]
    for i in range(B)
  ]
  np.testing.assert_allclose(found, expected, rtol=1e-6)
