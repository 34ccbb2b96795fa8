"""Exact slopes along the directions of the two-point estimate."""

import jax
from jax import lax
from jax import numpy as jnp
import numpy as np
import pytest

from qat.zo import forward_gradient
from qat.zo import perturb
from qat.zo import spsa

KEY = jax.random.key(5)


def params():
  rng = np.random.default_rng(0)
  return {
    'up': jnp.asarray(rng.normal(size=(3, 10)), jnp.float32),
    'down': jnp.asarray(rng.normal(size=(10,)), jnp.float32),
  }


def loss(p) -> jax.Array:
  return jnp.mean(jnp.square(jnp.tanh(jnp.ones((4, 3)) @ p['up']) @ p['down']))


def flat(tree) -> np.ndarray:
  leaves = [np.float64(leaf).ravel() for leaf in jax.tree.leaves(tree)]
  return np.concatenate(leaves)


def test_an_estimate_is_the_gradient_projected_on_each_direction():
  options = forward_gradient.Options(directions=3, perturbed='.*')
  found = jax.jit(lambda p: forward_gradient.gradient(loss, p, KEY, options))(
    params()
  )
  true = flat(jax.grad(loss)(params()))
  expected, squares = 0, []
  for key in spsa.direction_keys(KEY, 3):
    z = flat(perturb.direction(params(), key, '.*'))
    expected += (true @ z) * z / 3
    squares.append((true @ z) ** 2)
  np.testing.assert_allclose(flat(found[1]), expected, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(found[0]['loss'], loss(params()), rtol=1e-6)
  rms = np.sqrt(np.mean(squares))
  np.testing.assert_allclose(found[0]['slope'], rms, rtol=1e-4)


def test_two_points_close_together_agree_with_it():
  exactly = forward_gradient.Options(4, 'up')
  nearly = spsa.Options(1e-3, 4, 0.0, 'up', 0.0)
  exact, near = jax.jit(
    lambda p: (
      forward_gradient.gradient(loss, p, KEY, exactly)[1],
      spsa.gradient(loss, p, KEY, nearly)[1],
    )
  )(params())
  assert not exact['down'].any()
  np.testing.assert_allclose(
    flat(near), flat(exact), rtol=0, atol=2e-3 * np.abs(flat(exact)).max()
  )


@pytest.mark.parametrize('n', [256, 4096])
def test_the_error_falls_with_the_directions(n):
  true = flat(jax.grad(loss)(params()))
  options = forward_gradient.Options(directions=n, perturbed='.*')
  estimate = jax.jit(
    lambda k: forward_gradient.gradient(loss, params(), k, options)[1]
  )
  tries = 8
  errors = [
    np.square(flat(estimate(k)) - true).sum()
    for k in jax.random.split(KEY, tries)
  ]
  expected = (true.size + 1) / n * np.square(true).sum()
  spread = np.std(errors, ddof=1) / tries**0.5
  assert abs(np.mean(errors) - expected) < 4 * spread
  assert spread < 0.25 * expected


def test_a_straight_through_quantizer_has_a_slope():
  def quantized(p):
    w = p['down']
    return jnp.sum(jnp.square(w + lax.stop_gradient(jnp.round(w) - w)))

  options = forward_gradient.Options(directions=1, perturbed='down')
  found = forward_gradient.gradient(quantized, params(), KEY, options)[1]
  key = spsa.direction_keys(KEY, 1)[0]
  z = flat(perturb.direction(params(), key, 'down')['down'])
  slope = (2 * np.round(np.float64(params()['down']))) @ z
  np.testing.assert_allclose(flat(found['down']), slope * z, rtol=1e-4)


def test_a_reverse_mode_rule_is_refused():
  @jax.custom_vjp
  def straight(w):
    return jnp.round(w)

  straight.defvjp(lambda w: (jnp.round(w), None), lambda _, g: (g,))
  options = forward_gradient.Options(directions=1, perturbed='.*')
  with pytest.raises(TypeError, match='no forward mode'):
    forward_gradient.gradient(
      lambda p: jnp.sum(straight(p['up'])), params(), KEY, options
    )
