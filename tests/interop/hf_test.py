"""Folders of transformers, read and written; without the library itself."""

import json
import sys

import huggingface_hub
from huggingface_hub import errors
import jax
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from qat.infer import load
from qat.interop import folder as folder_lib
from qat.interop import foreign
from qat.interop import hf
from qat.quant import qtensor
from qat.quant import weights
from tests.interop import conftest as small


@pytest.fixture
def llama(tmp_path, tokenizer):
  return small.write(tmp_path / 'model', 'llama', tokenizer)


def leaves(path, base):
  source = hf.open_folder(path)
  config = foreign.config(source, base, 'float32')
  return dict(foreign.leaves(source, config))


def test_a_folder_becomes_a_tree(llama, base):
  found = safetensors_numpy.load_file(llama / 'model.safetensors')
  tree = folder_lib.nested(leaves(llama, base))
  assert set(tree) == {
    'embed',
    'block_0',
    'block_1',
    'final_norm',
    'head',
  }
  for layer in range(2):
    block, theirs = tree[f'block_{layer}'], f'model.layers.{layer}.'
    for ours, name in (
      (block['attn']['q']['kernel'].T, 'self_attn.q_proj'),
      (block['attn']['k']['kernel'].T, 'self_attn.k_proj'),
      (block['attn']['v']['kernel'].T, 'self_attn.v_proj'),
      (block['attn']['o']['kernel'].T, 'self_attn.o_proj'),
      (block['ffn']['gate']['kernel'].T, 'mlp.gate_proj'),
      (block['ffn']['up']['kernel'].T, 'mlp.up_proj'),
      (block['ffn']['down']['kernel'].T, 'mlp.down_proj'),
      (block['attn']['norm']['scale'], 'input_layernorm'),
      (block['ffn']['norm']['scale'], 'post_attention_layernorm'),
    ):
      np.testing.assert_array_equal(ours, found[f'{theirs}{name}.weight'])
  np.testing.assert_array_equal(tree['head'], found['lm_head.weight'])
  np.testing.assert_array_equal(
    tree['embed']['embedding'], found['model.embed_tokens.weight']
  )


def test_shards_are_the_same_model(llama, base):
  whole = leaves(llama, base)
  small.split(llama)
  cut = leaves(llama, base)
  assert list(cut) == list(whole)
  for path, x in whole.items():
    np.testing.assert_array_equal(cut[path], x)


def test_names_may_lack_their_first_part(llama, base):
  whole = leaves(llama, base)
  file = llama / 'model.safetensors'
  found = safetensors_numpy.load_file(file)
  safetensors_numpy.save_file(
    {name.removeprefix('model.'): x for name, x in found.items()}, file
  )
  assert leaves(llama, base).keys() == whole.keys()


def test_stored_dtypes_are_kept(llama, base):
  file = llama / 'model.safetensors'
  found = safetensors_numpy.load_file(file)
  half = {name: x.astype('bfloat16') for name, x in found.items()}
  safetensors_numpy.save_file(half, file)
  assert {x.dtype.name for x in leaves(llama, base).values()} == {'bfloat16'}
  # A model computes in float32.
  params = load.load_model(llama, base).params
  assert {x.dtype.name for x in jax.tree.leaves(params)} == {'float32'}


@pytest.mark.parametrize(
  ('name', 'message'),
  [
    ('config.json', 'config.json is missing'),
    ('tokenizer.json', 'no tokenizer.json; give one .--tokenizer'),
    ('model.safetensors', 'neither model.safetensors nor .*pytorch_model.bin'),
  ],
)
def test_a_missing_file_is_named(llama, name, message):
  (llama / name).unlink()
  with pytest.raises(FileNotFoundError, match=message):
    hf.open_folder(llama)


@pytest.mark.parametrize('name', ['config.json', 'model.safetensors'])
@pytest.mark.parametrize('content', [b'', b'[1', b'[1]'])
def test_a_damaged_file_is_named(llama, name, content):
  (llama / name).write_bytes(content)
  with pytest.raises(ValueError, match=f'{name} is damaged'):
    hf.open_folder(llama)


def test_damage_of_an_index_is_named(llama, base):
  small.split(llama)
  file = llama / 'model.safetensors.index.json'
  index = json.loads(file.read_text())
  name = min(index['weight_map'])

  def refused(weight_map, message, error=ValueError):
    file.write_text(json.dumps({'weight_map': weight_map}))
    with pytest.raises(error, match=message):
      hf.open_folder(llama)

  refused({}, 'index.json is damaged: it has no weight_map')
  refused(index['weight_map'] | {name: '../x.safetensors'}, 'is no file')
  refused(
    index['weight_map'] | {'extra': 'model-00001-of-00003.safetensors'},
    'model-00001-of-00003.safetensors lacks extra',
  )
  refused(
    index['weight_map'] | {name: 'model-00003-of-00003.safetensors'},
    f'00001-of-00003.safetensors holds {name}',
  )
  (llama / 'model-00002-of-00003.safetensors').unlink()
  refused(
    index['weight_map'],
    'model-00002-of-00003.safetensors is missing',
    FileNotFoundError,
  )


