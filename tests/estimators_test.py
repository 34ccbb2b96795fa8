"""Steps without a backward pass: what they move, keep, refuse, and share."""

import functools

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from qat import estimators
from qat import evaluate
from qat import health
from qat import objective
from qat import step as step_lib
from qat.nn import transformer
from qat.quant import composed
from qat.quant import qtensor
from qat.zo import perturb
from qat.zo import spsa
from tests import tiny

IN_PLACE = {
  **tiny.EXACT,
  'optim.estimator': 'spsa',
  'optim.optimizer': 'sgd',
  'optim.clip_norm': 0.0,
  'optim.schedule': 'constant',
  'optim.warmup_steps': 0,
  'optim.peak_lr': 1e-3,
  'model.n_layers': 2,
  'zo.clip': 0.0,
}
SCANNED = {'model.scan_layers': True, 'model.remat': 'block'}
QV = {'zo.perturbed': r'.*/(q|v)/kernel'}


@pytest.fixture(autouse=True, scope='module')
def quickly():
  with tiny.compiled_quickly():
    yield


@functools.cache
def compiled(method, fields=(), devices=1):
  config = tiny.config(method, {**IN_PLACE, **dict(fields)})
  return step_lib.compile_program(config, tiny.mesh(config, devices))


def program_of(method, fields, devices=1):
  return compiled(method, tuple(sorted(fields.items())), devices)


def batch_on(program, seed=0):
  return evaluate.put(tiny.batch(program.config, seed), program.mesh)


def train(program, steps, state=None, seed=0):
  """The state after some steps on one batch, and every step's metrics."""
  state, metrics = tiny.state(program) if state is None else state, []
  for _ in range(steps):
    state, measured = program.train_step(state, batch_on(program, seed))
    metrics.append(jax.device_get(measured))
  return jax.device_get(state), metrics


