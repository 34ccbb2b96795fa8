"""One optimizer step: what it learns, refuses, and does alike on any mesh."""

import functools
import itertools
import re

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from qat import evaluate
from qat import step as step_lib
from tests import tiny

STEPS = 20
MESHES = {
  'data=8': {'mesh.data': 8},
  'fsdp=8': {'mesh.fsdp': 8},
  'data=2,fsdp=4': {'mesh.data': 2, 'mesh.fsdp': 4},
}


@pytest.fixture(autouse=True, scope='module')
def quickly():
  with tiny.compiled_quickly():
    yield


def compiled(method, fields=None, devices=1):
  config = tiny.config(method, {**tiny.EXACT, **(fields or {})})
  return step_lib.compile_program(config, tiny.mesh(config, devices))


def batch_on(program, seed=0):
  return evaluate.put(tiny.batch(program.config, seed), program.mesh)


def train(program, seeds, state):
  """Every state from `state` on, as NumPy, and every step's metrics."""
  states, metrics = [jax.device_get(state)], []
  for seed in seeds:
    state, measured = program.train_step(state, batch_on(program, seed))
    states.append(jax.device_get(state))
    metrics.append(jax.device_get(measured))
  return states, metrics


def losses(metrics):
  return np.array([m['train/loss'] for m in metrics])


@functools.cache
def on_one_device(method):
  """A program, and its states and metrics over STEPS different batches."""
  program = compiled(method)
  return program, *train(program, range(STEPS), program.init())


def moments(state):
  """First moments of Adam: after a step, they hold its gradient."""
  return state.opt_state.inner_state[1].mu


def norm(a):
  return np.linalg.norm(np.ravel(a))


def bits(tree):
  return [(a.dtype, a.shape, a.tobytes()) for a in jax.tree.leaves(tree)]


# ------------------------------------------------------------------- learning


@pytest.mark.parametrize(
  'method', ['fp', 'bitnet', 'b158', 'pquant', 'pquant4']
)
def test_a_repeated_batch_is_learned(method):
  program = on_one_device(method)[0]
  states, metrics = train(program, [0] * STEPS, program.init())
  found = losses(metrics)
  assert np.all(np.isfinite(found))
  # At the start close to a uniform guess, which the model then leaves.
  assert abs(found[0] - np.log(64)) < 0.5
  assert found[-1] < found[0] - 0.8
  assert all(m['healthy'] for m in metrics)
  last = states[-1]
  assert last.step == STEPS and last.healthy
  np.testing.assert_array_equal(last.rng, states[0].rng)
  assert {a.dtype for a in jax.tree.leaves(last.params)} == {np.dtype('f4')}


def test_the_log_has_what_the_update_used():
  program, _, metrics = on_one_device('bitnet')
  optim = program.config.optim
  for step, row in enumerate(metrics):
    expected = optim.peak_lr * min(step / 4, (60 - step) / (60 - 4))
    np.testing.assert_allclose(row['train/lr'], expected, rtol=1e-5)
    assert row['train/weight_decay'] == np.float32(0.1)
    assert row['train/grad_norm'] > 0


def test_the_seed_decides_about_the_parameters():
  program, (first, *_), _ = on_one_device('fp')
  config = tiny.config('fp', {**tiny.EXACT, 'seed': 1})
  other = jax.jit(step_lib.initial_state(config, program.model))()
  assert bits(program.init()) == bits(first)
  assert bits(other.params) != bits(first.params)


def test_micro_batches_make_the_step_of_the_whole_batch():
  # In full precision alone: elsewhere a value on the edge between two codes may
  # round to the other one.
  _, states, metrics = on_one_device('fp')
  parts = compiled('fp', {'optim.accumulate': 4})
  found, measured = train(parts, range(5), parts.init(states[0].params))
  np.testing.assert_allclose(losses(measured), losses(metrics)[:5], rtol=1e-6)
  for a, b in zip(measured, metrics[:5], strict=True):
    np.testing.assert_allclose(
      a['train/grad_norm'], b['train/grad_norm'], rtol=1e-5
    )
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6),
    found[-1],
    states[5],
  )


