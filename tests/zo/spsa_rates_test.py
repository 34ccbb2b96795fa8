"""Steps along random directions: rates and decay by path, and no step."""

import jax
from jax import numpy as jnp
import numpy as np

from qat.zo import spsa

KEY = jax.random.key(5)
OPTIONS = spsa.Options(
  eps=1e-3, directions=1, clip=0.0, perturbed='.*', resolution=0.0
)
RATES = {'up': 0.1, 'down': 0.3}


def parameters():
  return {'up': jnp.linspace(-2, 3, 12), 'down': jnp.linspace(1, 2, 5)}


def test_each_path_has_its_rate_and_its_decay():
  params, slopes_q = parameters(), jnp.array([2.0])
  decays = {'up': jnp.float32(0.5), 'down': 0.0}
  estimate = spsa.along(params, KEY, slopes_q, '.*')
  found = spsa.move(params, KEY, slopes_q, RATES, OPTIONS, decays)
  for name, w in params.items():
    expected = w - RATES[name] * (estimate[name] + decays[name] * w)
    np.testing.assert_allclose(found[name], expected, rtol=1e-5, atol=1e-6)
    assert np.abs(expected - w).max() > 0.1


def test_several_directions_decay_together_as_one_does():
  params = {'w': jnp.linspace(1, 2, 8)}
  options = spsa.Options(1e-3, 4, 0.0, '.*', 0.0)
  found = spsa.move(params, KEY, jnp.zeros(4), 0.01, options, 0.3)
  np.testing.assert_allclose(found['w'], 0.997 * params['w'], rtol=1e-5)


def test_an_unhealthy_state_stays_and_is_measured():
  params = parameters()
  found, metrics = spsa.step(
    lambda p: jnp.sum(p['up']), params, KEY, RATES, OPTIONS, healthy=False
  )
  for name, w in params.items():
    assert np.asarray(w).tobytes() == np.asarray(found[name]).tobytes()
  assert not metrics['healthy'] and metrics['slope'] > 0
