"""GGUF files against the same model in safetensors."""

import sys

import gguf as package
import numpy as np
import pytest

from qat.interop import foreign
from qat.interop import gguf
from tests.interop import conftest as small
from tests.interop import gguf_files

TYPES = package.GGMLQuantizationType


def leaves(path, base, **options):
  source = foreign.open_model(str(path), **options)
  config = foreign.config(source, base, 'float32')
  return config, dict(foreign.leaves(source, config))


@pytest.mark.parametrize('kind', ['llama', 'smollm2', 'qwen2'])
def test_a_file_is_the_model_that_was_converted(
  tmp_path, tokenizer, base, kind
):
  found = small.random_tensors(kind)
  gguf_files.write(tmp_path / 'm.gguf', kind, found, tokenizer)
  small.write(tmp_path / 'm', kind, tokenizer, found)
  config, theirs = leaves(tmp_path / 'm.gguf', base)
  expected_config, expected = leaves(tmp_path / 'm', base)
  assert config.model == expected_config.model
  assert theirs.keys() == expected.keys()
  for path, x in expected.items():
    np.testing.assert_array_equal(theirs[path], x)


def test_every_format_is_the_floats_that_it_stands_for(
  tmp_path, tokenizer, base
):
  formats = {
    'q_proj': TYPES.Q8_0,
    'v_proj': TYPES.Q4_0,
    'o_proj': TYPES.Q4_1,
    'gate_proj': TYPES.F16,
    'up_proj': TYPES.BF16,
    'embed': TYPES.Q5_0,
  }
  found = small.random_tensors('llama')
  file = tmp_path / 'm.gguf'
  gguf_files.write(file, 'llama', found, tokenizer, formats=formats)
  _, theirs = leaves(file, base)
  small.write(tmp_path / 'm', 'llama', tokenizer, found)
  _, expected = leaves(tmp_path / 'm', base)
  # Half a step of the widest block: the largest weight is below 1.5.
  for path, x in expected.items():
    step = {
      'attn/q': 1.5 / 127,
      'attn/v': 1.5 / 8,
      'attn/o': 3 / 15,
      'ffn/gate': 1e-3,
      'ffn/up': 8e-3,
      'embed': 1.5 / 16,
    }
    allowed = max([s for part, s in step.items() if part in path], default=0)
    if 'norm' in path:
      allowed = 0
    np.testing.assert_allclose(theirs[path], x, rtol=0, atol=allowed)
    assert theirs[path].dtype == np.float32
  q = package.quants.quantize(
    gguf_files.pairs(found['model.layers.0.self_attn.q_proj.weight'], 4),
    TYPES.Q8_0,
  )
  np.testing.assert_array_equal(
    theirs['block_0/attn/q/kernel'].T,
    gguf.halves(package.quants.dequantize(q, TYPES.Q8_0), 4),
  )


def test_rows_of_neighbours_become_halves():
  # Two heads of width 6: pair i of a head is (2i, 2i + 1) in the file.
  rows = np.arange(12)
  expected = [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]
  np.testing.assert_array_equal(gguf.halves(rows, 2), expected)
  x = np.random.default_rng(0).normal(size=(12, 3))
  np.testing.assert_array_equal(gguf_files.pairs(gguf.halves(x, 2), 2), x)


def test_the_stretched_wavelengths_of_llama3(tmp_path, tokenizer, base):
  theta, half = 500_000.0, 4
  factors = []
  for i in range(half):  # As the paper's code has it.
    wavelength = 2 * np.pi * theta ** (i / half)
    if wavelength < 8192 / 4:
      factors.append(1.0)
    elif wavelength > 8192 / 1:
      factors.append(32.0)
    else:
      smooth = (8192 / wavelength - 1) / (4 - 1)
      factors.append(1 / ((1 - smooth) / 32 + smooth))
  assert factors[0] == 1 and 1 < factors[2] < 32 and factors[3] == 32
  found = small.random_tensors('llama')

  def written(table):
    return gguf_files.write(
      tmp_path / 'm.gguf',
      'llama',
      found,
      tokenizer,
      changes={'llama.rope.freq_base': theta},
      extra={'rope_freqs.weight': np.float32(table)},
    )

  config, _ = leaves(written(factors), base)
  assert config.model.rope_scaling.to_dict() == dict(
    kind='llama3',
    factor=32.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_positions=8192,
  )
  with pytest.raises(ValueError, match='rope_freqs.weight is not the scaling'):
    leaves(written([1, 2, 3, 4]), base)


