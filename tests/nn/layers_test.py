"""RMSNorm against float64; linears that share, or do not share, an input."""

import flax.linen as nn
import jax
from jax import numpy as jnp
import numpy as np
import pytest

from qat.nn import layers
from qat.quant import dot
from qat.quant import rules as rules_lib
from tests import jaxprs

METHOD = dot.Method(int8=False, dtype='float32')
EPS = 1e-6
SPECS = {
  'full': dict(weight='none', activation='none', granularity='tensor'),
  'binary': dict(weight='binary', activation='int8', granularity='tensor'),
  'int8': dict(weight='int8', activation='int8', granularity='channel'),
  'weights': dict(weight='ternary', activation='none', granularity='tensor'),
}


def rules(*pairs):
  return rules_lib.make_rules(pairs, SPECS)


def normal(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def slow_norm(x, gain_D, eps):
  mean_square = (x * x).mean(-1, keepdims=True)
  return x / (mean_square + eps) ** 0.5 * jnp.broadcast_to(gain_D, x.shape)


class Readers(nn.Module):
  """Layers 'a', 'b', ... that read one input."""

  rules: rules_lib.Rules
  features: tuple[int, ...]
  norm_eps: float | None = None
  experts: int = 0

  @nn.compact
  def __call__(self, x):
    linears = [
      layers.Linear(n, self.rules, 0.02, self.norm_eps, self.experts, name=name)
      for name, n in zip('abcd', self.features, strict=False)
    ]
    return layers.project(x, linears, METHOD)


def init(model, x):
  """Random parameters; gains around 1."""
  shapes = jax.eval_shape(model.init, jax.random.key(0), x)['params']
  leaves, tree = jax.tree.flatten(shapes)
  params = [
    jnp.asarray(0.3 * normal(*p.shape, seed=i) + (p.ndim == 1))
    for i, p in enumerate(leaves)
  ]
  return jax.tree.unflatten(tree, params)


def expected_output(x, w, spec):
  """Dequantized input times dequantized weight, in float64."""
  x, w = jnp.asarray(x), jnp.asarray(w)
  if spec.activation != 'none':
    x = spec.quantize_input(x).dequantize()
  if spec.weight != 'none':
    w = spec.quantize({'kernel': w}).dequantize()
  return np.float64(x) @ np.float64(w)


@pytest.mark.parametrize(
  ('shape', 'eps'), [((6,), 1e-6), ((5, 6), 0.5), ((2, 3, 6), 1e-6)]
)
def test_rms_norm_and_its_gradient_are_autodiff_in_float64(shape, eps):
  x, gain_D, dy = normal(*shape), normal(6, seed=1), normal(*shape, seed=2)
  y, vjp = jax.vjp(lambda x, g: layers.rms_norm(x, g, eps), x, gain_D)
  found = (y, *vjp(dy))
  with jax.enable_x64(True):
    double = [jnp.asarray(np.float64(a)) for a in (x, gain_D, dy)]
    y, vjp = jax.vjp(lambda x, g: slow_norm(x, g, eps), *double[:2])
    expected = [np.asarray(a) for a in (y, *vjp(double[2]))]
    assert expected[0].dtype == np.float64
  for actual, value in zip(found, expected, strict=True):
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(actual, value, rtol=1e-5, atol=1e-6)


def test_rms_norm_computes_bfloat16_in_float32():
  x = jnp.asarray(normal(4, 512)).astype(jnp.bfloat16)
  gain_D, dy = normal(512, seed=1), x[::-1]
  y, vjp = jax.vjp(lambda x, g: layers.rms_norm(x, g, EPS), x, gain_D)
  dx, dgain_D = vjp(dy)
  assert y.dtype == dx.dtype == jnp.bfloat16
  assert dgain_D.dtype == jnp.float32
  x32, vjp = jax.vjp(
    lambda x, g: slow_norm(x, g, EPS), x.astype(jnp.float32), gain_D
  )
  expected = (x32, *vjp(dy.astype(jnp.float32)))
  for actual, value in zip((y, dx), expected, strict=False):
    np.testing.assert_array_equal(actual, value.astype(jnp.bfloat16))
  np.testing.assert_allclose(dgain_D, expected[2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_rms_norm_keeps_its_arguments_alone(dtype):
  x, gain_D = jnp.ones((8, 16), dtype), jnp.ones(16)
  vjp = jax.eval_shape(
    lambda x, g: jax.vjp(lambda x, g: layers.rms_norm(x, g, EPS), x, g)[1],
    x,
    gain_D,
  )
  kept = [(leaf.shape, leaf.dtype.name) for leaf in jax.tree.leaves(vjp)]
  assert sorted(kept) == [((8, 16), dtype), ((16,), 'float32')]


def test_rms_norm_of_zeros_is_zero_and_trains():
  y, vjp = jax.vjp(
    lambda x: layers.rms_norm(x, jnp.ones(4), EPS), jnp.zeros((2, 4))
  )
  np.testing.assert_array_equal(y, 0)
  np.testing.assert_allclose(vjp(jnp.ones((2, 4)))[0], EPS**-0.5, rtol=1e-5)


@pytest.mark.parametrize('name', SPECS)
def test_project_multiplies_each_layer_by_its_rule(name):
  x = normal(2, 3, 8)
  model = Readers(rules(('b', name), ('.*', 'full')), (5, 4))
  params = init(model, x)
  a, b = model.apply({'params': params}, x)
  assert a.shape == (2, 3, 5) and b.shape == (2, 3, 4)
  for y, layer in ((a, 'a'), (b, 'b')):
    spec = model.rules.find(layer)
    expected = expected_output(x, params[layer]['kernel'], spec)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


def test_layers_with_different_input_rules_have_different_inputs():
  x = normal(5, 8)
  model = Readers(
    rules(('a', 'binary'), ('b', 'weights'), ('.*', 'int8')), (4, 4, 4)
  )
  params = init(model, x)
  ys = model.apply({'params': params}, x)
  for y, layer in zip(ys, 'abc', strict=True):
    expected = expected_output(
      x, params[layer]['kernel'], model.rules.find(layer)
    )
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


def test_an_input_is_quantized_once_for_all_that_share_it():
  # A binary weight is not rounded, so every rounding is one of an input.
  x = normal(5, 8)
  for norm_eps, rounded in ((None, 1), (EPS, 3)):
    model = Readers(rules(('.*', 'binary')), (4, 4, 4), norm_eps)
    variables = model.init(jax.random.key(0), x)
    params = {'params': variables['params']}
    assert jaxprs.count('round', model.apply, params, x) == rounded


def test_layers_with_norms_of_their_own_have_their_own_inputs():
  x = normal(5, 8)
  model = Readers(rules(('.*', 'binary')), (4, 3), EPS)
  params = init(model, x)
  ys = model.apply({'params': params}, x)
  for y, layer in zip(ys, 'ab', strict=True):
    normed = slow_norm(jnp.asarray(x), params[layer]['norm']['scale'], EPS)
    expected = expected_output(
      normed, params[layer]['kernel'], model.rules.find(layer)
    )
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', ['binary', 'int8', 'full'])
def test_a_stack_applies_every_expert_to_every_token(name):
  x = normal(2, 3, 8)
  model = Readers(rules(('.*', name)), (5,), experts=4)
  params = init(model, x)
  (y,) = model.apply({'params': params}, x)
  kernel = params['a']['kernel']
  assert kernel.shape == (4, 8, 5) and y.shape == (2, 3, 4, 5)
  for i in range(4):
    expected = expected_output(x, kernel[i], model.rules.find('a'))
    np.testing.assert_allclose(y[..., i, :], expected, rtol=1e-5, atol=1e-5)


def test_what_a_layer_multiplies_is_kept_where_it_is_asked_for():
  x = normal(5, 8)
  model = Readers(rules(('a', 'binary'), ('.*', 'full')), (4, 4))
  variables = {'params': init(model, x)}
  sown = model.apply(variables, x, mutable=['inputs'])[1]['inputs']
  quantized = model.rules.find('a').quantize_input(jnp.asarray(x))
  np.testing.assert_array_equal(sown['a']['x'][0], quantized.dequantize())
  np.testing.assert_array_equal(sown['b']['x'][0], x)
  assert not model.apply(variables, x, mutable=['router'])[1]


@pytest.mark.parametrize('experts', [0, 3])
def test_what_a_quantizer_learns_starts_from_the_kernel(experts):
  specs = {
    'lsq': dict(weight='lsq3', activation='int8', granularity='channel'),
    'onebit': dict(weight='onebit', activation='none', granularity='channel'),
  }
  made = rules_lib.make_rules((('a', 'lsq'), ('b', 'onebit')), specs)
  model = Readers(made, (5, 4), experts=experts)
  x = normal(7, 8)
  params = model.init(jax.random.key(0), x)['params']
  found = rules_lib.layers(params)
  assert {*found['a']} == {'kernel', 'learned_scale'}
  assert {*found['b']} == {'kernel', 'gain_in', 'gain_out'}
  for (path, layer), y in zip(
    found.items(), model.apply({'params': params}, x), strict=True
  ):
    spec = made.find(path)
    for name, value in spec.start(layer['kernel']).items():
      np.testing.assert_allclose(layer[name], value, rtol=1e-6)
    source = jnp.asarray(x)
    if spec.activation != 'none':
      source = spec.quantize_input(source).dequantize()
    weight = spec.quantize(layer).dequantize()
    expected = np.einsum('mk,...kn->m...n', source, weight)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


def test_a_norm_without_parameters_ends_a_layer_whose_rule_has_one():
  specs = {
    name: dict(
      weight='onebit',
      activation='none',
      granularity='channel',
      output_norm=name == 'normed',
    )
    for name in ('normed', 'plain')
  }
  x = normal(2, 3, 8)
  made = rules_lib.make_rules((('a', 'normed'), ('.*', 'plain')), specs)
  model = Readers(made, (6, 6))
  params = model.init(jax.random.key(0), x)['params']
  assert {*params['a']} == {'kernel', 'gain_in', 'gain_out'}
  params['b'] = params['a']
  found, plain = model.apply({'params': params}, x)
  plain = 1e3 * np.float64(plain)  # Beside which the eps is nothing.
  params['a'] = {**params['a'], 'gain_out': 1e3 * params['a']['gain_out']}
  found = model.apply({'params': params}, x)[0]
  expected = plain - plain.mean(-1, keepdims=True)
  expected /= plain.std(-1, keepdims=True)
  np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
  ('fields', 'experts', 'message'),
  [
    (dict(granularity='group', group_size=3), 0, '^b: group_size=3 .* 8 inp'),
    (
      dict(activation_granularity='group', group_size=5),
      4,
      "^b: group_size=5 .*activation_granularity='token'",
    ),
    (dict(output_norm=True), 4, '^b is a stack of experts.*output_norm=False'),
  ],
)
def test_a_rule_that_does_not_fit_a_layer_names_it(fields, experts, message):
  specs = {'full': SPECS['full'], 'wrong': {**SPECS['binary'], **fields}}
  made = rules_lib.make_rules((('b', 'wrong'), ('.*', 'full')), specs)
  model = Readers(made, (4, 4), experts=experts)
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(model.init, jax.random.key(0), normal(5, 8))


def test_inputs_are_shared_only_by_rules_that_quantize_them_alike():
  x = normal(5, 8)
  x[2] *= 100
  specs = {
    name: {**SPECS['binary'], **fields}
    for name, fields in {
      'token': {},
      'tensor': dict(activation_granularity='tensor'),
      'group': dict(activation_granularity='group', group_size=2),
      'int4': dict(activation='int4'),
    }.items()
  }
  made = rules_lib.make_rules(list(zip('abcd', specs, strict=True)), specs)
  model = Readers(made, (4, 4, 4, 4))
  params = init(model, x)
  ys = model.apply({'params': params}, x)
  for y, layer in zip(ys, 'abcd', strict=True):
    expected = expected_output(x, params[layer]['kernel'], made.find(layer))
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-4)


def test_kernels_start_normal_and_gains_at_1():
  model = Readers(rules(('.*', 'binary')), (256,), EPS)
  params = model.init(jax.random.key(0), np.ones((1, 256), 'f4'))['params']
  kernel = params['a']['kernel']
  assert kernel.dtype == jnp.float32
  assert np.std(kernel) == pytest.approx(0.02, rel=0.02)
  assert abs(np.mean(kernel)) < 4 * 0.02 / 256
  np.testing.assert_array_equal(params['a']['norm']['scale'], np.ones(256))


def test_a_layer_no_rule_covers_is_named():
  model = Readers(rules(('a', 'full')), (4, 4))
  with pytest.raises(ValueError, match="covers 'b'"):
    model.init(jax.random.key(0), normal(5, 8))
