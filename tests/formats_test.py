"""Every format of weights and inputs trains, in the models that use it."""

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from qat import evaluate
from qat import health
from qat import objective as objective_lib
from qat import step as step_lib
from qat.nn import capture
from qat.nn import transformer
from qat.quant import learned
from qat.quant import rules as rules_lib
from tests import tiny

STEPS = 6
GROUP = {'granularity': 'group', 'group_size': 16}
# A method, and fields of its one spec: all with a gradient of their own, and
# of those whose gradient passes straight through one of every kind.
FORMATS = {
  'onebit': ('onebit', {}),
  'lsq3': ('lsq', {'weight': 'lsq3'}),
  'lsq4': ('lsq', {'weight': 'lsq4', **GROUP}),
  'paretoq1': ('paretoq', {'weight': 'paretoq1'}),
  'paretoq_ternary': ('paretoq', {'weight': 'paretoq_ternary'}),
  'paretoq2': ('paretoq', {'weight': 'paretoq2'}),
  'lwc2': ('integer', {'weight': 'lwc2', 'activation': 'none', **GROUP}),
  'lwc3': ('integer', {'weight': 'lwc3', 'activation': 'int8_asym'}),
  'lwc4': ('integer', {'weight': 'lwc4', 'activation': 'int4_asym', **GROUP}),
  'lwc6': ('integer', {'weight': 'lwc6', 'activation': 'int6_asym'}),
  'lwc8': ('integer', {'weight': 'lwc8'}),
  'int4': ('integer', {'weight': 'int4'}),
  'int3_asym': ('integer', {'weight': 'int3_asym', **GROUP}),
  'fp8': ('integer', {'weight': 'fp8', 'activation_granularity': 'tensor'}),
  'binary_mix': ('integer', {'weight': 'binary_mix', 'activation': 'int4'}),
  'int4 inputs': (
    'integer',
    {'activation': 'int4', 'activation_granularity': 'group', **GROUP},
  ),
}
# Those that are others with another number of bits.
ALIKE = {'lwc6', 'lwc8'}
PARTS = [f'attn/{name}' for name in 'qkvo']
PARTS += [f'ffn/{name}' for name in ('gate', 'up', 'down')]


@pytest.fixture(autouse=True, scope='module')
def quickly():
  with tiny.compiled_quickly():
    yield


def fields_of(method, spec):
  return {f'quant.specs.{method}.{key}': value for key, value in spec.items()}


def trained(config, steps):
  """The states and metrics of steps on one batch."""
  program = step_lib.compile_program(config, tiny.mesh(config))
  batch = evaluate.put(tiny.batch(config), program.mesh)
  state, states, metrics = program.init(), [], []
  states.append(jax.device_get(state))
  for _ in range(steps):
    state, measured = program.train_step(state, batch)
    states.append(jax.device_get(state))
    metrics.append(jax.device_get(measured))
  return program, states, metrics


def check_it_trains(config):
  program, states, metrics = trained(config, STEPS)
  assert all(m['healthy'] for m in metrics)
  assert metrics[-1]['train/loss'] < metrics[0]['train/loss'] - 0.1
  # Everything that is learned moved, the scales too.
  for (keys, before), after in zip(
    jax.tree_util.tree_leaves_with_path(states[0].params),
    jax.tree.leaves(states[-1].params),
    strict=True,
  ):
    assert np.any(before != after), jax.tree_util.keystr(keys)
  # What looks at layers finds these.
  rules, params = program.model.rules, states[-1].params
  before = health.codes(states[-2].params, rules)
  measured = health.measure(params, before, rules)
  kernels = rules_lib.kernels(params)
  for path in kernels:
    assert 0 <= measured[f'health/flips/{path}'] <= 1
    assert np.isfinite(measured[f'health/scale/{path}'])


def test_all_learned_formats_are_here():
  assert {*FORMATS} >= {*learned.QUANTIZERS}


@pytest.mark.slow
@pytest.mark.parametrize('name', FORMATS)
def test_a_format_trains(name):
  method, spec = FORMATS[name]
  fields = fields_of(method, spec)
  check_it_trains(tiny.config(method, {**tiny.EXACT, **fields}))


def test_a_model_of_all_formats_trains():
  """One program in the place of many: each format has a matrix of its own."""
  config = tiny.config('fp', {**tiny.EXACT, 'model.n_layers': 2})
  names = [name for name in FORMATS if name not in ALIKE]
  paths = [f'block_{block}/{part}' for block in range(2) for part in PARTS]
  with config.unlocked():
    for path, name in zip(paths, names, strict=True):
      method, spec = FORMATS[name]
      own = tiny.config(method, fields_of(method, spec))
      config.quant.specs[name] = own.quant.specs[method]
      config.quant.rules = ((path, name), *config.quant.rules)
  check_it_trains(config)


