"""What a run takes from another model, and what it refuses."""

import pathlib

from jax import numpy as jnp
import numpy as np
import pytest

from qat import config as config_lib
from qat import evaluate
from qat import initial
from qat.data import dataset as dataset_lib
from qat.infer import load
from qat.nn import stacked
from qat.nn import transformer
from qat.quant import rules
from tests import clean
from tests import starts
from tests import tiny


@pytest.fixture(scope='module', autouse=True)
def quickly():
  with tiny.compiled_quickly():
    yield


@pytest.fixture(scope='module')
def data(tmp_path_factory) -> dataset_lib.Dataset:
  path = tiny.dataset(tmp_path_factory.mktemp('data'))
  return dataset_lib.open_dataset(path)


@pytest.fixture(scope='module')
def source(tmp_path_factory, data):
  return starts.full(tmp_path_factory.mktemp('models') / 'full', data)


@pytest.fixture(scope='module')
def quantized(tmp_path_factory, data):
  return starts.quantized(tmp_path_factory.mktemp('models') / 'four', data)


def test_what_a_run_takes_and_what_is_its_own(source, data):
  mine = starts.get(
    'lsq', source, data, model__remat='block', model__loss_chunk=4
  )
  made = initial.resolve(mine, pathlib.Path('nowhere'))
  its = starts.source_config()
  for field in made.model:
    expected = mine if field in initial.OWN else its
    assert made.model[field] == expected.model[field], field
  assert made.quant == mine.quant and made.is_locked
  with mine.unlocked():
    mine.init.quant = True
  made = initial.resolve(mine, pathlib.Path('nowhere'))
  assert made.quant.rules == its.quant.rules
  assert made.quant.specs.to_dict() == its.quant.specs.to_dict()
  assert made.quant.anneal == mine.quant.anneal


@pytest.mark.parametrize('kind', ['source', 'quantized'])
def test_stacked_layers_compute_the_same(kind, data, request):
  found = []
  for scan in (False, True):
    config = starts.get(
      'fp',
      request.getfixturevalue(kind),
      data,
      model__scan_layers=scan,
      optim__estimator='spsa',
    )
    start = starts.find(config, data)
    config = initial.resolve(config, pathlib.Path('nowhere'))
    model = transformer.build(config, 'cpu', 1)
    step = evaluate.make_eval_step(config, model, tiny.mesh(config))
    batch = evaluate.put(
      tiny.batch(config) | {'weights': np.ones((8, 16), np.float32)},
      tiny.mesh(config),
    )
    sums = step(start.params, batch, jnp.ones(starts.VOCAB))
    found.append((start, float(sums.nats)))
  (plain, loss), (scanned, other) = found
  assert other == pytest.approx(loss, rel=1e-6)
  assert set(scanned.params) == {'blocks', 'embed', 'final_norm'} ^ (
    set() if 'head' not in plain.params else {'head'}
  )
  starts.same(stacked.unstacked(scanned.params), plain.params)
  assert bool(plain.described) == (kind == 'quantized')


def test_learned_scales_start_from_the_kernels(source, data):
  start = starts.find(starts.get('lsq', source, data), data)
  kernels = clean.params(starts.source_config())
  config = starts.get('lsq', source, data)
  spec = rules.make_rules(config.quant.rules, config.quant.specs).find(
    'block_1/attn/q'
  )
  layer = start.params['block_1']['attn']['q']
  kernel = kernels['block_1']['attn']['q']['kernel']
  np.testing.assert_array_equal(layer['kernel'], kernel)
  np.testing.assert_array_equal(
    layer['learned_scale'], spec.start(kernel)['learned_scale']
  )


def test_learned_scales_are_kept_where_the_same_is_learned(data, tmp_path):
  config = tiny.config('lsq', {'model.vocab_size': starts.VOCAB})
  params = clean.params(config)
  scale = params['block_0']['attn']['q']['learned_scale']
  path = starts.save(tmp_path / 'lsq', config, params, data)
  for method, fields, kept in (
    ('lsq', {}, True),
    # Of no meaning where a column has one scale.
    ('lsq', {'quant__specs__lsq__group_size': 16}, True),
    ('lsq', {'quant__specs__lsq__granularity': 'tensor'}, False),
    ('paretoq', {}, False),
  ):
    start = starts.find(starts.get(method, path, data, **fields), data)
    found = start.params['block_0']['attn']['q']['learned_scale']
    assert np.array_equal(found, scale) == kept
    # That something starts again is told.
    assert ('7 of its matrices' in start.words) != kept
  # Full precision has no use for them.
  start = starts.find(starts.get('fp', path, data), data)
  assert set(start.params['block_0']['attn']['q']) == {'kernel'}
  assert 'again' not in start.words


def test_models_that_cannot_be_started_from(source, data, tmp_path):
  with pytest.raises(
    config_lib.ConfigError, match="'nothing/here': .*holds no run"
  ):
    initial.resolve(starts.get('fp', 'nothing/here', data), tmp_path)
  with pytest.raises(config_lib.ConfigError, match=r'init.quant=True'):
    initial.resolve(starts.get('fp', '', data, init__quant=True), tmp_path)
  (tmp_path / 'other').mkdir()
  other = dataset_lib.open_dataset(tiny.dataset(tmp_path / 'other', seed=1))
  with pytest.raises(
    config_lib.ConfigError, match=f'--tokenizer {source}/tokenizer.json'
  ):
    starts.find(starts.get('fp', source, other), other)
  # Groups of 48 fit a model of width 48, which is not the one that is taken.
  fields = {
    'quant__specs__integer__granularity': 'group',
    'quant__specs__integer__group_size': 48,
  }
  config_lib.check(starts.get('integer', '', data, **fields), devices=1)
  with pytest.raises(config_lib.ConfigError, match='48'):
    starts.find(starts.get('integer', source, data, **fields), data)
  # Its own config is another's.
  config = starts.source_config(model__n_layers=1)
  path = starts.save(
    tmp_path / 'short', starts.source_config(), clean.params(config), data
  )
  with pytest.raises(
    config_lib.ConfigError, match='block_1/attn/k/kernel: mis'
  ):
    starts.find(starts.get('fp', path, data), data)


def test_parameters_of_another_shape_are_named(source, data):
  model = load.load_model(source, None)
  with pytest.raises(config_lib.ConfigError) as caught:
    initial.parameters(starts.get('fp', source, data), model)
  text = str(caught.value)
  assert 'block_0/attn/k/kernel: [32, 32] there, [48, 48] here' in text
  assert 'block_2/attn/k/kernel: missing there, [48, 48] here' in text


def test_quantized_matrices_are_not_trained_by_backprop(quantized, data):
  with pytest.raises(config_lib.ConfigError, match="'spsa'"):
    starts.find(starts.get('fp', quantized, data), data)
  with pytest.raises(config_lib.ConfigError, match='init.quant=True'):
    starts.find(
      starts.get('lsq', quantized, data, optim__estimator='spsa'), data
    )
