"""Names and places of tensors, and what is said of those that are wrong."""

import pathlib

import numpy as np
import pytest

from qat.interop import families
from qat.interop import files
from qat.interop import tensors
from tests import tiny
from tests.interop import conftest as small


@pytest.fixture
def llama(base):
  config = families.config(base, small.CONFIGS['llama'], 'x', 'float32')
  return tensors.table(config)


def source(found, tokenizer) -> tensors.Source:
  return tensors.Source(
    config={},
    tensors={
      name: files.Tensor(pathlib.Path('file'), x.shape, 'F32')
      for name, x in found.items()
    },
    read=lambda name: found[name],
    tokenizer=tokenizer,
    begin=0,
    end=0,
    about={'name': 'model'},
  )


def random(places):
  rng = np.random.default_rng(0)
  return {name: rng.normal(size=p.shape) for name, p in places.items()}


def test_the_table_of_a_llama(llama):
  place = llama['layers.1.self_attn.k_proj.weight']
  assert place == tensors.Place('block_1/attn/k/kernel', True, 0, (16, 32))
  place = llama['layers.0.mlp.down_proj.weight']
  assert place == tensors.Place('block_0/ffn/down/kernel', True, 0, (32, 48))
  place = llama['layers.0.post_attention_layernorm.weight']
  assert place == tensors.Place('block_0/ffn/norm/scale', False, 0, (32,))
  assert llama['embed_tokens.weight'].path == 'embed/embedding'
  assert llama['norm.weight'].path == 'final_norm/scale'
  assert llama['lm_head.weight'] == tensors.Place('head', False, 0, (264, 32))
  assert len(llama) == 2 * 9 + 3


def test_what_quantizers_learn_is_no_tensor_of_its_own():
  config = tiny.config('paretoq', {'model.n_layers': 1})
  places = tensors.table(config)
  assert not [p for p in places.values() if 'learned' in p.path]
  assert places['layers.0.self_attn.q_proj.weight'].path == (
    'block_0/attn/q/kernel'
  )


def test_the_table_of_an_opt(base):
  config = families.config(base, small.CONFIGS['opt'], 'x', 'float32')
  places = tensors.table(config)
  found = places['decoder.embed_positions.weight']
  assert found == tensors.Place('positions', False, 2, (66, 32))
  place = places['decoder.layers.1.fc1.bias']
  assert place == tensors.Place('block_1/ffn/up/bias', False, 0, (48,))
  place = places['decoder.layers.0.final_layer_norm.bias']
  assert place == tensors.Place('block_0/ffn/norm/bias', False, 0, (32,))
  assert len(places) == 2 * 16 + 4


def test_leaves_are_turned_and_come_back(base, tokenizer):
  config = families.config(base, small.CONFIGS['opt'], 'x', 'float32')
  places = tensors.table(config)
  found = random(places)
  leaves = dict(tensors.leaves(source(found, tokenizer), places))
  np.testing.assert_array_equal(
    leaves['block_0/attn/q/kernel'],
    found['decoder.layers.0.self_attn.q_proj.weight'].T,
  )
  np.testing.assert_array_equal(
    leaves['positions'], found['decoder.embed_positions.weight'][2:]
  )
  back = dict(tensors.tensors(places, leaves.__getitem__))
  found['decoder.embed_positions.weight'][:2] = 0  # No token stands there.
  assert back.keys() == {'model.' + name for name in found}
  for name, x in found.items():
    np.testing.assert_array_equal(back['model.' + name], x)


def test_wrong_tensors_are_named_before_any_is_read(llama, tokenizer):
  found = random(llama)
  del found['layers.1.mlp.up_proj.weight']
  found['norm.weight'] = np.zeros((31,))
  found['layers.2.mlp.up_proj.weight'] = np.zeros((48, 32))
  with pytest.raises(ValueError) as caught:
    tensors.check(llama, source(found, tokenizer), False)
  message = str(caught.value)
  assert 'model is not the model that its config describes; 3' in message
  assert 'layers.1.mlp.up_proj.weight: missing; [48, 32] wanted' in message
  assert 'norm.weight: [31] in file, [32] wanted' in message
  assert 'layers.2.mlp.up_proj.weight: unexpected, in file' in message


def test_integers_are_no_weights(llama, tokenizer):
  made = source(random(llama), tokenizer)
  made.tensors['norm.weight'] = files.Tensor(pathlib.Path('f'), (32,), 'I32')
  with pytest.raises(ValueError, match='norm.weight: of dtype I32'):
    tensors.check(llama, made, False)


def test_a_long_list_is_cut(llama, tokenizer):
  with pytest.raises(ValueError, match='21 tensors') as caught:
    tensors.check(llama, source({}, tokenizer), False)
  assert str(caught.value).endswith('...')
  assert len(str(caught.value).splitlines()) == 22


def test_buffers_and_a_tied_head_are_passed_over(llama, base, tokenizer):
  found = random(llama)
  found['layers.0.self_attn.rotary_emb.inv_freq'] = np.zeros((4,))
  tensors.check(llama, source(found, tokenizer), False)
  tied = {k: v for k, v in llama.items() if k != 'lm_head.weight'}
  tensors.check(tied, source(found, tokenizer), True)
  with pytest.raises(ValueError, match='lm_head.weight: unexpected'):
    tensors.check(tied, source(found, tokenizer), False)
