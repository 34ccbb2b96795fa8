"""What a bad config is told, the JSON form, what a resume may change."""

import importlib

from ml_collections import ConfigDict
import pytest

from configs import common
from qat import changes
from qat import config as config_lib

METHODS = (
  *('fp', 'bitnet', 'bitnet_b158', 'pquant'),
  *('onebit', 'lsq', 'paretoq', 'integer'),
)
# What the messages below are about, whatever the sizes of the configs are.
SHAPE = dict(
  model__d_model=256,
  model__n_heads=4,
  model__n_kv_heads=4,
  model__d_ff=640,
  data__batch_size=16,
  train__steps=400,
)


def get(method='pquant', size='tiny', **fields) -> ConfigDict:
  """A config; `fields` are named with '__' for '.'."""
  config = importlib.import_module(f'configs.{method}').get_config(size)
  config.update_from_flattened_dict(
    {name.replace('__', '.'): value for name, value in fields.items()}
  )
  return config


def message(config, **machine) -> str:
  with pytest.raises(config_lib.ConfigError) as caught:
    config_lib.check(config, **{'devices': 1, **machine})
  return str(caught.value)


@pytest.mark.parametrize('size', common.SIZES)
@pytest.mark.parametrize('method', METHODS)
def test_every_config_is_sound_on_its_devices(method, size):
  config = get(method, size)
  config.model.n_layers = 1  # All blocks are alike.
  for devices, fsdp in ((1, 1), (8, 1), (8, 4)):
    config.mesh.fsdp = fsdp
    config_lib.check(config, devices=devices)


