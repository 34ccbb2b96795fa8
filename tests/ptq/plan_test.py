"""Checks of a config against a model, before any work."""

import pytest

from configs.ptq import smoothquant
from qat.nn import transformer
from qat.ptq import examples
from qat.ptq import plan
from qat.quant import qtensor
from qat.quant import rules as rules_lib
from tests import clean
from tests import tiny

STEMS = (
  'rtn',
  'splitquant',
  'gptq',
  'spqr',
  'slim_llm',
  'billm',
  'omniquant',
  'smoothquant',
  'dbellquant',
  'tacq',
)
# What a width of 32 needs that the papers' models do not.
FITTING = {
  'spqr': {'method__second_group_size': 16},
}


def shapes(config):
  return transformer.abstract_params(transformer.build(config, 'cpu', 1))


def make(stem, config=None, **fields):
  config = config or clean.config()
  return plan.make(config, shapes(config), clean.ptq(stem, **fields))


def refused(*args, **fields):
  with pytest.raises(ValueError) as error:
    make(*args, **fields)
  return str(error.value)


def test_every_method_has_a_config_of_its_name():
  assert set(STEMS) == set(plan.ALGORITHMS)
  for stem in STEMS:
    assert clean.ptq(stem).algorithm == stem


@pytest.mark.parametrize('stem', STEMS)
def test_a_config_becomes_a_plan(stem):
  found = make(stem, **FITTING.get(stem, {}))
  assert list(found.layers) == ['block_0', 'block_1']
  assert found.layers['block_0'] == (
    *('attn/q', 'attn/k', 'attn/v', 'attn/o'),
    *('ffn/gate', 'ffn/up', 'ffn/down'),
  )
  assert bool(found.scales) == (stem in ('smoothquant', 'dbellquant'))
  assert bool(found.corrupt) == (stem == 'tacq')
  assert (found.epochs is not None) == (stem == 'omniquant')
  needs = stem not in ('rtn', 'splitquant')
  assert plan.needs_examples(clean.ptq(stem)) == needs


def test_smoothquants_scales_before_billm_as_for_opt():
  ptq = smoothquant.get_config('billm')
  found = plan.make(clean.config(), shapes(clean.config()), ptq)
  assert found.scales and found.statistics
  assert found.options.alpha == 0.85 and ptq.activation == 'none'
  with pytest.raises(ValueError, match="'gptq'; choose rtn or billm"):
    smoothquant.get_config('gptq')


def test_outputs_to_compare_need_rows():
  assert 'config.calibration.rows=0' in refused(
    'slim_llm', **{'calibration.rows': 0}
  )


def test_a_model_that_is_partly_quantized_is_refused():
  config = clean.config()
  params = shapes(config)
  w_KN = params['block_0']['attn']['q']['kernel']
  quantized = qtensor.QTensor(w_KN, w_KN, 'int4')
  params['block_0']['attn']['q']['kernel'] = quantized
  with pytest.raises(ValueError, match='block_0/attn/q is quantized already'):
    plan.make(config, params, clean.ptq('rtn', layers='.*/ffn/.*'))


def test_a_plain_layer_has_no_gate():
  config = clean.config(
    model__ffn='plain',
    model__activation='relu',
    model__norm_type='layer',
    model__bias='all',
    model__positions='learned',
    model__max_positions=16,
  )
  found = make('gptq', config)
  assert found.layers['block_1'][4:] == ('ffn/up', 'ffn/down')
  with pytest.raises(ValueError, match='at most 16'):
    examples.check(clean.examples(length=17), config, 'gptq')


def test_rules_quantize_the_inputs_of_the_chosen_layers():
  config = clean.config()
  all_of_them = make('rtn', activation='int6').config
  rules = rules_lib.make_rules(all_of_them.quant.rules, all_of_them.quant.specs)
  rules.check(rules_lib.kernels(shapes(config)))
  assert rules.find('block_1/attn/o').activation == 'int6'
  some = make('rtn', activation='int8', layers='block_1/.*').config
  rules = rules_lib.make_rules(some.quant.rules, some.quant.specs)
  rules.check(rules_lib.kernels(shapes(config)))
  assert rules.find('block_0/attn/o').activation == 'none'
  assert rules.find('block_1/attn/o').activation == 'int8'


