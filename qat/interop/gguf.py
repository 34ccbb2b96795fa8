"""GGUF files in: floats and every block format that the `gguf` package knows.

A file is turned into what a folder of transformers would hold. Its blocks
(Q8_0, Q4_0, Q4_1, Q4_K, ...) become the float32 numbers that they stand for,
tensor by tensor. llama.cpp keeps the rows of a LLaMA's queries and keys so that
rotary pairs are neighbours; they are put back into halves.
"""

import pathlib
import re
from typing import Any

import numpy as np
import tokenizers

from qat.data import tokenizer as tokenizer_lib
from qat.interop import files
from qat.interop import gguf_tokenizer
from qat.interop import hf
from qat.interop import tensors

# Architectures, and whether rotary pairs are neighbours there.
_PAIRS = {'llama': True, 'qwen2': False}
_NAMES = {
  'token_embd': 'embed_tokens',
  'output_norm': 'norm',
  'output': 'lm_head',
  'attn_norm': 'input_layernorm',
  'attn_q': 'self_attn.q_proj',
  'attn_k': 'self_attn.k_proj',
  'attn_v': 'self_attn.v_proj',
  'attn_output': 'self_attn.o_proj',
  'ffn_norm': 'post_attention_layernorm',
  'ffn_gate': 'mlp.gate_proj',
  'ffn_up': 'mlp.up_proj',
  'ffn_down': 'mlp.down_proj',
}
# LLaMA 3's stretched wavelengths, as a table of factors.
_ROPE = 'rope_freqs.weight'


def open_file(
  path: pathlib.Path,
  *,
  tokenizer: pathlib.Path | None = None,
  end_of_text: str = '',
) -> tensors.Source:
  """Opens a GGUF file; its tensors are mapped, not read.

  Args:
    path: the file.
    tokenizer: a tokenizer.json to take instead of what the file holds.
    end_of_text: the token that ends a text and begins the next, where it is
      another than the file says.

  Raises:
    ImportError: the package `gguf` is missing.
    FileNotFoundError: there is no such file.
    ValueError: it is damaged, or of an architecture that is not supported.
  """
  try:
    import gguf
  except ImportError as error:
    raise ImportError(
      f"{path}: GGUF files need the package gguf; pip install -e '.[interop]'."
    ) from error
  if not path.is_file():
    raise FileNotFoundError(f'No file {path}.')
  try:
    reader = gguf.GGUFReader(path)
    fields = {name: f.contents() for name, f in reader.fields.items()}
  except (ValueError, IndexError, KeyError) as error:
    raise ValueError(
      f'{path} is damaged or no GGUF file: {error}. Copy it again.'
    ) from error
  by_name = {tensor.name: tensor for tensor in reader.tensors}
  kind = fields.get('general.architecture')
  if kind not in _PAIRS:
    raise ValueError(
      f'{path}: architecture {kind!r} is not supported; these are:'
      f' {", ".join(_PAIRS)}.'
    )
  config = _config(path, kind, fields, by_name)
  found, renamed = {}, {}
  for name, tensor in by_name.items():
    if name == _ROPE:
      continue
    short = _short_name(name)
    renamed[short] = tensor
    shape = tuple(int(size) for size in tensor.shape[::-1])
    found[short] = files.Tensor(path, shape, 'F32')

  def read(short: str) -> np.ndarray:
    tensor = renamed[short]
    try:
      x = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    except (NotImplementedError, ValueError) as error:
      raise ValueError(
        f'{path}: {tensor.name} has format {tensor.tensor_type.name}: {error}'
      ) from error
    x = np.asarray(x, np.float32).reshape(found[short].shape)
    heads = {'q_proj': 'num_attention_heads', 'k_proj': 'num_key_value_heads'}
    projection = short.split('.')[-2]
    if _PAIRS[kind] and projection in heads:
      x = halves(x, config[heads[projection]])
    return x

  loaded = _tokenizer(path, fields, tokenizer)
  begin, end = hf.text_ids(
    loaded,
    fields.get('tokenizer.ggml.bos_token_id'),
    fields.get('tokenizer.ggml.eos_token_id'),
    end_of_text,
  )
  formats = sorted({t.tensor_type.name for t in by_name.values()})
  return tensors.Source(
    config=config,
    tensors=found,
    read=read,
    tokenizer=loaded,
    begin=begin,
    end=end,
    about={
      'name': path.name,
      'format': 'gguf',
      'model_type': kind,
      'formats': formats,
      'files': {path.name: path.stat().st_size},
    },
  )


def halves(x: np.ndarray, heads: int) -> np.ndarray:
  """Rows of neighbours (2i, 2i + 1) of each head, put to (i, i + H/2).

  Args:
    x: `[heads * H, ...]`.
    heads: how many heads' rows these are.
  """
  split = x.reshape(heads, -1, 2, *x.shape[1:])
  return split.swapaxes(1, 2).reshape(x.shape)