@pytest.mark.parametrize(
  ('fields', 'expected'),
  [
    (dict(model__d_model=250), 'model.d_model=250 model.n_heads=4 change'),
    (dict(model__d_model=260), 'model.d_model=260 odd width 65'),
    (dict(model__n_heads=0), 'model.n_heads=0 greater than 0'),
    (dict(model__norm_type='batch'), "norm_type='batch' rms, layer"),
    (dict(model__bias='q'), "model.bias='q' none, qkv, all"),
    (dict(model__positions='learned'), 'model.max_positions=0 table'),
    (dict(model__max_positions=-1), 'model.max_positions=-1 not negative'),
    (
      dict(model__max_positions=99),
      'data.seq_len=256 max_positions=99 shorter',
    ),
    (dict(model__ffn='plain'), "norm='inside' ffn='plain' norm='pre'"),
    (dict(model__norm_type='layer'), "norm='inside' norm_type='layer'"),
    (dict(model__rope_scaling__kind='yarn'), "kind='yarn' none, llama3"),
    (dict(model__rope_scaling__factor=0), 'rope_scaling.factor=0 greater'),
    (dict(model__n_kv_heads=3), 'model.n_kv_heads=3 model.n_heads=4 divisor'),
    (dict(model__n_kv_heads=0), 'model.n_kv_heads=0 model.n_heads=4'),
    (dict(model__norm='post'), "model.norm='post' pre, inside"),
    (dict(model__ffn='mlp'), "model.ffn='mlp' gated, decoupled"),
    (dict(model__activation='tanh'), "model.activation='tanh' silu"),
    (dict(model__dtype='float16'), "model.dtype='float16' bfloat16"),
    (dict(model__dot_dtype='int4'), "model.dot_dtype='int4' bfloat16"),
    (dict(model__quantized_dot='int'), "model.quantized_dot='int' auto, int8"),
    (dict(model__attention='flash'), "model.attention='flash' blocked, xla"),
    (dict(model__remat='full'), "model.remat='full' none, block"),
    (dict(model__branch_width=0), 'model.branch_width=0 model.d_ff=640'),
    (dict(model__branch_width=640), 'model.branch_width=640 model.d_ff=640'),
    (
      dict(model__branch_width=100, model__branch_multiple=64),
      'model.branch_width=100 model.branch_multiple=64 take 128',
    ),
    (dict(model__branch_multiple=0), 'model.branch_multiple=0 greater than 0'),
    (dict(model__n_experts=0), 'model.n_experts=0 at least 1'),
    (
      dict(model__n_experts=4, model__experts_per_token=3),
      'model.experts_per_token=3 model.n_experts=4',
    ),
    (dict(model__experts_per_token=2), 'experts_per_token=2 n_experts=1'),
    (dict(model__n_experts=2, model__bias='all'), "model.bias='all' no biases"),
    (dict(model__expert_form='fast'), "model.expert_form='fast' grouped"),
    (dict(model__capacity_factor=-1.0), 'model.capacity_factor=-1.0 negative'),
    (dict(model__router_jitter=1.5), 'model.router_jitter=1.5 between'),
    (dict(model__expert_tile=0), 'model.expert_tile=0 greater'),
    (
      dict(model__n_experts=2, model__ffn='gated'),
      "model.n_experts=2 model.ffn='decoupled'",
    ),
    (dict(model__alpha_init=float('nan')), 'model.alpha_init=nan finite'),
    (dict(model__norm_eps=0.0), 'model.norm_eps=0.0 greater than 0'),
    (dict(optim__peak_lr=-1e-3), 'optim.peak_lr=-0.001 greater than 0'),
    (dict(optim__peak_lr=float('nan')), 'optim.peak_lr=nan greater than 0'),
    (dict(optim__peak_lr=float('inf')), 'optim.peak_lr=inf'),
    (dict(optim__schedule='linear'), "optim.schedule='linear' two_phase"),
    (
      dict(optim__warmup_steps=400),
      'optim.warmup_steps=400 fewer train.steps=400',
    ),
    (
      dict(optim__schedule='wsd', optim__decay_fraction=0.0),
      'optim.decay_fraction=0',
    ),
    (dict(optim__switch_fraction=1.5), 'optim.switch_fraction=1.5 0 and 1'),
    (dict(optim__b1=1.0), 'optim.b1=1.0 below 1'),
    (dict(optim__b2=-0.1), 'optim.b2=-0.1 at least 0'),
    (dict(optim__clip_norm=-1.0), 'optim.clip_norm=-1.0 not negative'),
    (dict(optim__accumulate=0), 'optim.accumulate=0 greater than 0'),
    (
      dict(optim__accumulate=3),
      'data.batch_size=16 optim.accumulate=3 take a multiple of 3',
    ),
    (dict(optim__no_decay='(norm'), "optim.no_decay='(norm' no regex"),
    (dict(data__seq_len=0), 'data.seq_len=0 greater than 0'),
    (dict(data__batch_size=-2), 'data.batch_size=-2 greater than 0'),
    (dict(data__timeout_s=float('inf')), 'data.timeout_s=inf'),
    (dict(train__steps=0), 'train.steps=0 greater than 0'),
    (dict(checkpoint__keep_last=0), 'checkpoint.keep_last=0 greater than 0'),
    (dict(sample__top_p=0.0), 'sample.top_p=0.0 above 0'),
    (dict(sample__temperature=-0.5), 'sample.temperature=-0.5 not negative'),
    (dict(mesh__data=3), 'mesh.data=3 mesh.fsdp=1 1 devices'),
    (dict(mesh__fsdp=0), 'mesh.fsdp=0'),
    (dict(mesh__data=-1, mesh__fsdp=-1), 'mesh.data=-1, mesh.fsdp=-1'),
    (dict(mesh__data=-2, mesh__fsdp=-4), 'mesh.data=-2, mesh.fsdp=-4'),
    (
      dict(quant__rules=(('.*/attn/.*', 'binary'),)),
      "quant: No quantization rule covers 'block_0/ffn .*",
    ),
    (
      dict(quant__rules=(('.*', 'binary'), ('.*/x', 'narrow'))),
      "quant: '.*/x' decides about no layer",
    ),
    (
      dict(quant__rules=(('.*', 'tenary'),)),
      "quant: '.*' names spec 'tenary' there are binary, narrow",
    ),
    (dict(quant__rules=(('(', 'binary'),)), "quant: '(' is no regex"),
    (
      dict(quant__specs__binary__weight='int5'),
      "quant: weight='int5' choose one of none, binary, ternary, int8 onebit",
    ),
    (
      dict(quant__specs__binary__granularity='row'),
      "quant: granularity='row' tensor, channel, group",
    ),
    (
      dict(
        quant__specs__binary__granularity='group',
        quant__specs__binary__group_size=96,
      ),
      'quant: block_0/attn/q: group_size=96 256 inputs divisor',
    ),
    (
      dict(quant__specs__narrow__group_size=0),
      'quant: group_size=0 at least 1',
    ),
    (dict(quant__anneal__shape='sine'), "quant.anneal.shape='sine' linear"),
    (dict(quant__anneal__steps=-1), 'quant.anneal.steps=-1 not negative'),
    (
      dict(
        quant__anneal__shape='linear',
        quant__anneal__start_step=100,
        quant__anneal__steps=300,
      ),
      'quant.anneal.start_step=100 quant.anneal.steps=300 train.steps=400',
    ),
    (dict(optim__scales='(scale'), "optim.scales='(scale' no regex"),
    (dict(optim__scale_lr_ratio=-1.0), 'optim.scale_lr_ratio=-1.0 not neg'),
  ],
)
def test_a_bad_config_is_told_field_value_and_remedy(fields, expected):
  found = message(get(**{**SHAPE, **fields}))
  assert found.startswith('config.')
  position = 0
  for part in expected.split(' '):  # All of them, in this order.
    assert part in found[position:], f'{part!r} is missing in {found!r}'
    position = found.index(part, position)