def test_the_balance_term_pulls_but_is_not_in_the_loss():
  _, (start, state, *_), (metrics, *_) = on_one_device('pquant4')
  pulled = compiled(
    'pquant4', {'model.balance_coef': 10.0, 'optim.accumulate': 2}
  )
  (_, other), (measured,) = train(pulled, [0], pulled.init(start.params))
  np.testing.assert_allclose(
    measured['train/loss'], metrics['train/loss'], rtol=1e-4
  )

  def pull(state):
    return norm(moments(state)['block_0']['ffn']['router'])

  assert pull(other) > 2 * pull(state)
  # What routers report of micro-batches is the mean over them.
  (load,), (parts,) = (
    m['router']['block_0']['ffn']['load'] for m in (metrics, measured)
  )
  np.testing.assert_allclose(parts, load, atol=0.02)
  np.testing.assert_allclose(np.sum(parts), 1, rtol=1e-5)


# ------------------------------------------------------------- random numbers


@pytest.mark.parametrize(
  'accumulate', [pytest.param(1, marks=pytest.mark.slow), 2]
)
def test_a_router_gets_other_noise_in_every_step(accumulate):
  fields = {
    'model.router_jitter': 0.5,
    'optim.accumulate': accumulate,
    'optim.warmup_steps': 0,
    'optim.peak_lr': 1e-12,  # The parameters stay, so that noise alone moves.
  }
  program = compiled('pquant4', fields)
  assert program.config.data.batch_size == 8
  _, first = train(program, [0, 0, 0], program.init())
  _, again = train(program, [0, 0, 0], program.init())
  np.testing.assert_array_equal(losses(first), losses(again))
  assert len(set(losses(first))) == 3
  # The noise of a step is its number's: a run that resumes draws the same.
  states, _ = train(program, [0, 0], program.init())
  state = jax.device_put(
    states[1], jax.tree.map(lambda a: a.sharding, program.abstract)
  )
  _, resumed = train(program, [0], state)
  np.testing.assert_allclose(losses(resumed), losses(first)[1:2], rtol=1e-5)


# -------------------------------------------------------------- not finite


def test_a_poisoned_batch_changes_nothing_for_good():
  config = tiny.config('bitnet', tiny.EXACT)
  program = on_one_device('bitnet')[0]
  step = jax.jit(step_lib.make_train_step(config, program.model, program.mesh))
  weights = np.ones((8, 16), np.float32)
  good = {**batch_on(program), 'weights': jnp.asarray(weights)}
  weights[3, 5] = np.nan
  bad = {**good, 'weights': jnp.asarray(weights)}

  state, metrics = step(program.init(), good)
  assert metrics['healthy'] and state.step == 1
  before = jax.device_get(state)
  for batch in (bad, good, good):
    state, metrics = step(state, batch)
    after = jax.device_get(state)
    assert not metrics['healthy'] and not after.healthy
    assert bits(after._replace(healthy=before.healthy)) == bits(before)
  assert np.isfinite(metrics['train/loss'])  # Of the good one.


@pytest.mark.parametrize('value', [np.nan, np.inf])
@pytest.mark.parametrize(
  ('layer', 'name'), [('attn', 'q'), ('ffn', 'down'), (None, 'embed')]
)
def test_a_poisoned_parameter_changes_nothing(value, layer, name):
  program, states, _ = on_one_device('bitnet')
  params = jax.tree.map(np.copy, states[3].params)
  if layer is None:
    params['embed']['embedding'][:, 7] = value
  else:
    params['block_0'][layer][name]['kernel'][2, 3] = value
  before = states[3]._replace(params=params)
  on_device = jax.tree.map(jnp.asarray, before)
  state, metrics = program.train_step(on_device, batch_on(program))
  after = jax.device_get(state)
  assert not metrics['healthy'] and not after.healthy
  assert bits(after._replace(healthy=before.healthy)) == bits(before)


def test_a_gradient_that_overflows_under_a_finite_loss_changes_nothing():
  program, states, _ = on_one_device('fp')
  # Logits are large, and what multiplies the head is beyond float32's squares.
  params = jax.tree.map(np.copy, states[0].params)
  params['embed']['embedding'][:] *= 1e-10
  params['final_norm']['scale'][:] = 1e36
  before = states[0]._replace(params=params)
  state, metrics = program.train_step(
    jax.tree.map(jnp.asarray, before), batch_on(program)
  )
  assert np.isfinite(metrics['train/loss'])
  assert not np.isfinite(metrics['train/grad_norm'])
  assert not metrics['healthy']
  assert bits(state.params) == bits(before.params)


# ---------------------------------------------------------------------- meshes