def test_the_window_of_a_mistral(tmp_path, tokenizer, base):
  file = gguf_files.write(
    tmp_path / 'm.gguf',
    'llama',
    small.random_tensors('llama'),
    tokenizer,
    changes={'llama.attention.sliding_window': 16},
  )
  assert leaves(file, base)[0].model.max_positions == 16


def test_the_tokenizer_is_rebuilt_or_given(tmp_path, tokenizer):
  found = small.random_tensors('llama')
  file = gguf_files.write(tmp_path / 'm.gguf', 'llama', found, tokenizer)
  text = 'the ship, the sea 12 é'
  expected = tokenizer.encode(text, add_special_tokens=False).ids
  source = gguf.open_file(file)
  assert source.tokenizer.encode(text).ids == expected
  assert (source.begin, source.end) == (0, 0)
  gguf_files.write(
    file, 'llama', found, tokenizer, changes={'tokenizer.ggml.pre': 'new'}
  )
  with pytest.raises(ValueError, match="m.gguf.*'new'; known.*--tokenizer"):
    gguf.open_file(file)
  (tmp_path / 't.json').write_text(tokenizer.to_str())
  source = gguf.open_file(file, tokenizer=tmp_path / 't.json')
  assert source.tokenizer.encode(text).ids == expected


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'llama.block_count': None}, 'lacks the field llama.block_count'),
    ({'llama.expert_count': 8}, 'mixture of experts'),
    ({'llama.rope.scaling.type': 'yarn'}, "rope scaling 'yarn'"),
    ({'llama.rope.dimension_count': 4}, 'rope.dimension_count=4'),
    ({'llama.attention.head_count': 8}, 'self_attn.k_proj.weight: .16, 32.'),
  ],
)
def test_what_is_not_supported_is_named(
  tmp_path, tokenizer, base, changes, message
):
  file = gguf_files.write(
    tmp_path / 'm.gguf',
    'llama',
    small.random_tensors('llama'),
    tokenizer,
    changes=changes,
  )
  with pytest.raises(ValueError, match=message):
    leaves(file, base)


def test_a_tensor_too_many_or_too_few_is_named(tmp_path, tokenizer, base):
  found = small.random_tensors('llama')
  del found['model.layers.0.mlp.up_proj.weight']
  file = gguf_files.write(
    tmp_path / 'm.gguf',
    'llama',
    found,
    tokenizer,
    extra={'blk.0.ssm_a.weight': np.zeros((4,), np.float32)},
  )
  with pytest.raises(ValueError) as caught:
    leaves(file, base)
  assert 'layers.0.mlp.up_proj.weight: missing' in str(caught.value)
  assert 'blk.0.ssm_a.weight: unexpected, in m.gguf' in str(caught.value)


def test_another_architecture(tmp_path):
  writer = package.GGUFWriter(tmp_path / 'm.gguf', 'gemma')
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.close()
  with pytest.raises(ValueError, match="'gemma' is not supported.*llama"):
    gguf.open_file(tmp_path / 'm.gguf')


@pytest.mark.parametrize('cut', [2, 30, 3000, -4])
def test_a_damaged_file_is_named(tmp_path, tokenizer, cut):
  found = small.random_tensors('llama')
  file = gguf_files.write(tmp_path / 'm.gguf', 'llama', found, tokenizer)
  file.write_bytes(file.read_bytes()[:cut])
  with pytest.raises(ValueError, match='m.gguf is damaged or no GGUF file'):
    gguf.open_file(file)


def test_a_missing_file_and_a_missing_package(tmp_path, monkeypatch):
  with pytest.raises(FileNotFoundError, match='m.gguf'):
    gguf.open_file(tmp_path / 'm.gguf')
  monkeypatch.setitem(sys.modules, 'gguf', None)
  with pytest.raises(ImportError, match=r"pip install -e '.\[interop\]'"):
    gguf.open_file(tmp_path / 'm.gguf')