@pytest.mark.parametrize(
  ('fields', 'machine', 'expected'),
  [
    (dict(data__batch_size=12), {'devices': 8}, 'data.batch_size=12'),
    (dict(optim__accumulate=4), {'devices': 8}, 'take a multiple of 32'),
    (dict(eval__batch_size=12), {'devices': 8}, 'eval.batch_size=12'),
    (dict(mesh__data=3), {'devices': 8}, 'mesh.data=3'),
    (
      dict(model__d_model=36, mesh__fsdp=8),
      {'devices': 8},
      'model.d_model=36 is no multiple of mesh.fsdp=8',
    ),
    (
      dict(sensitivity__sequences=3),
      {'devices': 2, 'processes': 2},
      'sensitivity.sequences=3',
    ),
  ],
)
def test_a_config_that_does_not_fit_its_devices_is_refused(
  fields, machine, expected
):
  assert expected in message(get(**{**SHAPE, **fields}), **machine)


def test_all_errors_are_told_at_once():
  found = message(get(optim__peak_lr=0.0, model__norm='x', data__seq_len=-1))
  assert [line.split('=')[0] for line in found.splitlines()] == [
    'config.model.norm',
    'config.optim.peak_lr',
    'config.data.seq_len',
  ]


@pytest.mark.parametrize(
  ('section', 'typo'),
  [('model', 'n_expert'), ('optim', 'peak_learning_rate'), ('data', 'seqlen')],
)
def test_a_misspelt_field_is_refused(section, typo):
  config = get()
  with pytest.raises((AttributeError, KeyError), match=typo):
    config[section][typo] = 1
  with pytest.raises(TypeError, match='float'):
    config.optim.peak_lr = 'high'


def test_a_vocabulary_smaller_than_the_tokenizer_is_refused():
  config = get(model__vocab_size=300)
  config_lib.check_tokenizer(config, 300, 'data/x')
  with pytest.raises(config_lib.ConfigError) as caught:
    config_lib.check_tokenizer(config, 301, 'data/x')
  for part in ('config.model.vocab_size=300', '301', 'data/x'):
    assert part in str(caught.value)


# ----------------------------------------------------------------------- JSON


@pytest.mark.parametrize('size', common.SIZES)
@pytest.mark.parametrize('method', METHODS)
def test_json_and_back_is_the_same_config(method, size, tmp_path):
  config = get(method, size)
  text = config_lib.to_json(config)
  (tmp_path / 'config.json').write_text(text)
  for back in (config_lib.from_json(text), config_lib.load(tmp_path)):
    assert back.to_dict() == config.to_dict()
    assert back.is_locked
    assert types(back.to_dict()) == types(config.to_dict())
    assert not changes.changes(config, back)


def types(tree):
  if isinstance(tree, dict):
    return {key: types(value) for key, value in tree.items()}
  if isinstance(tree, tuple):
    return [types(value) for value in tree]
  return type(tree)


def test_json_refuses_what_json_cannot_say():
  with pytest.raises(ValueError, match='JSON'):
    config_lib.to_json(get(optim__peak_lr=float('nan')))


def test_a_folder_without_a_run_is_told(tmp_path):
  with pytest.raises(FileNotFoundError, match='holds no run.*--workdir'):
    config_lib.load(tmp_path / 'nowhere')


@pytest.mark.parametrize('text', ['', '{', '[]', '{"quant": {}}', 'null'])
def test_a_damaged_config_is_told(tmp_path, text):
  (tmp_path / 'config.json').write_text(text)
  with pytest.raises(config_lib.ConfigError, match='config.json is damaged'):
    config_lib.load(tmp_path)


def test_a_config_without_later_fields_is_told(tmp_path):
  text = config_lib.to_json(get()).replace('"scan_layers": false,', '')
  (tmp_path / 'config.json').write_text(text)
  with pytest.raises(config_lib.ConfigError, match='lacks model.scan_layers:'):
    config_lib.load(tmp_path)
