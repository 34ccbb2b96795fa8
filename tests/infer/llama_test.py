"""Q1_0 as it is documented, and llama.cpp, where it is, as a slow model."""

import sys

import gguf
import jax
import numpy as np
import pytest

from qat.infer import llama
from qat.interop import gguf as reading
from qat.nn import transformer
from tests import tiny

SHAPE = {
  'model.vocab_size': 300,
  'model.d_model': 256,
  'model.n_heads': 4,
  'model.n_kv_heads': 2,
  'model.n_layers': 2,
  'model.d_ff': 300,
}
PLACES = {
  'attn_q': ('attn', 'q'),
  'attn_k': ('attn', 'k'),
  'attn_v': ('attn', 'v'),
  'attn_output': ('attn', 'o'),
  'ffn_gate': ('ffn', 'gate'),
  'ffn_up': ('ffn', 'up'),
  'ffn_down': ('ffn', 'down'),
}


def slow_weights(packed: np.ndarray) -> np.ndarray:
  """The floats that rows of Q1_0 stand for, one after the other."""
  rows = []
  for row in packed:
    weights = []
    for block in row.reshape(-1, 18):
      d = float(block[:2].copy().view('<f2')[0])
      for j in range(128):
        weights.append(d if block[2 + j // 8] >> (j % 8) & 1 else -d)
    rows.append(weights)
  return np.array(rows)


def written(folder):
  config = tiny.config('fp', SHAPE | tiny.EXACT)
  path = folder / 'tiny.gguf'
  return config, path, llama.write(path, config, seed=1)


def test_weights_are_those_that_the_blocks_stand_for():
  rng = np.random.default_rng(0)
  positive_NK = rng.integers(0, 2, (3, 256)).astype(bool)
  scale_NB = rng.uniform(0.5, 2, (3, 2)).astype(np.float16)
  packed = llama.q1_0(positive_NK, scale_NB)
  assert packed.shape == (3, 36) and packed.dtype == np.uint8
  size_NK = np.repeat(scale_NB.astype(float), 128, axis=1)
  np.testing.assert_array_equal(
    slow_weights(packed), np.where(positive_NK, size_NK, -size_NK)
  )


def test_a_block_has_a_scale_and_then_bits_the_lowest_first():
  positive_1K = np.zeros((1, 128), bool)
  positive_1K[0, [0, 9, 127]] = True
  packed = llama.q1_0(positive_1K, np.array([[1.0]], np.float16))
  expected = np.zeros(18, np.uint8)
  expected[:2] = 0x00, 0x3C  # 1.0
  expected[[2, 3, 17]] = 1, 2, 128
  np.testing.assert_array_equal(packed[0], expected)


def test_rows_of_half_a_block_are_refused():
  with pytest.raises(ValueError, match='192 weights.*multiples of 128'):
    llama.q1_0(np.ones((2, 192), bool), np.ones((2, 1), np.float16))


def test_a_file_has_the_shape_of_the_config(tmp_path):
  config, path, size = written(tmp_path)
  assert llama.hidden_width(config) == 384
  reader = gguf.GGUFReader(path)
  tensors = {t.name.removesuffix('.weight'): t for t in reader.tensors}
  assert sum(int(t.n_bytes) for t in reader.tensors) == size
  shapes = {name: tuple(t.shape[::-1].tolist()) for name, t in tensors.items()}
  assert len(shapes) == 2 + 2 * 9
  assert shapes['token_embd'] == (300, 256)
  assert shapes['blk.1.attn_q'] == (256, 256)
  assert shapes['blk.1.attn_v'] == (128, 256)
  assert shapes['blk.0.ffn_gate'] == (384, 256)
  assert shapes['blk.0.ffn_down'] == (256, 384)
  types = {
    name.split('.')[-1]: t.tensor_type.name for name, t in tensors.items()
  }
  assert types == {
    'token_embd': 'F16',
    **dict.fromkeys(('output_norm', 'attn_norm', 'ffn_norm'), 'F32'),
    **dict.fromkeys(PLACES, 'Q1_0'),
  }  # fmt: skip
  sizes = np.abs(slow_weights(tensors['blk.0.ffn_down'].data))
  assert 0.0099 < sizes.min() < sizes.max() < 0.0301


@pytest.mark.parametrize('package', ['gguf', 'llama_cpp'])
def test_a_missing_package_is_named_with_the_extra(package, monkeypatch):
  for name in ('gguf', 'llama_cpp'):
    monkeypatch.setitem(sys.modules, name, gguf)
  monkeypatch.setitem(sys.modules, package, None)
  with pytest.raises(ImportError, match=rf'{package} .*\[llama\]'):
    llama.random_model(tiny.config('fp', SHAPE), 8)


def params(path, config):
  """The file's weights as float32 parameters of ours."""
  found = {
    tensor.name.removesuffix('.weight'): slow_weights(tensor.data)
    if tensor.tensor_type.name == 'Q1_0'
    else tensor.data
    for tensor in gguf.GGUFReader(path).tensors
  }
  tree = {
    'embed': {'embedding': found['token_embd']},
    'final_norm': {'scale': found['output_norm']},
  }
  heads = {'q': config.model.n_heads, 'k': config.model.n_kv_heads}
  for i in range(config.model.n_layers):
    block = tree[f'block_{i}'] = {
      part: {'norm': {'scale': found[f'blk.{i}.{part}_norm']}}
      for part in ('attn', 'ffn')
    }
    for name, (part, linear) in PLACES.items():
      w_NK = found[f'blk.{i}.{name}']
      if linear in heads:
        w_NK = reading.halves(w_NK, heads[linear])
      block[part][linear] = {'kernel': w_NK.T}
  return jax.tree.map(lambda x: np.asarray(x, np.float32), tree)


def test_llama_cpp_computes_the_model_that_was_written(tmp_path):
  # llama.cpp rounds the inputs of 1-bit weights to 8 bits, 32 at a time.
  pytest.importorskip('llama_cpp')
  config, path, _ = written(tmp_path)
  weights = params(path, config)
  with config.unlocked():
    config.model.d_ff = llama.hidden_width(config)
  model = transformer.build(config, 'cpu', 1)
  ids = [1, 5, 299, 12, 260, 7, 77, 3, 3, 45]
  expected_TV = model.apply(
    {'params': weights}, np.array([ids]), method='logits'
  )[0][0]
  decoder = llama.Decoder(path, len(ids) + 4)
  found_TV = np.stack([decoder.advance([i]).copy() for i in ids])
  most = np.abs(expected_TV).max()
  np.testing.assert_allclose(found_TV, expected_TV, atol=0.01 * most)
  np.testing.assert_array_equal(found_TV.argmax(-1), expected_TV.argmax(-1))
  decoder.start()
  np.testing.assert_allclose(
    decoder.advance(ids), found_TV[-1], atol=0.01 * most
  )
  first, *_ = texts = list(decoder.write([ids], 3))
  assert first == [found_TV[-1].argmax()]
  assert len(texts) == 3
