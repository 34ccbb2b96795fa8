"""Estimates against true gradients, and steps: in place, undone, split."""

import jax
from jax import lax
from jax import numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from qat.zo import perturb
from qat.zo import rounding
from qat.zo import spsa

KEY = jax.random.key(11)
GRID = 2.0**-20


def options(**changes) -> spsa.Options:
  fields = dict(
    eps=1e-3, directions=1, clip=0.2, perturbed='.*', resolution=0.0
  )
  return spsa.Options(**fields | changes)


def vector(n: int, seed: int = 0) -> jax.Array:
  return jnp.asarray(np.random.default_rng(seed).normal(size=n), jnp.float32)


def flat(tree) -> np.ndarray:
  leaves = [np.float64(leaf).ravel() for leaf in jax.tree.leaves(tree)]
  return np.concatenate(leaves)


def same_bits(a, b):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def quadratic(params) -> jax.Array:
  """Its two-point slopes are exact, but for rounding."""
  curvature = jnp.linspace(0.5, 2, params['w'].size)
  return 0.5 * jnp.sum(curvature * jnp.square(params['w'] - 1))


@pytest.mark.parametrize(('d', 'n'), [(16, 64), (256, 64), (256, 1024)])
def test_on_a_quadratic_the_error_falls_as_expected(d, n):
  # E |g - gradient|^2 = (d + 1) / n |gradient|^2.
  params = {'w': vector(d)}
  true = flat(jax.grad(quadratic)(params))
  chosen = options(eps=0.1, directions=n, clip=0.0)
  estimate = jax.jit(lambda k: spsa.gradient(quadratic, params, k, chosen)[1])
  tries = 10
  errors = [
    np.square(flat(estimate(k)) - true).sum()
    for k in jax.random.split(KEY, tries)
  ]
  expected = (d + 1) / n * np.square(true).sum()
  spread = np.std(errors, ddof=1) / tries**0.5
  assert abs(np.mean(errors) - expected) < 4 * spread
  assert spread < 0.25 * expected


def network(params) -> jax.Array:
  """A loss of two layers, on eight examples."""
  x_BK = vector(24, 1).reshape(8, 3)
  y_B = vector(8, 2)
  h_BF = jnp.tanh(x_BK @ params['up'])
  return jnp.mean(jnp.square((h_BF @ params['down'])[:, 0] - y_B))


def small_network():
  return {
    'up': vector(30, 3).reshape(3, 10),
    'down': vector(10, 5).reshape(10, 1),
  }


def test_on_a_network_many_estimates_are_the_gradient():
  params = small_network()
  true = flat(jax.grad(network)(params))
  n, d = 8000, true.size
  measured, found = jax.jit(
    lambda: spsa.gradient(
      network, params, KEY, options(eps=3e-3, directions=n, clip=0.0)
    )
  )()
  error = np.linalg.norm(flat(found) - true) / np.linalg.norm(true)
  assert error < 1.3 * ((d + 1) / n) ** 0.5
  np.testing.assert_allclose(measured['loss'], network(params), rtol=1e-4)


