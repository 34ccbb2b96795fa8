"""Transformations that change parameters and no output."""

import dataclasses

import jax
import numpy as np
import pytest

from configs.ptq import omniquant as config
from qat.ptq import omniquant
from qat.ptq import omniquant_transforms as transforms
from qat.ptq import smoothquant
from tests import clean
from tests import tiny

READERS = (
  ('attn/norm', ('attn/q', 'attn/k', 'attn/v')),
  ('ffn/norm', ('ffn/gate', 'ffn/up')),
)
OPT = {
  'model__ffn': 'plain',
  'model__activation': 'relu',
  'model__norm_type': 'layer',
  'model__bias': 'all',
  'model__positions': 'learned',
  'model__max_positions': 32,
}
# Fields of the model, readers of its norms, its heads.
MODELS = {
  'llama': ({}, READERS, transforms.Heads(4, 4, 8, True)),
  'grouped': (
    {'model__n_kv_heads': 2},
    READERS,
    transforms.Heads(4, 2, 8, True),
  ),
  'opt': (
    OPT,
    (READERS[0], ('ffn/norm', ('ffn/up',))),
    transforms.Heads(4, 4, 8, False),
  ),
}


@pytest.fixture(scope='module', autouse=True)
def quickly():
  with tiny.compiled_quickly():
    yield


def options(**fields):
  made = omniquant.Options(**config.get_config('w4a4').method.to_dict())
  return dataclasses.replace(made, let_shift=True, let_qk=True, **fields)


def ranges(width=32, seed=3):
  rng = np.random.default_rng(seed)
  absmax, middle = rng.lognormal(0, 1, width), rng.normal(0, 0.3, width)
  made = transforms.Range(np.float32(absmax), np.float32(middle))
  return dict.fromkeys(('attn/q', 'ffn/gate', 'ffn/up', 'attn/o'), made)


def model(name):
  fields, readers, heads = MODELS[name]
  fields = {'model__n_layers': 1, 'model__n_heads': 4} | fields
  fields = {'model__n_kv_heads': 4} | fields
  return clean.config(**fields), readers, heads


@pytest.mark.parametrize('name', MODELS)
def test_folded_transformations_leave_the_models_function(name):
  config, readers, heads = model(name)
  params = clean.params(config)
  block = params['block_0']
  learned = transforms.start(block, ranges(), readers, heads, options())
  rng = np.random.default_rng(4)
  # As if they had been trained, apart for each channel; some below 0.
  learned = {
    key: np.array(value * rng.uniform(0.3, 2, value.shape), np.float32)
    for key, value in learned.items()
  }
  learned['attn/v/scale'][3] *= -1
  shifts = {key for key in learned if key.endswith('/shift')}
  assert bool(shifts) == (name == 'opt')
  if name == 'opt':
    assert shifts == {'attn/norm/shift', 'ffn/norm/shift', 'attn/v/shift'}
  folded = transforms.fold(block, learned, readers, heads)
  tokens = clean.examples().tokens_ST
  before = clean.logits(config, params, tokens)
  after = clean.logits(config, {**params, 'block_0': folded}, tokens)
  assert np.abs(after - before).max() < 1e-4 * np.abs(before).max()
  # Every layer but down has changed, and the first parameters have not.
  for part in block:
    for layer in block[part]:
      for leaf in block[part][layer]:
        same = np.allclose(block[part][layer][leaf], folded[part][layer][leaf])
        kept = layer == 'down' or (name != 'opt' and leaf == 'bias')
        assert same == kept, (part, layer, leaf)
  again = clean.params(config)['block_0']
  jax.tree.map(np.testing.assert_array_equal, block, again)


def test_values_start_at_smoothquants_scales_or_at_1():
  config, readers, heads = model('grouped')
  block = clean.params(config)['block_0']
  smooth, ones = (
    transforms.start(block, ranges(), readers, heads, options(let_v_ones=v))
    for v in (False, True)
  )
  assert np.std(smooth['attn/v/scale']) > 0.1
  np.testing.assert_array_equal(ones.pop('attn/v/scale'), np.ones(16))
  for name, value in ones.items():
    np.testing.assert_array_equal(value, smooth[name])


def test_scales_of_queries_that_break_pairs_would_change_the_function():
  config, readers, heads = model('llama')
  params = clean.params(config)
  apart = heads._replace(rotary=False)
  learned = {'attn/k/scale': np.linspace(0.5, 2, 32, dtype='f4')}
  folded = transforms.fold(params['block_0'], learned, readers, apart)
  tokens = clean.examples().tokens_ST
  before = clean.logits(config, params, tokens)
  after = clean.logits(config, {**params, 'block_0': folded}, tokens)
  assert np.abs(after - before).max() > 1e-2 * np.abs(before).max()


def test_scales_of_queries_and_keys_change_no_code():
  """A column's range has its scale: float attention gains nothing by them."""
  config, readers, heads = model('llama')
  block = clean.params(config)['block_0']
  powers = 2.0 ** np.random.default_rng(0).integers(-3, 4, 16)
  learned = {'attn/k/scale': np.float32(powers)}
  folded = transforms.fold(block, learned, readers, heads)
  clip = omniquant.clip(omniquant.start('a', (32, 32), options()), 'a')
  for name in 'qk':
    before, after = (
      omniquant.quantize(b['attn'][name]['kernel'], clip, options())
      for b in (block, folded)
    )
    np.testing.assert_array_equal(after.codes, before.codes)
    assert np.any(after.scale != before.scale)


def test_it_starts_from_smoothquants_scales():
  config, readers, heads = model('grouped')
  block, inputs = clean.params(config)['block_0'], ranges()
  learned = transforms.start(block, inputs, readers, heads, options())
  smooth = smoothquant.Options(0.75)
  kernels = [block['ffn'][name]['kernel'] for name in ('gate', 'up')]
  expected = smoothquant.scales(inputs['ffn/gate'].absmax_K, kernels, smooth)
  np.testing.assert_array_equal(learned['ffn/norm/scale'], expected)
  # Of v, the largest of the two heads that read a channel.
  o_KN = np.asarray(block['attn']['o']['kernel'])
  absmax_K = inputs['attn/o'].absmax_K
  for c, rows in ((0, [0, 8]), (7, [7, 15]), (8, [16, 24]), (15, [23, 31])):
    x, w = absmax_K[rows].max(), np.abs(o_KN[rows]).max()
    scale = x**0.75 / w**0.25
    assert learned['attn/v/scale'][c] == pytest.approx(scale, rel=1e-5)
  np.testing.assert_array_equal(learned['attn/k/scale'], np.ones(8))


def test_a_scale_stays_away_from_zero():
  found = transforms.away_from_zero(
    {'a/b/scale': np.float32([-1, -1e-3, 0, 5e-3, 2]), 'a/b/shift': np.zeros(1)}
  )
  np.testing.assert_allclose(found['a/b/scale'], [-1, -0.01, 0.01, 0.01, 2])
  np.testing.assert_array_equal(found['a/b/shift'], 0)
