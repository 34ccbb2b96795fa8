"""config.json of other programs: what is read, refused, and written."""

import pytest

from qat import config as config_lib
from qat.interop import families
from tests import tiny
from tests.interop import conftest as small

LONG = {'max_position_embeddings': 100_000}
LLAMA3 = small.CONFIGS['llama3']


def fields(kind: str, **changes):
  return families.model_fields(small.CONFIGS[kind] | changes)


@pytest.mark.parametrize('kind', small.CONFIGS)
def test_a_config_of_each_family_can_be_run_and_comes_back(base, kind):
  made = families.config(base, small.CONFIGS[kind], 'name', 'float32')
  assert made.is_locked and made.name == 'name'
  # No field that configs/common.py does not have.
  assert set(made.model) == set(base.model)
  config_lib.check(made, devices=1)
  assert config_lib.from_json(config_lib.to_json(made)) == made
  again = families.config(base, families.to_hf(made), 'name', 'float32')
  assert again == made


def test_the_fields_of_a_llama():
  found = fields('llama')
  assert found['d_model'] == 32 and found['d_ff'] == 48
  assert found['n_heads'] == 4 and found['n_kv_heads'] == 2
  assert found['rope_theta'] == 5000 and found['norm_eps'] == 1e-5
  assert found['rope_scaling'].kind == 'none'
  assert found['bias'] == 'none' and not found['tied_embeddings']
  assert found['max_positions'] == 64


def test_what_a_config_leaves_out_is_what_transformers_takes():
  config = dict(small.CONFIGS['llama'])
  for key in ('rope_theta', 'rms_norm_eps', 'num_key_value_heads'):
    del config[key]
  found = families.model_fields(config | {'head_dim': None})
  assert found['rope_theta'] == 10_000 and found['norm_eps'] == 1e-6
  assert found['n_kv_heads'] == 4


def test_the_biases_of_each_family():
  found = {kind: fields(kind)['bias'] for kind in small.CONFIGS}
  assert found.pop('qwen2') == 'qkv'
  assert found.pop('opt') == found.pop('biased') == 'all'
  assert set(found.values()) == {'none'}


@pytest.mark.parametrize(
  ('kind', 'changes', 'expected'),
  [
    ('mistral', {}, 48),
    ('mistral', {'sliding_window': 1000}, 64),
    # v0.2 and later say that there is no window; v0.1 may leave the field out.
    ('mistral', {'sliding_window': None, **LONG}, 100_000),
    ('qwen2', {'sliding_window': 16, 'use_sliding_window': False}, 64),
    ('qwen2', {'sliding_window': 16, 'use_sliding_window': True}, 16),
    ('llama', {'sliding_window': 16}, 64),
  ],
)
def test_a_sequence_ends_where_a_window_would_matter(kind, changes, expected):
  assert fields(kind, **changes)['max_positions'] == expected


def test_a_mistral_that_does_not_say_has_a_window_of_4096():
  config = small.CONFIGS['mistral'] | LONG
  del config['sliding_window']
  assert families.model_fields(config)['max_positions'] == 4096


def test_rope_scaling_in_all_its_spellings():
  expected = dict(
    kind='llama3',
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_positions=32,
  )
  assert fields('llama3')['rope_scaling'].to_dict() == expected
  scaling = dict(LLAMA3['rope_scaling'])
  scaling['type'] = scaling.pop('rope_type')
  found = fields('llama3', rope_scaling=scaling)
  assert found['rope_scaling'].to_dict() == expected
  found = fields(
    'llama',
    rope_theta=None,
    rope_parameters=LLAMA3['rope_scaling'] | {'rope_theta': 7.0},
  )
  assert found['rope_scaling'].to_dict() == expected
  assert found['rope_theta'] == 7.0


@pytest.mark.parametrize(
  ('kind', 'changes', 'message'),
  [
    ('llama', {'model_type': 'gemma'}, "model_type='gemma'.*mistral"),
    ('llama', {'hidden_size': None}, 'lacks hidden_size'),
    ('opt', {'ffn_dim': None}, 'lacks ffn_dim'),
    ('llama', {'head_dim': 16}, 'head_dim=16'),
    ('llama', {'hidden_act': 'gelu'}, "activation 'gelu'"),
    ('llama', {'attention_bias': True}, 'mlp_bias=False'),
    ('llama', {'partial_rotary_factor': 0.5}, 'partial_rotary_factor=0.5'),
    ('llama', {'rope_scaling': {'type': 'yarn'}}, 'yarn'),
    ('llama', {'rope_scaling': {'rope_type': 'llama3'}}, 'lacks factor'),
    ('llama', {'quantization_config': {'bits': 4}}, 'quantization_config'),
    ('opt', {'do_layer_norm_before': False}, '350m'),
    ('opt', {'word_embed_proj_dim': 16}, '350m'),
    ('opt', {'enable_bias': False}, 'enable_bias=False'),
  ],
)
def test_what_is_not_supported_is_named(kind, changes, message):
  with pytest.raises(ValueError, match=message):
    fields(kind, **changes)


@pytest.mark.parametrize(
  ('field', 'value'),
  [
    ('norm', 'inside'),
    ('ffn', 'decoupled'),
    ('ffn', 'plain'),
    ('norm_type', 'layer'),
  ],
)
def test_a_model_that_transformers_lacks_is_refused(field, value):
  config = tiny.config('fp', {f'model.{field}': value})
  with pytest.raises(ValueError, match=f"config.model.{field}='{value}'"):
    families.to_hf(config)


def test_a_full_precision_run_is_a_llama():
  config = tiny.config('fp')
  hf = families.to_hf(config)
  assert hf['model_type'] == 'llama'
  # A model without a limit gets the length that it was trained on.
  assert hf['max_position_embeddings'] == config.data.seq_len