# What a mesh may differ by, and why. Devices add the same float32 numbers in
# another order, so sums differ in their last bits: full precision stays within
# 1e-6 of one device over all steps. Rounding to codes amplifies that: a value
# on the edge between two codes (an int8 activation, a weight at the mean) falls
# to one side here and to the other there, and a run from there on is another
# run. So quantized models are compared step by step, from the state that one
# device had: no difference adds up, and most steps, where nothing lies on an
# edge, have to be as close as in full precision. Products are float32, since
# bfloat16 sums would make the edges wide. Measured: medians below 1e-6; the
# worst step 3e-5 in the loss and 1e-2 in one matrix's gradient.


METHODS_ON_MESHES = ('fp', 'bitnet', 'pquant', 'pquant8')
# Full precision, whose tolerance is narrow, and what others compile as well.
QUICK_PAIRS = {
  ('fp', 'data=2,fsdp=4'),
  ('bitnet', 'fsdp=8'),
  ('pquant', 'fsdp=8'),
}


@functools.cache
def compiled_for(method, mesh):
  return compiled(method, MESHES[mesh], devices=8)


@pytest.mark.parametrize(
  ('method', 'mesh'),
  [
    pytest.param(*pair, marks=() if pair in QUICK_PAIRS else pytest.mark.slow)
    for pair in itertools.product(METHODS_ON_MESHES, MESHES)
  ],
)
def test_a_mesh_trains_like_one_device(method, mesh):
  _, states, metrics = on_one_device(method)
  program = compiled_for(method, mesh)
  shardings = jax.tree.map(lambda leaf: leaf.sharding, program.abstract)

  # Alone, from the first state on.
  first = jax.device_put(states[0], shardings)
  own_states, own_metrics = train(program, range(STEPS), first)
  tolerance = 3e-6 if method == 'fp' else 0.05
  np.testing.assert_allclose(
    losses(own_metrics), losses(metrics), rtol=0, atol=tolerance
  )
  if method == 'fp':
    jax.tree.map(
      functools.partial(np.testing.assert_allclose, rtol=0, atol=3e-6),
      own_states[-1].params,
      states[-1].params,
    )

  # Step by step, from where one device was.
  differences = []
  for step in range(STEPS):
    found, measured = program.train_step(
      jax.device_put(states[step], shardings), batch_on(program, step)
    )
    check_split(found, program.mesh.shape['fsdp'])
    loss = measured['train/loss'] - metrics[step]['train/loss']
    gradient = jax.tree.map(
      lambda a, b: (
        np.linalg.norm(np.ravel(a - b)) / np.linalg.norm(np.ravel(b))
      ),
      moments(jax.device_get(found)),
      moments(states[step + 1]),
    )
    worst = max(jax.tree.leaves(gradient))
    differences.append((abs(float(loss)), float(worst)))
  np.testing.assert_array_less(np.median(differences, 0), [2e-6, 1e-5])
  edge = [3e-6, 1e-5] if method == 'fp' else [1e-3, 0.1]
  np.testing.assert_array_less(np.max(differences, 0), edge)


def check_split(state, parts):
  """Every matrix and its moments really lie in pieces on the devices."""
  adam = state.opt_state.inner_state[1]
  for tree in (state.params, adam.mu, adam.nu):
    for leaf in jax.tree.leaves(tree):
      shards = leaf.addressable_shards
      expected = leaf.size // parts if leaf.ndim > 1 else leaf.size
      assert len(shards) == 8
      assert {shard.data.size for shard in shards} == {expected}


def test_a_mesh_starts_where_one_device_does():
  program = compiled_for('pquant', 'fsdp=8')
  state = program.init()
  assert bits(state) == bits(on_one_device('pquant')[1][0])
  check_split(state, parts=8)


def test_devices_exchange_codes_instead_of_float_weights():
  program = compiled_for('bitnet', 'fsdp=8')
  gathered = re.findall(
    r'= (\w+\[[\d,]*\])\S* all-gather\(', program.train_step.as_text()
  )
  kernels = {'32,32': 4, '32,48': 2, '48,32': 1}
  for shape, count in kernels.items():
    assert gathered.count(f's8[{shape}]') >= count
    assert f'f32[{shape}]' not in gathered


def test_a_compiled_program_holds_no_parameters():
  program = on_one_device('fp')[0]
  for leaf in jax.tree.leaves(program.abstract):
    assert isinstance(leaf, jax.ShapeDtypeStruct)
  assert jax.tree.structure(program.abstract) == jax.tree.structure(
    program.init()
  )