def by_path(tree):
  return {
    perturb.path_name(keys): leaf
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def bits(tree):
  return [(a.dtype, a.shape, a.tobytes()) for a in jax.tree.leaves(tree)]


def step_key(state):
  return jax.random.fold_in(perturb.wrap_key(state.rng), state.step)


def losses_beside(program, params, key, directions):
  """The losses of a step, of whole perturbed trees, and the directions."""
  model, config = program.model, program.config
  batch = batch_on(program)

  @jax.jit
  def loss(params):
    total, _ = objective.loss_sum(model, config, program.mesh, params, batch)
    return total / batch['targets'].size

  found = []
  for own in spsa.direction_keys(key, directions):
    z = perturb.direction(params, own, '.*')
    two = [
      loss(jax.tree.map(lambda w, e, s=s: w + s * config.zo.eps * e, params, z))
      for s in (1, -1)
    ]
    found.append((z, *map(float, two)))
  return found


@pytest.mark.parametrize(
  'fields',
  [
    {'optim.scale_lr_ratio': 3.0, 'optim.scales': '.*/down/kernel'},
    {**SCANNED, 'optim.accumulate': 4},
    pytest.param(  # The default; float32 has less to subtract.
      {**SCANNED, 'zo.eps': 1e-3}, marks=pytest.mark.slow
    ),
  ],
  ids=['unscanned', 'scanned, in parts', 'default eps'],
)
def test_a_step_in_place_is_the_rate_times_the_estimate(fields):
  program = program_of('fp', {'zo.directions': 2, 'zo.eps': 1e-2, **fields})
  optim, eps = program.config.optim, program.config.zo.eps
  state = jax.device_get(tiny.state(program))
  found, (metrics,) = train(program, 1)
  beside = losses_beside(program, state.params, step_key(state), 2)
  slopes = [(a - b) / (2 * eps) for _, a, b in beside]
  values = [x for _, a, b in beside for x in (a, b)]
  np.testing.assert_allclose(metrics['train/loss'], np.mean(values), rtol=1e-6)
  rms = np.sqrt(np.mean(np.square(slopes)))
  np.testing.assert_allclose(metrics['train/slope'], rms, rtol=1e-5 / eps)
  estimate = jax.tree.map(
    lambda a, b: slopes[0] / 2 * a + slopes[1] / 2 * b, *(z for z, *_ in beside)
  )
  new, old = by_path(found.params), by_path(state.params)
  for path, g in by_path(estimate).items():
    decay = 0.0 if 'norm' in path else optim.weight_decay
    ratio = 1.0
    if 'down' in path and optim.scale_lr_ratio == 3:
      decay, ratio = 0.0, 3.0
    moved = old[path] - ratio * 1e-3 * (g + decay * old[path])
    np.testing.assert_allclose(new[path], moved, rtol=0, atol=3e-8 / eps)
    assert np.abs(new[path] - old[path]).max() > 1e-4
  assert found.opt_state == () and found.step == 1
  np.testing.assert_array_equal(found.rng, state.rng)
  assert metrics['train/lr'] == np.float32(1e-3) and 'healthy' in metrics


@pytest.mark.slow
def test_a_repeated_batch_is_learned_without_a_backward_pass():
  fields = {**SCANNED, 'zo.directions': 16, 'optim.peak_lr': 4e-3}
  program = program_of('integer', fields)
  _, metrics = train(program, 25)
  found = [m['train/loss'] for m in metrics]
  assert np.mean(found[-3:]) < np.mean(found[:3]) - 0.05
  assert all(m['healthy'] and m['train/clipped'] == 0 for m in metrics)
  assert len({float(m['train/slope']) for m in metrics}) == 25


def test_an_optimizer_gets_the_estimate_of_what_is_trained():
  fields = {'optim.optimizer': 'adamw', 'optim.weight_decay': 0.0, **QV}
  program = program_of('integer', fields)
  state = jax.device_get(tiny.state(program))
  found, (metrics,) = train(program, 1)
  names = {f'block_{i}/attn/{n}/kernel' for i in (0, 1) for n in 'qv'}
  adam = found.opt_state.inner_state[1]
  assert by_path(adam.mu).keys() == by_path(adam.nu).keys() == names
  trained = estimators.split(program.config, state.params)[0]
  (key,) = spsa.direction_keys(step_key(state), 1)
  directions = by_path(perturb.direction(trained, key, '.*'))
  old, new = by_path(state.params), by_path(found.params)
  for name in old:
    if name not in names:
      assert bits(old[name]) == bits(new[name])
      continue
    # A tenth of the gradient: the first moment's decay is 0.9.
    slope = by_path(adam.mu)[name] / 0.1 / directions[name]
    np.testing.assert_allclose(np.abs(slope), metrics['train/slope'], rtol=1e-4)
    np.testing.assert_allclose(
      np.abs(new[name] - old[name]), 1e-3, rtol=0.05, atol=1e-5
    )


@pytest.mark.slow
def test_forward_mode_has_the_slope_of_the_gradient():
  fields = {
    'optim.estimator': 'forward',
    'optim.accumulate': 2,
    'model.n_layers': 1,
  }
  program = program_of('bitnet', fields)
  state = jax.device_get(tiny.state(program))
  _, (metrics,) = train(program, 1)
  batch = batch_on(program)

  def loss(params):
    total, _ = objective.loss_sum(
      program.model, program.config, program.mesh, params, batch
    )
    return total / batch['targets'].size

  value, gradient = jax.jit(jax.value_and_grad(loss))(state.params)
  (key,) = spsa.direction_keys(step_key(state), 1)
  z = perturb.direction(state.params, key, '.*')
  slope = sum(
    np.vdot(a, b)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(z), strict=True)
  )
  np.testing.assert_allclose(metrics['train/loss'], value, rtol=1e-4)
  np.testing.assert_allclose(metrics['train/slope'], abs(slope), rtol=0.01)


def with_quantized(model, params):
  """The tree with every matrix of the feed-forward layers frozen, in codes."""

  def one(path, leaf):
    name = perturb.path_name(path)
    if 'ffn' not in name or not name.endswith('kernel'):
      return leaf
    rule = model.rules.find(name.removesuffix('/kernel').replace('blocks', '_'))
    return rule.quantize({'kernel': leaf})

  return jax.tree_util.tree_map_with_path(one, params)


@pytest.mark.parametrize(
  'fields',
  [{**SCANNED, **QV}, {'optim.estimator': 'backprop', 'model.n_layers': 1}],
  ids=['spsa', 'backprop'],
)
def test_quantized_matrices_are_read_and_left_alone(fields):
  config = tiny.config('integer', {**IN_PLACE, **fields})
  mesh = tiny.mesh(config)
  model = transformer.build(config, 'cpu', 1)
  fresh = jax.jit(step_lib.initial_state(config, model))()
  params = jax.jit(functools.partial(with_quantized, model))(fresh.params)
  state = fresh._replace(
    params=params, opt_state=estimators.optimizer_state(config, params)
  )
  before = jax.device_get(state.params)
  batch = evaluate.put(tiny.batch(config), mesh)
  step = jax.jit(step_lib.make_train_step(config, model, mesh))
  state, metrics = step(state, batch)
  assert metrics['healthy'] and np.isfinite(metrics['train/loss'])
  after = jax.device_get(state.params)
  is_leaf = composed.is_quantized
  assert jax.tree.structure(before) == jax.tree.structure(after)
  count = 0
  for path, leaf in jax.tree_util.tree_leaves_with_path(
    before, is_leaf=is_leaf
  ):
    now = functools.reduce(lambda tree, key: tree[key.key], path, after)
    name = perturb.path_name(path)
    if isinstance(leaf, qtensor.QTensor):
      count += 1
    elif estimators.is_trained(config, name):
      assert bits(now) != bits(leaf)
      continue
    assert bits(now) == bits(leaf)
  assert count == 3


