"""What is reported about low-bit weights, against NumPy."""

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from qat import health
from qat.nn import transformer
from qat.quant import rules as rules_lib
from tests import tiny

BINARY = rules_lib.Spec('binary', 'int8', 'tensor')
TERNARY = rules_lib.Spec('ternary', 'int8', 'tensor')
INT8 = rules_lib.Spec('int8', 'int8', 'channel')
NONE = rules_lib.Spec('none', 'none', 'tensor')
RULES = rules_lib.Rules(
  (('.*/a', BINARY), ('.*/b', TERNARY), ('.*/c', INT8), ('.*', NONE))
)


def make_params(seed: int):
  rng = np.random.default_rng(seed)

  def draw(*shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)

  return {
    'block_0': {
      'a': {'kernel': draw(16, 12)},
      'b': {'kernel': draw(16, 12)},
      'c': {'kernel': draw(3, 8, 6)},
      'full': {'kernel': draw(4, 4)},
      'ffn': {'alpha': jnp.float32(1.5), 'beta': jnp.float32(0.25)},
    }
  }


def test_measure_counts_flips_zeros_and_scales():
  old, new = make_params(0), make_params(1)
  # Half of the rows keep their weights.
  for name in 'abc':
    kept = old['block_0'][name]['kernel'][..., :4, :]
    kernel = new['block_0'][name]['kernel'].at[..., :4, :].set(kept)
    new['block_0'][name] = {'kernel': kernel}
  found = health.measure(new, health.codes(old, RULES), RULES)

  def binary(w):
    return np.where(w > w.mean(), 1, -1), np.abs(w).mean()

  def ternary(w):
    scale = np.abs(w).mean()
    return np.clip(np.round(w / scale), -1, 1), scale

  def int8(w):
    scale = np.abs(w).max(-2, keepdims=True) / 127
    return np.round(w / scale), scale.mean()

  expected = {'health/alpha/block_0': 1.5, 'health/beta/block_0': 0.25}
  for name, quantize in (('a', binary), ('b', ternary), ('c', int8)):
    before, _ = quantize(np.asarray(old['block_0'][name]['kernel']))
    after, scale = quantize(np.asarray(new['block_0'][name]['kernel']))
    expected[f'health/flips/block_0/{name}'] = np.mean(before != after)
    expected[f'health/scale/block_0/{name}'] = scale
    if name == 'b':
      expected['health/zeros/block_0/b'] = np.mean(after == 0)
  assert found.keys() == expected.keys()
  assert 0 < found['health/flips/block_0/a'] < 1
  for key, value in expected.items():
    np.testing.assert_allclose(found[key], value, rtol=1e-5, err_msg=key)


def test_nothing_flips_when_nothing_changes():
  params = make_params(0)
  found = health.measure(params, health.codes(params, RULES), RULES)
  flips = [v for k, v in found.items() if k.startswith('health/flips/')]
  assert len(flips) == 3 and not any(map(float, flips))


def test_codes_are_of_every_quantized_layer_alone():
  codes = health.codes(make_params(0), RULES)
  assert codes.keys() == {'block_0/a', 'block_0/b', 'block_0/c'}
  assert {c.dtype for c in codes.values()} == {jnp.dtype('int8')}


@pytest.fixture(scope='module')
def experts():
  """A pQuant model with 4 experts and 2 blocks, its parameters, a batch."""
  config = tiny.config('pquant4', {'model.n_layers': 2})
  model = transformer.build(config, 'cpu', 1)
  return model, tiny.params(model), tiny.batch(config)


def test_routers_are_named_and_add_up(experts):
  model, params, batch = experts
  sown = jax.jit(
    lambda p: model.apply({'params': p}, batch['tokens'], mutable=['router'])[1]
  )(params)
  found = health.routers(sown['router'])
  keys = {f'health/router_entropy/block_{b}' for b in range(2)}
  keys |= {
    f'health/expert_load/block_{b}/{e}' for b in range(2) for e in range(4)
  }
  for name in ('load_entropy', 'idle_experts'):
    keys |= {f'health/{name}/block_{b}' for b in range(2)}
  assert found.keys() == keys
  for b in range(2):
    loads = [found[f'health/expert_load/block_{b}/{e}'] for e in range(4)]
    np.testing.assert_allclose(sum(loads), 1, rtol=1e-5)
    assert 0 < found[f'health/router_entropy/block_{b}'] <= np.log(4) + 1e-5