def test_rules_of_a_latent_result_train_its_grids_on():
  fields = dict(latent=True, method__bits=2, layers='.*/ffn/.*')
  for size, activation in ((0, 'none'), (8, 'int4_asym')):
    found = make(
      'omniquant', **fields, method__group_size=size, activation=activation
    )
    assert found.latent
    spec = rules_lib.make_rules(
      found.result.quant.rules, found.result.quant.specs
    ).find('block_1/ffn/up')
    assert (spec.weight, spec.activation) == ('lwc2', activation)
    assert spec.granularity == ('group' if size else 'channel')
    assert not size or spec.group_size == size
    # While its grids are trained, the weights are in float.
    rules = rules_lib.make_rules(
      found.config.quant.rules, found.config.quant.specs
    )
    assert rules.find('block_1/ffn/up').weight == 'none'
  found = make('omniquant', activation='int8')
  assert found.result is found.config and not found.latent


def test_tacq_corrupts_with_as_many_bits():
  made = clean.ptq('tacq', quantizer_options__bits=2)
  assert made.corrupt.bits == 2 and not made.corrupt.mse


@pytest.mark.parametrize(
  ('stem', 'fields', 'expected'),
  [
    ('gptq', {'algorithm': 'awq'}, "config.algorithm='awq'; there are rtn"),
    ('tacq', {'quantizer': 'rtn'}, 'tacq keeps weights in gptq'),
    ('gptq', {'quantizer': 'rtn'}, 'make them equal'),
    ('smoothquant', {'quantizer': 'dbellquant'}, 'there are rtn'),
    ('gptq', {'layers': 'block_7/.*'}, 'matches no layer; the layers are'),
    ('gptq', {'layers': '('}, 'is no regex'),
    ('gptq', {'activation': 'int5'}, "config.activation='int5'"),
    ('gptq', {'method.bits': 5}, 'block_0/attn/q, 32 x 32: .*bits=5'),
    ('gptq', {'method.group_size': 12}, 'block_0/attn/q, 32 x 32: .*12'),
    ('rtn', {'method.granularity': 'group'}, '32 x 32: .*128'),
    ('splitquant', {'method.storage': 'none'}, 'storage'),
    ('smoothquant', {'method.alpha': 2.0}, 'alpha=2.0'),
    ('tacq', {'corrupt.group_size': 12}, '12'),
    ('tacq', {'method.share': 35.0}, 'share=35.0'),
    ('tacq', {'corrupt.percdamp': -1.0}, 'config.corrupt.percdamp=-1.0'),
    ('spqr', {'method.percdamp': float('nan')}, 'config.method.percdamp=nan'),
    ('rtn', {'calibration.gradient_batch': 0}, 'gradient_batch=0 must be'),
    (
      'dbellquant',
      {'activation': 'int8', 'layers': 'block_0/.*'},
      "config.activation='int8' with config.layers='block_0/.*'",
    ),
    ('smoothquant', {'quantizer': 'omniquant'}, 'prepares the model itself'),
    ('omniquant', {'method.group_size': 12}, 'block_0/attn/q, 32 x 32: .*12'),
    ('omniquant', {'method.let_qk': True}, 'let=False'),
    ('omniquant', {'latent': True, 'method.bits': 5}, 'bits=5; take one of'),
    (
      'omniquant',
      {'latent': True, 'method.symmetric': True},
      'config.latent=True .* set symmetric=False',
    ),
  ],
)
def test_what_cannot_be_is_refused_with_the_way_out(stem, fields, expected):
  fields = {key.replace('.', '__'): value for key, value in fields.items()}
  with pytest.raises(ValueError, match=expected):
    make(stem, **fields)


def test_fields_of_another_method_are_refused():
  ptq = clean.ptq('rtn').unlock()
  del ptq.method.mse
  ptq.method.alpha = 1.0
  config = clean.config()
  with pytest.raises(ValueError, match='config.method lacks mse, which rtn'):
    plan.make(config, shapes(config), ptq)
  ptq.method.mse = False
  with pytest.raises(ValueError, match='config.method has alpha, which rtn'):
    plan.make(config, shapes(config), ptq)


def test_a_model_that_was_trained_in_low_bits_is_refused():
  config = tiny.config('bitnet', {'model.scan_layers': False})
  assert "block_0/attn/k was trained in low bits (weight='bin" in refused(
    'rtn', config
  )
  config = tiny.config('pquant', {'model.scan_layers': False})
  assert "config.model.ffn='decoupled'" in refused('rtn', config)
  config = clean.config(model__scan_layers=True)
  assert 'config.model.scan_layers=True' in refused('rtn', config)


def test_examples_have_to_be_there_and_to_be_the_models():
  config = clean.config()
  with pytest.raises(ValueError, match="'gptq' needs calibration sequences"):
    examples.check(None, config, 'gptq')
  with pytest.raises(ValueError, match='another tokenizer'):
    examples.check(clean.examples(vocabulary=999), config, 'gptq')
  examples.check(clean.examples(), config, 'gptq')