def _short_name(name: str) -> str:
  """'blk.3.attn_q.weight' -> 'layers.3.self_attn.q_proj.weight'."""
  match = re.fullmatch(r'(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)', name)
  if not match or match[2] not in _NAMES:
    return name  # Reported as one that the model does not have.
  layer = f'layers.{match[1]}.' if match[1] else ''
  return f'{layer}{_NAMES[match[2]]}.{match[3]}'


def _config(
  path: pathlib.Path, kind: str, fields: dict[str, Any], by_name: dict[str, Any]
) -> dict[str, Any]:
  """The config.json that the fields of a file amount to."""

  def field(name: str) -> Any:
    if f'{kind}.{name}' not in fields:
      raise ValueError(f'{path} lacks the field {kind}.{name}.')
    return fields[f'{kind}.{name}']

  if 'token_embd.weight' not in by_name:
    raise ValueError(f'{path} lacks the tensor token_embd.weight.')
  heads, width = field('attention.head_count'), field('embedding_length')
  head = fields.get(f'{kind}.attention.key_length', width // heads)
  if fields.get(f'{kind}.rope.dimension_count', head) != head:
    raise ValueError(
      f'{path}: {kind}.rope.dimension_count='
      f'{fields[f"{kind}.rope.dimension_count"]} of heads of width {head}; only'
      ' whole heads are rotated.'
    )
  if fields.get(f'{kind}.expert_count', 0):
    raise ValueError(f'{path}: a mixture of experts is not supported.')
  if (scaling := fields.get(f'{kind}.rope.scaling.type', 'none')) != 'none':
    raise ValueError(f'{path}: rope scaling {scaling!r} is not supported.')
  theta = float(fields.get(f'{kind}.rope.freq_base', 10_000.0))
  config = {
    # The window of a Mistral stands there under LLaMA's name.
    'model_type': 'mistral'
    if f'{kind}.attention.sliding_window' in fields
    else kind,
    # A row of the embedding for each token, and perhaps for some more.
    'vocab_size': int(by_name['token_embd.weight'].shape[1]),
    'hidden_size': width,
    'head_dim': head,
    'num_hidden_layers': field('block_count'),
    'num_attention_heads': heads,
    'num_key_value_heads': fields.get(f'{kind}.attention.head_count_kv', heads),
    'intermediate_size': field('feed_forward_length'),
    'max_position_embeddings': field('context_length'),
    'sliding_window': fields.get(f'{kind}.attention.sliding_window'),
    # Files hold it in float32; the shortest decimal number is what was meant.
    'rms_norm_eps': float(
      str(np.float32(field('attention.layer_norm_rms_epsilon')))
    ),
    'rope_theta': float(str(np.float32(theta))),
    'tie_word_embeddings': 'output.weight' not in by_name,
  }
  if _ROPE in by_name:
    config['rope_scaling'] = _rope_scaling(
      path, np.array(by_name[_ROPE].data, np.float32).ravel(), theta
    )
  return config


def _rope_scaling(
  path: pathlib.Path, factors: np.ndarray, theta: float
) -> dict[str, Any]:
  """LLaMA 3's rope_scaling whose factors these are.

  The file does not hold the parameters; of those that LLaMA 3.1 to 3.3 were
  published with only the factor differs, and it is the largest of the table.

  Raises:
    ValueError: the factors are not of that kind.
  """
  scaling = {
    'rope_type': 'llama3',
    'factor': float(factors.max()),
    'low_freq_factor': 1.0,
    'high_freq_factor': 4.0,
    'original_max_position_embeddings': 8192,
  }
  expected = llama3_factors(scaling, theta, len(factors))
  if not np.allclose(factors, expected, rtol=1e-3):
    raise ValueError(
      f'{path}: {_ROPE} is not the scaling of a LLaMA 3 (8192 positions, low'
      ' and high frequency factors 1 and 4); take the safetensors of the model.'
    )
  return scaling


def llama3_factors(
  scaling: dict[str, Any], theta: float, half: int
) -> np.ndarray:
  """What each of `half` rotary wavelengths is multiplied by, float64."""
  wavelength = 2 * np.pi * theta ** (np.arange(half) / half)
  turns = scaling['original_max_position_embeddings'] / wavelength
  low, high = scaling['low_freq_factor'], scaling['high_freq_factor']
  smooth = np.clip((turns - low) / (high - low), 0, 1)
  return 1 / ((1 - smooth) / scaling['factor'] + smooth)


def _tokenizer(
  path: pathlib.Path, fields: dict[str, Any], given: pathlib.Path | None
) -> tokenizers.Tokenizer:
  if given is not None:
    return tokenizer_lib.load(given)
  try:
    return gguf_tokenizer.rebuild(fields)
  except (ValueError, KeyError) as error:
    raise ValueError(
      f'{path}: its tokenizer cannot be rebuilt: {error} Give the'
      ' tokenizer.json of the model (--tokenizer).'
    ) from error
