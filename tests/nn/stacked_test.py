"""Scanned layers: the same model, the same names, one block compiled."""

import functools

import jax
from jax import numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from qat import config as config_lib
from qat import finish
from qat import flops
from qat import health
from qat import objective as objective_lib
from qat import sharding
from qat import step as step_lib
from qat.infer import generate
from qat.nn import capture
from qat.nn import reference
from qat.nn import stacked
from qat.nn import transformer
from tests import jaxprs
from tests import tiny

LAYERS = 3


@pytest.fixture(autouse=True, scope='module')
def quickly():
  with tiny.compiled_quickly():
    yield


def config(method, scan, **fields):
  form = {'model.attention': 'xla', 'model.scan_layers': scan}
  form |= {'model.n_layers': LAYERS, **tiny.EXACT}
  return tiny.config(method, form | fields)


@functools.cache
def build(method, scan, remat='none'):
  made = config(method, scan, **{'model.remat': remat})
  return transformer.build(made, 'cpu', 1)


@functools.cache
def params_of(method):
  """Random parameters of the scanned model."""
  leaves, tree = jax.tree.flatten(
    transformer.abstract_params(build(method, True))
  )
  rng = np.random.default_rng(0)
  made = (
    jnp.float32(0.2 * rng.normal(size=p.shape) + (p.ndim < 3)) for p in leaves
  )
  return jax.tree.unflatten(tree, list(made))


def batch(method):
  return jax.tree.map(jnp.asarray, tiny.batch(config(method, True)))


def close(a, b, tolerance=1e-4):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(
      x, y, rtol=tolerance, atol=tolerance * np.abs(y).max()
    ),
    a,
    b,
  )


def test_a_tree_by_layer():
  tree = {
    'embed': np.ones(2),
    'blocks': {
      'z': {'x': (np.arange(6).reshape(2, 3),)},
      'a': np.array([5.0, 7.0]),
    },
    'head': 1,
  }
  found = stacked.unstacked(tree)
  assert list(found) == ['embed', 'block_0', 'block_1', 'head']
  assert list(found['block_1']) == ['z', 'a']  # Of calls: not sorted.
  np.testing.assert_array_equal(found['block_1']['z']['x'][0], [3, 4, 5])
  assert [found[f'block_{i}']['a'] for i in (0, 1)] == [5, 7]
  assert stacked.unstacked(found) == found
  assert stacked.unstacked({'blocks': {}}) == {}


def test_shapes_by_layer():
  leaf = jax.ShapeDtypeStruct((4, 2, 3), jnp.int8)
  found = stacked.unstacked({'blocks': {'a': leaf}})
  assert list(found) == [f'block_{i}' for i in range(4)]
  assert found['block_3']['a'] == jax.ShapeDtypeStruct((2, 3), jnp.int8)


def test_arrays_of_different_depth_are_no_stack():
  with pytest.raises(ValueError, match=r"'blocks' stacks \[2, 3\] layers"):
    stacked.unstacked({'blocks': {'a': np.ones(2), 'b': np.ones((3, 2))}})


def test_a_path_of_the_stack_is_that_of_its_first_layer():
  assert stacked.one_layer('blocks/attn/q') == 'block_0/attn/q'
  for path in ('block_3/attn/q', 'embed/embedding', 'my/blocks/a'):
    assert stacked.one_layer(path) == path


def test_layers_that_are_decided_differently_are_found():
  paths = ['embed', 'block_0/a', 'block_1/a', 'block_10/a', 'block_10/b']
  assert stacked.told_apart(paths, lambda path: path[-1]) is None
  assert stacked.told_apart(paths, lambda path: 'k_1/' in path) == (
    'block_0/a',
    'block_1/a',
  )
  assert stacked.told_apart(paths, lambda path: path == 'block_10/b') == (
    'block_0/b',
    'block_10/b',
  )


@pytest.mark.parametrize('method', ['fp', 'bitnet', 'pquant4'])
def test_both_forms_have_the_same_parameters(method):
  scanned = transformer.abstract_params(build(method, True))
  by_layer = transformer.abstract_params(build(method, False))
  kernel = scanned['blocks']['attn']['q']['kernel']
  assert kernel.shape == (LAYERS, 32, 32)
  assert stacked.unstacked(scanned) == by_layer
  if method == 'pquant4':
    kernel = scanned['blocks']['ffn']['narrow']['up']['kernel']
    assert kernel.shape == (LAYERS, 4, 32, 8)


