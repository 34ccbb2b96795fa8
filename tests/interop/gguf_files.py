"""GGUF files of small models, written as llama.cpp's converter writes them."""

import json
import pathlib
import re
from typing import Any

import gguf
import numpy as np
import tokenizers

from tests.interop import conftest as small

NAMES = {
  'model.embed_tokens': 'token_embd',
  'model.norm': 'output_norm',
  'lm_head': 'output',
  'input_layernorm': 'attn_norm',
  'self_attn.q_proj': 'attn_q',
  'self_attn.k_proj': 'attn_k',
  'self_attn.v_proj': 'attn_v',
  'self_attn.o_proj': 'attn_output',
  'post_attention_layernorm': 'ffn_norm',
  'mlp.gate_proj': 'ffn_gate',
  'mlp.up_proj': 'ffn_up',
  'mlp.down_proj': 'ffn_down',
}


def tokenizer_fields(tokenizer: tokenizers.Tokenizer) -> dict[str, Any]:
  """The fields of a byte-level BPE whose token 0 is special."""
  content = json.loads(tokenizer.to_str())
  vocab = sorted(content['model']['vocab'].items(), key=lambda item: item[1])
  return {
    'tokenizer.ggml.model': 'gpt2',
    'tokenizer.ggml.pre': 'gpt-2',
    'tokenizer.ggml.tokens': [token for token, _ in vocab],
    'tokenizer.ggml.token_type': [3] + [1] * (len(vocab) - 1),
    'tokenizer.ggml.merges': [' '.join(m) for m in content['model']['merges']],
    'tokenizer.ggml.bos_token_id': 0,
    'tokenizer.ggml.eos_token_id': 0,
  }


def fields(kind: str) -> dict[str, Any]:
  """Those of the architecture."""
  hf = small.CONFIGS[kind]
  arch = 'qwen2' if kind == 'qwen2' else 'llama'
  return {
    f'{arch}.block_count': hf['num_hidden_layers'],
    f'{arch}.context_length': hf['max_position_embeddings'],
    f'{arch}.embedding_length': hf['hidden_size'],
    f'{arch}.feed_forward_length': hf['intermediate_size'],
    f'{arch}.attention.head_count': hf['num_attention_heads'],
    f'{arch}.attention.head_count_kv': hf['num_key_value_heads'],
    f'{arch}.rope.freq_base': hf['rope_theta'],
    f'{arch}.attention.layer_norm_rms_epsilon': hf['rms_norm_eps'],
  }


def write(
  path: pathlib.Path,
  kind: str,
  found: dict[str, np.ndarray],
  tokenizer: tokenizers.Tokenizer,
  *,
  formats: dict[str, Any] | None = None,
  changes: dict[str, Any] | None = None,
  extra: dict[str, np.ndarray] | None = None,
) -> pathlib.Path:
  """Writes a file.

  Args:
    path: where.
    kind: of `conftest.CONFIGS`.
    found: tensors under transformers' names.
    tokenizer: of the model.
    formats: from a part of a tensor's name there to its format; float32 else.
    changes: fields that are different; None: left out.
    extra: tensors under their GGUF names.
  """
  arch = 'qwen2' if kind == 'qwen2' else 'llama'
  writer = gguf.GGUFWriter(path, arch)
  values = fields(kind) | tokenizer_fields(tokenizer) | (changes or {})
  for key, value in values.items():
    if isinstance(value, list):
      writer.add_array(key, value)
    elif isinstance(value, bool):
      writer.add_bool(key, value)
    elif isinstance(value, int):
      writer.add_uint32(key, value)
    elif isinstance(value, float):
      writer.add_float32(key, value)
    elif value is not None:
      writer.add_string(key, value)
  heads = small.CONFIGS[kind]
  for name, x in found.items():
    match = re.fullmatch(r'(?:model\.layers\.(\d+)\.)?(.*)\.(\w+)', name)
    block = f'blk.{match[1]}.' if match[1] else ''
    if arch == 'llama' and 'q_proj' in name:
      x = pairs(x, heads['num_attention_heads'])
    if arch == 'llama' and 'k_proj' in name:
      x = pairs(x, heads['num_key_value_heads'])
    wanted = [f for part, f in (formats or {}).items() if part in name]
    theirs = f'{block}{NAMES[match[2]]}.{match[3]}'
    if wanted:
      data = gguf.quants.quantize(x, wanted[0])
      writer.add_tensor(theirs, data, raw_dtype=wanted[0])
    else:
      writer.add_tensor(theirs, x)
  for name, x in (extra or {}).items():
    writer.add_tensor(name, x)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


def pairs(x: np.ndarray, heads: int) -> np.ndarray:
  """Rows as llama.cpp has them; inverts `gguf.halves`."""
  split = x.reshape(heads, 2, -1, *x.shape[1:])
  return split.swapaxes(1, 2).reshape(x.shape)