@pytest.mark.parametrize(
  ('load', 'entropy', 'idle'),
  [
    ([0.25] * 4, np.log(4), 0),
    ([1, 0, 0, 0], 0, 0.75),
    ([0.5, 0.46, 0.02, 0.02], 0.8603, 0.5),
    ([0.5, 0.44, 0.03, 0.03], 0.9182, 0),
  ],
)
def test_experts_that_collapse_show(load, entropy, idle):
  sown = {'block_3': {'ffn': {'load': (jnp.array(load),)}}}
  found = health.routers(sown)
  assert found['health/load_entropy/block_3'] == pytest.approx(
    entropy, abs=1e-4
  )
  assert found['health/idle_experts/block_3'] == idle


def test_dropped_choices_are_named():
  sown = {'block_0': {'ffn': {'dropped': (jnp.array(0.125),)}}}
  assert health.routers(sown) == {'health/dropped/block_0': 0.125}


def outputs(model):
  def forward(params, batch):
    return model.apply(
      {'params': params}, batch['tokens'], capture_intermediates=True
    )[1]['intermediates']

  return forward


def no_gradient(params, batch):
  return params


def test_the_first_parameter_that_is_not_finite_is_named(experts):
  model, params, batch = experts
  params = jax.tree.map(lambda x: x, params)  # New dicts, the same arrays.
  kernel = params['block_1']['attn']['v']['kernel']
  params['block_1']['attn']['v']['kernel'] = kernel.at[1, 2].set(jnp.nan)
  found = health.first_non_finite(outputs(model), no_gradient, params, batch)
  assert found.endswith('parameter block_1/attn/v/kernel.')


@pytest.mark.parametrize('branch', ['wide', 'narrow'])
def test_the_first_output_that_is_not_finite_is_named(experts, branch):
  model, params, batch = experts
  params = jax.tree.map(lambda x: x, params)
  # Finite, but the product of gate and up is not; all that follows neither.
  for name in ('gate', 'up'):
    linear = params['block_1']['ffn'][branch][name]
    linear['kernel'] = jnp.full_like(linear['kernel'], 3e37)
  found = health.first_non_finite(outputs(model), no_gradient, params, batch)
  assert found.endswith(f'output of block_1/ffn/{branch}/down/norm.')


def test_outputs_are_looked_at_in_the_order_of_their_calls():
  def forward(params, batch):
    bad = {'__call__': (batch / 0,)}
    return {'embed': {'__call__': (batch,)}, 'block_2': bad, 'block_10': bad}

  found = health.first_non_finite(
    forward, no_gradient, {'a': jnp.ones(2)}, jnp.ones(2)
  )
  assert found.endswith('output of block_2.')


def test_the_first_gradient_that_is_not_finite_is_named():
  params = {'a': {'kernel': jnp.ones(2)}, 'b': {'kernel': jnp.zeros(2)}}

  def forward(params, batch):
    return {'a': {'__call__': (batch * params['a']['kernel'],)}}

  # sqrt is finite at 0, its derivative is not.
  gradient = jax.grad(
    lambda p, batch: jnp.sum(jnp.sqrt(p['b']['kernel']) + p['a']['kernel'])
  )
  found = health.first_non_finite(forward, gradient, params, jnp.ones(2))
  assert found.endswith('gradient of b/kernel.')


def test_finite_everywhere_is_said():
  params = {'a': {'kernel': jnp.ones(2)}}
  found = health.first_non_finite(
    lambda params, batch: {'__call__': (params['a']['kernel'],)},
    no_gradient,
    params,
    jnp.ones(2),
  )
  assert found == ('Computed again, every output and gradient of it is finite.')


def test_the_model_itself_has_a_name():
  found = health.first_non_finite(
    lambda params, batch: {'__call__': (batch / 0,)},
    no_gradient,
    {'a': jnp.ones(2)},
    jnp.ones(2),
  )
  assert found.endswith('output of the model.')