@pytest.mark.parametrize(
  ('method', 'remat'),
  [
    pytest.param('fp', 'none', marks=pytest.mark.slow),
    pytest.param('bitnet', 'dots', marks=pytest.mark.slow),
    ('pquant', 'block'),
    pytest.param('pquant4', 'none', marks=pytest.mark.slow),
    pytest.param('pquant4', 'block', marks=pytest.mark.slow),
    pytest.param('pquant4', 'dots', marks=pytest.mark.slow),
  ],
)
def test_both_forms_have_the_same_loss_and_gradients(method, remat):
  params, inputs = params_of(method), batch(method)

  @functools.partial(jax.jit, static_argnums=0)
  def gradient(scan, params):
    made = config(method, scan)
    mesh = tiny.mesh(made)
    model = build(method, scan, remat if scan else 'none')

    def loss(params):
      total, sown = objective_lib.loss_sum(model, made, mesh, params, inputs)
      return total / inputs['targets'].size, stacked.unstacked(sown)

    return jax.value_and_grad(loss, has_aux=True)(params)

  (loss, sown), grads = gradient(True, params)
  expected, expected_grads = gradient(False, stacked.unstacked(params))
  close((loss, sown), expected, 1e-5)
  close(stacked.unstacked(grads), expected_grads)
  assert bool(sown) == (method == 'pquant4')


@pytest.mark.parametrize('method', ['bitnet', 'pquant'])
def test_the_textbook_form_reads_both(method):
  params, inputs = params_of(method), batch(method)
  model = build(method, True)
  made = config(method, True)
  found, _ = jax.jit(
    lambda p: objective_lib.loss_sum(model, made, tiny.mesh(made), p, inputs)
  )(params)
  expected = jax.jit(
    lambda p: reference.loss(p, inputs, made.model, model.rules)
  )(params)
  np.testing.assert_allclose(
    found / inputs['targets'].size, expected, rtol=1e-4
  )


def test_every_layer_starts_with_numbers_of_its_own():
  model = build('bitnet', True)
  params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8), int))
  kernels = params['params']['blocks']['ffn']['up']['kernel']
  assert kernels.std() == pytest.approx(0.1, rel=0.05)
  for i in range(LAYERS):
    for j in range(i):
      correlation = np.corrcoef(kernels[i].ravel(), kernels[j].ravel())[0, 1]
      assert abs(correlation) < 0.1


def test_one_block_is_traced_whatever_the_depth():
  def products(layers):
    made = config('bitnet', True, **{'model.n_layers': layers})
    model = transformer.build(made, 'cpu', 1)
    params = transformer.abstract_params(model)
    tokens = jax.ShapeDtypeStruct((1, 8), int)
    return jaxprs.count(
      'dot_general', lambda p, t: model.apply({'params': p}, t), params, tokens
    )

  assert products(2) == products(7) > 0


@pytest.mark.slow
def test_logs_name_layers_alike():
  found = {}
  for scan in (False, True):
    model = build('pquant4', scan)
    params = params_of('pquant4')
    changed = jax.tree.map(lambda p: -p, params)
    if not scan:
      params, changed = map(stacked.unstacked, (params, changed))
    made = config('pquant4', scan)
    _, routers = jax.jit(
      lambda p, model=model, made=made: objective_lib.loss_sum(
        model, made, tiny.mesh(made), p, batch('pquant4')
      )
    )(params)
    found[scan] = {
      **health.measure(changed, health.codes(params, model.rules), model.rules),
      **health.routers(routers),
      'bits': finish.bits_per_weight(params, model.rules),
      'flops': flops.train_flops_per_token(made, params),
    }
  close(found[True], found[False], 1e-5)
  assert 'health/flips/block_2/ffn/narrow/up' in found[True]
  assert 'health/expert_load/block_1/3' in found[True]
  assert found[True]['health/flips/block_0/attn/q'] > 0.9


def test_records_of_the_sensitivity_study_are_alike():
  tokens = batch('pquant4')['tokens']
  params = params_of('pquant4')
  found, expected = (
    list(capture.linear_records(build('pquant4', scan), p, tokens))
    for scan, p in ((True, params), (False, stacked.unstacked(params)))
  )
  assert [r.path for r in found] == [r.path for r in expected]
  assert len({r.path for r in found}) == LAYERS * (4 + 3 + 4 * 3)
  for a, b in zip(found, expected, strict=True):
    arrays = [(r.x_MK, r.latent_KN, r.quantized_KN) for r in (a, b)]
    close(*arrays)