def test_directions_are_averaged():
  params = small_network()
  chosen = options(directions=3)
  found, losses = jax.jit(
    lambda p: (
      spsa.gradient(network, p, KEY, chosen),
      spsa.losses(network, p, KEY, chosen),
    )
  )(params)
  expected = 0
  for j, key in enumerate(spsa.direction_keys(KEY, 3)):
    z = perturb.direction(params, key, '.*')
    two = [
      network(jax.tree.map(lambda w, e, s=s: w + s * 1e-3 * e, params, z))
      for s in (1, -1)
    ]
    np.testing.assert_allclose(losses[j], two, rtol=1e-6)
    expected += (losses[j][0] - losses[j][1]) / 2e-3 / 3 * flat(z)
  np.testing.assert_allclose(flat(found[1]), expected, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(found[0]['loss'], np.mean(losses), rtol=1e-6)


def test_a_step_follows_the_estimate():
  params, chosen = small_network(), options(directions=3)
  (measured, estimate), (found, metrics) = jax.jit(
    lambda p: (
      spsa.gradient(network, p, KEY, chosen),
      spsa.step(network, p, KEY, 0.25, chosen),
    )
  )(params)
  np.testing.assert_allclose(
    flat(found), flat(params) - 0.25 * flat(estimate), rtol=1e-5, atol=1e-6
  )
  assert metrics.pop('healthy') and metrics['clipped'] == 0
  assert metrics == measured


def test_only_chosen_parameters_move():
  params = small_network() | {'codes': jnp.ones((2, 2), jnp.int8)}
  chosen = options(perturbed='up')
  found, estimate = jax.jit(
    lambda p: (
      spsa.step(network, p, KEY, 0.25, chosen)[0],
      spsa.gradient(network, p, KEY, chosen)[1],
    )
  )(params)
  for name in ('down', 'codes'):
    same_bits(found[name], params[name])
    assert not estimate[name].any()
  assert (found['up'] != params['up']).all() and estimate['up'].all()


@pytest.mark.parametrize('directions', [1, 4])
def test_on_a_grid_the_negated_step_restores_every_bit(directions):
  chosen = options(directions=directions, resolution=GRID)
  params = rounding.snap(small_network(), '.*', GRID)
  slopes_q = vector(directions, 6)
  before = jax.tree.map(np.array, params)
  move = jax.jit(
    lambda p, rate: spsa.move(p, KEY, slopes_q, rate, chosen), donate_argnums=0
  )
  there = move(params, 0.01)
  assert all((there[name] != before[name]).all() for name in before)
  same_bits(move(there, -0.01), before)


def test_slopes_and_keys_replay_a_run():
  start, chosen = small_network(), options(directions=2)
  step = jax.jit(lambda p, k: spsa.step(network, p, k, 0.01, chosen)[0])
  slopes = jax.jit(
    lambda p, k: spsa.slopes(spsa.losses(network, p, k, chosen), chosen)
  )
  replay = jax.jit(lambda p, k, s: spsa.move(p, k, s, 0.01, chosen))
  params, seen = start, []
  for key in jax.random.split(KEY, 3):
    seen.append((key, slopes(params, key)))
    params = step(params, key)
  again = start
  for key, slopes_q in seen:
    again = replay(again, key, slopes_q)
  np.testing.assert_allclose(flat(again), flat(params), rtol=1e-6, atol=1e-6)


def test_slopes_are_clipped_where_losses_differ_too_much():
  # At 0.2 / eps: the difference counts as 0.4 at most.
  losses_q2 = jnp.float32([[1, 0.7], [2, 1.5], [0, 9]])
  found = spsa.slopes(losses_q2, options(eps=1e-3, clip=0.2))
  np.testing.assert_allclose(found, [150, 200, -200], rtol=1e-6)
  found = spsa.slopes(losses_q2, options(eps=1e-3, clip=0.0))
  np.testing.assert_allclose(found, [150, 250, -4500], rtol=1e-6)


def test_a_step_counts_what_it_clips():
  params = {'w': vector(4)}
  steep = lambda p: 1e6 * quadratic(p)  # noqa: E731
  chosen = options(directions=2)
  unclipped = options(clip=0.0)
  metrics, wild = jax.jit(
    lambda p: [
      spsa.step(steep, p, KEY, 1e-4, c)[1] for c in (chosen, unclipped)
    ]
  )(params)
  assert metrics['clipped'] == 1
  np.testing.assert_allclose(metrics['slope'], 200, rtol=1e-6)
  assert wild['clipped'] == 0 and wild['slope'] > 1e4


@pytest.mark.parametrize(
  ('bad', 'clip'), [(jnp.nan, 0.0), (jnp.nan, 0.2), (jnp.inf, 0.2)]
)
def test_a_loss_that_is_not_finite_shows_and_moves_nothing(bad, clip):
  params = {'w': vector(4), 'v': -jnp.zeros(3)}

  def loss(p):  # On one side only.
    return jnp.where(p['w'][0] > params['w'][0], bad, jnp.sum(p['w']))

  chosen = options(clip=clip, directions=2)
  (found, metrics), (measured, estimate) = jax.jit(
    lambda p: (
      spsa.step(loss, p, KEY, 0.1, chosen),
      spsa.gradient(loss, p, KEY, chosen),
    )
  )(params)
  same_bits(found, params)
  assert not metrics['healthy']
  assert not np.isfinite(metrics['loss']) and np.isnan(metrics['slope'])
  assert not np.isfinite(measured['loss']) and np.isnan(measured['slope'])
  assert np.isnan(flat(estimate)).all()


def test_bfloat16_parameters_descend_by_steps_they_cannot_hold():
  d = 64
  params = {'w': jnp.full(d, 2, jnp.bfloat16)}
  chosen = options(eps=0.05, clip=0.0)
  rate = 4e-5  # Of a slope of about 10: a twentieth of a neighbour's distance.

  def run(params, move):
    def one(p, key):
      return move(p, key), quadratic(p)

    return lax.scan(one, params, jax.random.split(KEY, 1500))

  def nearest(p, key):
    estimate = spsa.gradient(quadratic, p, key, chosen)[1]
    return jax.tree.map(
      lambda w, g: (w.astype(jnp.float32) - rate * g).astype(w.dtype),
      p,
      estimate,
    )

  def stochastic(p, key):
    return spsa.step(quadratic, p, key, rate, chosen)[0]

  end, losses = jax.jit(lambda p: run(p, stochastic))(params)
  _, without = jax.jit(lambda p: run(p, nearest))(params)
  exact = jax.tree.map(lambda w: w.astype(jnp.float32), params)
  _, expected = jax.jit(lambda p: run(p, stochastic))(exact)
  assert end['w'].dtype == jnp.bfloat16
  gained = expected[0] - expected[-1]
  assert gained > 0.1 * expected[0]
  assert abs(losses[-1] - expected[-1]) < 0.15 * gained
  assert without[0] - without[-1] < 0.01 * gained


def test_a_slope_beyond_float32_moves_nothing():
  params = {'w': vector(4)}
  huge = lambda p: 3e38 * jnp.sign(p['w'][0] - params['w'][0])  # noqa: E731
  found, metrics = spsa.step(huge, params, KEY, 0.1, options(clip=0.0))
  same_bits(found, params)
  assert not metrics['healthy'] and not np.isfinite(metrics['slope'])


def stack(layers: int, d: int) -> dict:
  kernel = 0.1 * vector(layers * d * d).reshape(layers, d, d)
  return {'blocks': {'kernel': kernel}, 'head': 0.1 * vector(d)}


def deep(params) -> jax.Array:
  """A loss that scans over layers; its sum has one result in any order."""

  def layer(x_D, block):
    block = perturb.read(block)
    return jnp.tanh(x_D @ jnp.sign(block['kernel'])), None

  head_D = perturb.read(params['head'])
  x_D, _ = lax.scan(layer, jnp.ones(head_D.size), params['blocks'])
  return jnp.sum(jnp.round(16 * (x_D + 8 * head_D))) / 64


def test_a_lazy_loss_sees_the_same_parameters():
  params, chosen = stack(3, 8), options(eps=0.1, directions=2)
  eager, lazy = jax.jit(
    lambda p: [spsa.losses(deep, p, KEY, chosen, lazy) for lazy in (0, 1)]
  )(params)
  np.testing.assert_array_equal(lazy, eager)
  assert len(np.unique(lazy)) > 1


def test_one_copy_of_the_parameters_lives():
  params = stack(layers=32, d=64)
  size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
  for chosen in (options(directions=2), options(resolution=GRID)):
    analysis = (
      jax.jit(
        lambda p, k, c=chosen: spsa.step(deep, p, k, 0.1, c, lazy=True),
        donate_argnums=0,
      )
      .lower(params, KEY)
      .compile()
      .memory_analysis()
    )
    assert analysis.alias_size_in_bytes == size
    # Two of 32 layers: one as it is read, one as it is quantized.
    assert analysis.temp_size_in_bytes < 3 / 32 * size


@pytest.mark.parametrize('lazy', [False, True])
def test_split_and_whole_parameters_take_the_same_step(lazy):
  mesh = jax.make_mesh(
    (2, 4), ('data', 'fsdp'), axis_types=(jax.sharding.AxisType.Auto,) * 2
  )
  params, chosen = stack(3, 8), options(eps=0.1, directions=2, clip=0.0)
  specs = {'blocks': {'kernel': P(None, 'fsdp', 'data')}, 'head': P('fsdp')}
  places = jax.tree.map(
    lambda spec: NamedSharding(mesh, spec),
    specs,
    is_leaf=lambda spec: isinstance(spec, P),
  )

  def step(params, key):
    return spsa.step(deep, params, key, 1e-3, chosen, lazy)

  whole, expected = jax.jit(step)(params, KEY)
  split, metrics = jax.jit(step, out_shardings=(places, None))(
    jax.device_put(params, places), KEY
  )
  same_bits(metrics, expected)
  same_bits(split, whole)
  assert expected['slope'] > 0
  assert split['blocks']['kernel'].addressable_shards[0].data.size == 3 * 8


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'eps': 0.0}, 'eps=0.0 must be'),
    ({'eps': float('nan')}, 'eps=nan must be'),
    ({'directions': 0}, 'directions=0'),
    ({'clip': -1.0}, 'clip=-1.0'),
    ({'resolution': 0.3}, 'resolution=0.3 is no power of two'),
    ({'perturbed': '('}, "perturbed='\\('.*no regex"),
  ],
)
def test_options_that_make_no_step_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    options(**changes)