def test_the_sensitivity_study_gets_what_learned_scales_make():
  config = tiny.config('lsq', tiny.EXACT)
  model = transformer.build(config, 'cpu', 1)
  tokens_BT = tiny.batch(config)['tokens'][:2]
  params = jax.jit(model.init)(jax.random.key(0), tokens_BT)['params']
  layers = rules_lib.layers(params)
  spec = model.rules.find('block_0/attn/q')
  records = list(capture.linear_records(model, params, tokens_BT))
  assert len(records) == len(layers)
  for record in records:
    expected = spec.quantize(layers[record.path]).dequantize()
    np.testing.assert_array_equal(record.quantized_KN, expected)


def test_learned_scales_train_in_stacks_of_experts():
  fields = {
    **tiny.EXACT,
    'quant.specs.narrow.weight': 'lsq4',
    'quant.specs.narrow.granularity': 'channel',
  }
  _, states, metrics = trained(tiny.config('pquant4', fields), STEPS)
  assert metrics[-1]['train/loss'] < metrics[0]['train/loss']
  narrow = [s.params['block_0']['ffn']['narrow']['up'] for s in states]
  assert narrow[0]['learned_scale'].shape == (4, 1, 8)
  assert np.any(narrow[0]['learned_scale'] != narrow[-1]['learned_scale'])


# --------------------------------------------------------------- annealing


def forward(method, mix, fields=None, params=None):
  """Hidden states of a model, with parameters that are given or its own."""
  config = tiny.config(method, {**tiny.EXACT, **(fields or {})})
  model = transformer.build(config, 'cpu', 1)
  tokens_BT = tiny.batch(config)['tokens'][:2]
  if params is None:
    params = jax.jit(model.init)(jax.random.key(0), tokens_BT)['params']
  apply = jax.jit(lambda params: model.apply(params, tokens_BT, mix=mix)[0])
  return params, np.asarray(apply({'params': params}))


@pytest.mark.slow
@pytest.mark.parametrize('method', ['pquant4', 'lsq', 'paretoq'])
def test_without_its_share_a_model_is_in_full_precision(method):
  full = {'weight': 'none', 'activation': 'none'}
  names = {'pquant4': ('narrow', 'binary')}
  unquantized = {}
  for name in names.get(method, (method,)):
    unquantized |= fields_of(name, full)
  params, annealed = forward(method, jnp.float32(0))
  _, expected = forward(method, None, unquantized, params)
  np.testing.assert_array_equal(annealed, expected)
  # And with all of it, it is quantized: apart from the order of roundings.
  _, whole = forward(method, jnp.float32(1), params=params)
  _, quantized = forward(method, None, params=params)
  size = np.abs(quantized).max()
  close = np.abs(whole - quantized) < 1e-3 * size
  assert close.mean() > 0.9  # A value on an edge may fall to the other code.
  assert np.abs(annealed - quantized).max() > 1e-2 * size


@pytest.mark.slow
def test_the_share_follows_the_schedule_and_is_logged():
  anneal = {'shape': 'linear', 'start_step': 2, 'steps': 2}
  fields = {f'quant.anneal.{key}': value for key, value in anneal.items()}
  fields = {**tiny.EXACT, **fields}
  program, states, metrics = trained(tiny.config('bitnet', fields), 6)
  shares = [m['train/quantization'] for m in metrics]
  np.testing.assert_allclose(shares, [0, 0, 0, 0.5, 1, 1])
  assert metrics[-1]['train/loss'] < metrics[0]['train/loss']
  # The first steps are those of a model in full precision.
  full = {**tiny.EXACT, **fields_of('binary', {'weight': 'none'})}
  full |= fields_of('binary', {'activation': 'none'})
  other = tiny.config('bitnet', full)
  _, _, plain = trained(other, 3)
  for a, b in zip(metrics, plain, strict=False):
    np.testing.assert_allclose(a['train/loss'], b['train/loss'], rtol=1e-5)
    assert 'train/quantization' not in b
  # Evaluation of the first state is quantized, though training was not.
  batch = evaluate.put(tiny.batch(program.config), program.mesh)
  evaluated, _ = objective_lib.loss_sum(
    program.model, program.config, program.mesh, states[0].params, batch
  )
  loss = evaluated / batch['targets'].size
  assert abs(loss - metrics[0]['train/loss']) > 1e-3