def test_the_tokens_of_a_text(tokenizer):
  assert hf.text_ids(tokenizer, 1, 2, '') == (1, 2)
  assert hf.text_ids(tokenizer, None, [3, 4], '') == (3, 3)
  assert hf.text_ids(tokenizer, 1, 2, '<|endoftext|>') == (0, 0)
  with pytest.raises(ValueError, match='no token .</s>'):
    hf.text_ids(tokenizer, 1, 2, '</s>')
  with pytest.raises(ValueError, match='which token ends a text'):
    hf.text_ids(tokenizer, 1, None, '')
  for bos in (264, -1, 'x'):
    with pytest.raises(ValueError, match='its tokenizer has 264'):
      hf.text_ids(tokenizer, bos, 2, '')


# -------------------------------------------------------------------- the hub


def test_a_model_of_the_hub_is_its_snapshot(llama, base, monkeypatch):
  asked = []

  def snapshot_download(name, revision, allow_patterns):
    asked.append((name, revision))
    assert not any('.bin' in pattern for pattern in allow_patterns)
    return str(llama)

  monkeypatch.setattr(huggingface_hub, 'snapshot_download', snapshot_download)
  source = foreign.open_model('some-org/a.model@v1.0')
  assert asked == [('some-org/a.model', 'v1.0')]
  assert source.about['name'] == 'some-org/a.model@v1.0'


@pytest.mark.parametrize('name', ['model', 'a/b/c', '/a/b', 'a/b@'])
def test_what_cannot_be_a_name_on_the_hub(name):
  assert not hf.is_hub(name)
  with pytest.raises(ValueError, match='is no model of the hub'):
    hf.download(name)


def test_the_hub_without_a_connection(monkeypatch):
  def snapshot_download(*_, **__):
    raise errors.LocalEntryNotFoundError('No connection.')

  monkeypatch.setattr(huggingface_hub, 'snapshot_download', snapshot_download)
  with pytest.raises(ValueError, match="'a/b' could not .*No connection"):
    hf.download('a/b')


def test_the_hub_without_its_library(monkeypatch):
  monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
  with pytest.raises(ImportError, match=r"pip install -e '.\[interop\]'"):
    hf.download('a/b')


# ------------------------------------------------------------------ and back


def export(loaded, out, **changes):
  options = dict(begin=0, end=0, dtype='float32') | changes
  hf.export(out, loaded.config, loaded.params, loaded.tokenizer, **options)


@pytest.mark.parametrize('kind', ['llama3', 'qwen2', 'opt'])
def test_an_export_is_read_as_the_same_model(tmp_path, tokenizer, base, kind):
  path = small.write(tmp_path / 'in', kind, tokenizer)
  loaded = load.load_model(path, base)
  export(loaded, tmp_path / 'out', shard_bytes=20_000)
  assert len(list((tmp_path / 'out').glob('model-*-of-*.safetensors'))) > 2
  again = load.load_model(tmp_path / 'out', base)
  assert again.config.model == loaded.config.model
  jax.tree.map(np.testing.assert_array_equal, again.params, loaded.params)
  assert again.tokenizer.to_str() == loaded.tokenizer.to_str()


def test_a_quantized_matrix_is_exported_as_its_floats(llama, base, tmp_path):
  loaded = load.load_model(llama, base)
  linear = loaded.params['block_1']['ffn']['down']
  quantized = weights.QUANTIZERS['int4'](linear['kernel'], 'channel', 0)
  assert isinstance(quantized, qtensor.QTensor)
  linear['kernel'] = quantized
  export(loaded, tmp_path / 'out', dtype='bfloat16')
  found = safetensors_numpy.load_file(tmp_path / 'out' / 'model.safetensors')
  np.testing.assert_array_equal(
    found['model.layers.1.mlp.down_proj.weight'],
    np.asarray(quantized.dequantize()).T.astype('bfloat16'),
  )
  assert json.loads((tmp_path / 'out/config.json').read_text())['dtype'] == (
    'bfloat16'
  )


@pytest.mark.parametrize(
  ('weight', 'activation'), [('ternary', 'none'), ('none', 'int8')]
)
def test_quantizers_are_not_lost_in_silence(
  llama, base, tmp_path, weight, activation
):
  loaded = load.load_model(llama, base)
  with loaded.config.unlocked():
    loaded.config.quant.specs.full.weight = weight
    loaded.config.quant.specs.full.activation = activation
  with pytest.raises(ValueError, match='block_0/attn/k has weights of'):
    export(loaded, tmp_path / 'out')
  assert not (tmp_path / 'out').exists()


def test_a_norm_after_a_linear_is_not_lost_in_silence(llama, base, tmp_path):
  loaded = load.load_model(llama, base)
  with loaded.config.unlocked():
    loaded.config.quant.specs.full.output_norm = True
  with pytest.raises(ValueError, match='block_0/attn/k is followed by a norm'):
    export(loaded, tmp_path / 'out')


def test_an_export_overwrites_nothing(llama, base):
  with pytest.raises(FileExistsError, match='exists already'):
    export(load.load_model(llama, base), llama)


def test_an_export_has_floats_of_a_known_kind(llama, base, tmp_path):
  with pytest.raises(ValueError, match="dtype='int8'; one of float32, float16"):
    export(load.load_model(llama, base), tmp_path / 'out', dtype='int8')