@pytest.mark.slow
def test_generation_takes_the_other_form():
  model, params = build('bitnet', True), params_of('bitnet')
  tokens = batch('bitnet')['tokens'][:2]
  with pytest.raises(ValueError, match=r'transformer\.unscanned'):
    model.apply({'params': params}, tokens, generate.empty_caches(model, 2, 20))
  other, by_layer = transformer.unscanned(model, params)
  assert other == build('bitnet', False)
  assert transformer.unscanned(other, by_layer) == (other, by_layer)
  found, expected = (
    jax.jit(lambda p, m=m: m.apply({'params': p}, tokens, method='logits')[0])(
      p
    )
    for m, p in ((other, by_layer), (model, params))
  )
  close(found, expected)
  options = dict(tokens=3, temperature=0.0, top_k=0, top_p=1.0, seed=0, stop=-1)
  new = list(generate.generate(other, by_layer, [1, 2], **options))
  assert len(new) == 3


@pytest.mark.parametrize(
  ('fields', 'expected'),
  [
    (
      {'quant.rules': (('block_1/ffn/.*', 'other'), ('.*', 'binary'))},
      "quant.rules: block_0/ffn/down ('.*') and block_1/ffn/down"
      " ('block_1/ffn/.*')",
    ),
    (
      {'optim.no_decay': '.*norm.*|block_2/.*'},
      "optim.no_decay='.*norm.*|block_2/.*'",
    ),
  ],
)
def test_layers_that_differ_cannot_be_scanned(fields, expected):
  def made(scan):
    changed = config('bitnet', scan).unlock()
    changed.quant.specs.other = changed.quant.specs.binary.to_dict()
    changed.quant.specs.other.weight = 'ternary'
    changed.update_from_flattened_dict(fields)
    return changed.lock()

  config_lib.check(made(False), devices=1)
  config_lib.check(config('pquant4', True), devices=8)
  with pytest.raises(config_lib.ConfigError) as error:
    config_lib.check(made(True), devices=1)
  assert expected in str(error.value)
  assert 'model.scan_layers=True' in str(error.value)
  assert 'set it to False' in str(error.value)


def test_the_axis_of_layers_is_never_split():
  made = config('pquant4', True, **{'mesh.data': 2, 'mesh.fsdp': 4})
  mesh = tiny.mesh(made, 8)
  with jax.set_mesh(mesh):
    shapes = transformer.abstract_params(build('pquant4', True))
    by_layer = transformer.abstract_params(build('pquant4', False))
  found = sharding.state_shardings(mesh, shapes, shapes)
  expected = sharding.state_shardings(mesh, by_layer, by_layer)
  split = 0
  for where, other in zip(
    jax.tree.leaves(found['blocks']),
    jax.tree.leaves(expected['block_1']),
    strict=True,
  ):
    assert where.spec == P(None, *other.spec)
    split += 'fsdp' in where.spec
  assert split == 4 + 3 + 3 + 1


@pytest.mark.slow
def test_a_mesh_trains_a_scanned_model_like_one_device():
  fields = {'model.remat': 'dots', 'optim.accumulate': 1}
  axes = {'mesh.data': 2, 'mesh.fsdp': 4}
  results = []
  for scan, devices in ((True, 8), (False, 1)):
    made = config('pquant4', scan, **fields, **(axes if devices == 8 else {}))
    mesh = tiny.mesh(made, devices)
    program = step_lib.compile_program(made, mesh)
    params = jax.tree.map(jnp.copy, params_of('pquant4'))  # It is donated.
    if not scan:
      params = stacked.unstacked(params)
    state = program.init(params)
    state = jax.device_put(
      state, jax.tree.map(lambda leaf: leaf.sharding, program.abstract)
    )
    rows = jax.device_put(batch('pquant4'), step_lib.batch_sharding(mesh))
    state, metrics = sharding.in_turn(program.train_step(state, rows))
    metrics['router'] = stacked.unstacked(metrics['router'])
    results.append(jax.device_get((stacked.unstacked(state.params), metrics)))
  (params, metrics), (expected_params, expected_metrics) = results
  close(metrics, expected_metrics, 1e-3)
  # Adam's first step is +-lr: where a gradient is near 0 its sign may differ.
  differ = [
    np.mean(np.abs(a - b) > 1e-4)
    for a, b in zip(
      jax.tree.leaves(params), jax.tree.leaves(expected_params), strict=True
    )
  ]
  assert max(differ) < 0.05