@pytest.mark.slow
def test_masters_in_bfloat16_learn_and_are_evaluated():
  kernels = {'zo.perturbed': r'.*/kernel', 'zo.master': 'bfloat16'}
  fields = {'zo.directions': 16, 'optim.peak_lr': 4e-3, **kernels, **SCANNED}
  program = program_of('integer', fields)
  state, metrics = train(program, 12)
  for path, leaf in by_path(state.params).items():
    matrix = path.endswith(('kernel', 'embedding'))  # This one is not trained.
    assert leaf.dtype == (jnp.bfloat16 if matrix else np.float32)
  found = [m['train/loss'] for m in metrics]
  assert np.mean(found[-3:]) < np.mean(found[:3]) - 0.01
  codes = health.codes(state.params, program.model.rules)
  exact = jax.tree.map(lambda w: jnp.asarray(w, jnp.float32), state.params)
  expected = health.codes(exact, program.model.rules)
  assert len(codes) == 14
  assert bits(codes) == bits(expected)
  eval_step = evaluate.make_eval_step(
    program.config, program.model, program.mesh
  )
  batch = {**batch_on(program), 'weights': jnp.ones((8, 16))}
  nats = [
    float(eval_step(p, batch, jnp.ones(64)).nats) for p in (state.params, exact)
  ]
  np.testing.assert_allclose(nats[0], nats[1], rtol=1e-6)


@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_a_loss_that_is_not_finite_moves_nothing_for_good(value):
  program = program_of(
    'fp', {'zo.directions': 2, 'zo.eps': 1e-2, **SCANNED, 'optim.accumulate': 4}
  )
  good = jax.device_get(tiny.state(program))
  params = jax.tree.map(np.copy, good.params)
  params['blocks']['attn']['q']['kernel'][1, 2, 3] = value
  bad = good._replace(params=params)
  after, (metrics,) = train(program, 1, jax.tree.map(jnp.asarray, bad))
  assert not metrics['healthy'] and not after.healthy and after.step == 0
  assert bits(after.params) == bits(params)
  # Nor does anything move after it, though the parameters are sound again.
  later = jax.tree.map(jnp.asarray, good._replace(healthy=after.healthy))
  after, (metrics,) = train(program, 1, later)
  assert np.isfinite(metrics['train/loss']) and not metrics['healthy']
  assert bits(after.params) == bits(good.params)


@pytest.mark.parametrize(
  'scan', [pytest.param(False, marks=pytest.mark.slow), True]
)
def test_a_mesh_draws_the_same_noise(scan):
  fields = {'model.scan_layers': scan, 'optim.weight_decay': 0.0}
  alone = program_of('fp', fields)
  mesh = {'mesh.data': 2, 'mesh.fsdp': 4}
  split = program_of('fp', {**fields, **mesh}, devices=8)
  state = jax.device_get(tiny.state(alone))
  shardings = jax.tree.map(lambda leaf: leaf.sharding, split.abstract)
  directions = []
  for program, start in (
    (alone, jax.tree.map(jnp.asarray, state)),
    (split, jax.device_put(state, shardings)),
  ):
    after, (metrics,) = train(program, 1, start)
    scale = metrics['train/slope'] * metrics['train/lr']
    directions.append(
      jax.tree.map(
        lambda a, b, s=scale: (b - a) / s, after.params, state.params
      )
    )
  (key,) = spsa.direction_keys(step_key(state), 1)
  z = perturb.direction(state.params, key, '.*')
  sign = np.sign(
    np.vdot(*(t['final_norm']['scale'] for t in (directions[0], z)))
  )
  for found in directions:
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(sign * a, b, rtol=0, atol=2e-3),
      found,
      z,
    )


def test_a_run_on_a_grid_begins_and_stays_on_it():
  grid = 2.0**-16
  fields = {'zo.resolution': grid, 'optim.weight_decay': 0.0, **QV}
  program = program_of('fp', fields)
  start = jax.device_get(program.init())
  state, _ = train(program, 3, program.init())
  for at in (start, state):
    for path, leaf in by_path(at.params).items():
      on = (leaf / grid == np.round(leaf / grid)).all()
      assert on == bool('/q/' in path or '/v/' in path or 'norm' in path)
  assert bits(start.params) != bits(state.params)
