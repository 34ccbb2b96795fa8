"""Hidden states block by block against one pass of the whole model."""

import functools

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from qat.nn import transformer
from qat.ptq import calibrate
from tests import clean
from tests import tiny

OPT = dict(
  model__ffn='plain',
  model__activation='relu',
  model__norm_type='layer',
  model__bias='all',
  model__positions='learned',
  model__max_positions=16,
)


@pytest.fixture(scope='module', autouse=True)
def quickly():
  with tiny.compiled_quickly():
    yield


def calibration(config, params, rows=0):
  model = transformer.build(config, 'cpu', 1)
  made = calibrate.Calibration(
    model, params, clean.examples(), batch_size=4, rows=rows, seed=0
  )
  return model, made


@pytest.mark.parametrize('onward', [False, True])
@pytest.mark.parametrize('fields', [{}, OPT], ids=['llama', 'opt'])
def test_statistics_are_those_of_one_pass_over_all_blocks(fields, onward):
  config = clean.config(**fields)
  params = clean.params(config)
  model, made = calibration(config, params, rows=9)
  compiled = calibrate.advance._cache_size(), calibrate.observe._cache_size()
  names = [group.layers[0] for group in calibrate.groups(model.config)]
  for block in ('block_0', 'block_1'):
    found = made.statistics(params[block], names, block, onward=onward)
    if not onward:
      made.advance(params[block])
    assert list(found) and set(found) == set(names)
    for name, statistics in found.items():
      x_MK = clean.inputs(config, params, f'{block}/{name}')
      close = functools.partial(np.testing.assert_allclose, rtol=1e-4)
      close(statistics.gram_KK, x_MK.T @ x_MK, atol=1e-3)
      close(statistics.absmax_K, np.abs(x_MK).max(0), atol=1e-6)
      assert statistics.tokens == len(x_MK) == 5 * 16 + 8
      assert statistics.inputs_SK.shape == (9, x_MK.shape[1])
      for x_K in np.asarray(statistics.inputs_SK):
        assert np.abs(x_MK - x_K).max(1).min() < 1e-5
  # Another block compiles nothing.
  assert calibrate.advance._cache_size() <= compiled[0] + 1
  assert calibrate.observe._cache_size() <= compiled[1] + 1


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('fields', [{}, OPT], ids=['llama', 'opt'])
def test_rows_of_the_embedding_are_what_the_model_embeds(fields, dtype):
  config = clean.config(**fields, model__dtype=dtype)
  params = clean.params(config)
  model = transformer.build(config, 'cpu', 1)
  tokens_BT = clean.examples().tokens_ST
  outside = calibrate.outside(params)
  found = calibrate.embed(model, jax.device_get(outside), tokens_BT)
  expected = model.apply(
    {'params': outside}, tokens_BT, np.arange(16), method='embedded'
  )
  assert found.dtype == expected.dtype == dtype
  np.testing.assert_array_equal(found, expected)


def test_between_programs_all_that_is_large_is_on_the_host():
  config = clean.config()
  params = clean.params(config)
  _, made = calibration(config, params)
  # Blocks one after another, each batch at once, on the device alone.
  expected = [jnp.array(x_BTD) for x_BTD in made._states]
  for block in ('block_0', 'block_1'):
    found = made.statistics(params[block], ['attn/q'], block)['attn/q']
    assert isinstance(found.gram_KK, np.ndarray)
    first = [np.array(x_BTD) for x_BTD in made._states]
    held = list(made._states)
    made.advance(params[block])
    expected = [
      calibrate.advance(made.block, params[block], x_BTD) for x_BTD in expected
    ]
    for mine, x_BTD in zip(made._states, expected, strict=True):
      assert isinstance(mine, np.ndarray)
      np.testing.assert_array_equal(mine, x_BTD)
    # That a device takes its input away changes nothing on the host.
    for before, copy in zip(held, first, strict=True):
      np.testing.assert_array_equal(before, copy)


def test_layers_that_read_one_input_are_a_group():
  config = clean.config()
  groups = calibrate.groups(config.model)
  assert [group.norm for group in groups] == [
    'attn/norm',
    None,
    'ffn/norm',
    None,
  ]
  params = transformer.abstract_params(transformer.build(config, 'cpu', 1))
  layers = [name for group in groups for name in group.layers]
  in_model = {
    f'{part}/{layer}'
    for part, layers in params['block_0'].items()
    for layer in layers
  }
  assert set(layers) == in_model - {'attn/norm', 'ffn/norm'}
  for group in groups:
    widths = {calibrate.kernel(params['block_0'], n).shape[0] for n in group[0]}
    assert len(widths) == 1


def test_models_whose_layers_have_own_norms_are_refused():
  config = clean.config(model__norm='inside', model__norm_shared=False)
  with pytest.raises(ValueError, match='config.model.norm_shared=False'):
    calibrate.groups(config.model)


def test_rules_that_tell_blocks_apart_are_refused():
  config = clean.config().unlock()
  config.quant.specs.other = (
    config.quant.specs.full.copy_and_resolve_references()
  )
  config.quant.specs.other.activation = 'int8'
  config.quant.rules = (('block_1/.*', 'other'), ('.*', 'full'))
  params = clean.params(config)
  with pytest.raises(ValueError, match='block_0/attn/k and block_1/attn/k'):
    calibration(config, params)


def test_a_matrix_is_put_in_the_place_of_another():
  params = {'attn': {'q': {'kernel': 1, 'bias': 2}, 'norm': {'scale': 3}}}
  found = calibrate.with_kernel(params, 'attn/q', 4)
  assert found == {
    'attn': {'q': {'kernel': 4, 'bias': 2}, 'norm': {'scale': 3}}
  }
  assert calibrate.kernel(params, 'attn/q') == 1
  assert calibrate.outside({'embed': 1, 'block_0': 2, 'head': 3}) == {
    'embed': 1,
    'head': 3,
  }
