"""Small models of every family as transformers keeps them, made without it."""

import json
import pathlib
from typing import Any

import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy
import tokenizers

from configs import common
from qat.data import tokenizer as tokenizer_lib
from qat.interop import families
from qat.interop import tensors
from tests import tiny

_COMMON = dict(
  vocab_size=264,
  hidden_size=32,
  num_hidden_layers=2,
  num_attention_heads=4,
  max_position_embeddings=64,
  bos_token_id=0,
  eos_token_id=0,
)
_ROTARY = _COMMON | dict(
  intermediate_size=48,
  num_key_value_heads=2,
  rope_theta=5000.0,
  rms_norm_eps=1e-5,
  tie_word_embeddings=False,
)
# A config.json of each kind of model.
CONFIGS: dict[str, dict[str, Any]] = {
  'llama': _ROTARY | dict(model_type='llama'),
  'llama3': _ROTARY
  | dict(
    model_type='llama',
    rope_scaling=dict(
      rope_type='llama3',
      factor=8.0,
      low_freq_factor=1.0,
      high_freq_factor=4.0,
      original_max_position_embeddings=32,
    ),
  ),
  'biased': _ROTARY
  | dict(model_type='llama', attention_bias=True, mlp_bias=True),
  'smollm2': _ROTARY | dict(model_type='llama', tie_word_embeddings=True),
  'mistral': _ROTARY | dict(model_type='mistral', sliding_window=48),
  'qwen2': _ROTARY | dict(model_type='qwen2', tie_word_embeddings=True),
  'opt': _COMMON | dict(model_type='opt', ffn_dim=48, word_embed_proj_dim=32),
}


@pytest.fixture(scope='session')
def tokenizer() -> tokenizers.Tokenizer:
  """A byte-level BPE of 264 tokens; 0 ends a text."""
  return tokenizer_lib.train(['the sea, the ship and the sea '] * 9, 264)


@pytest.fixture
def base():
  return common.base('tiny')


@pytest.fixture(autouse=True)
def quickly():
  with tiny.compiled_quickly():
    yield


def random_tensors(kind: str, seed: int = 0) -> dict[str, np.ndarray]:
  """float32 tensors under transformers' full names."""
  rng = np.random.default_rng(seed)
  config = families.config(common.base('tiny'), CONFIGS[kind], kind, 'float32')
  return {
    tensors.full_name(name): np.float32(rng.normal(0, 0.3, place.shape))
    for name, place in tensors.table(config).items()
  }


def write(
  folder: pathlib.Path,
  kind: str,
  tokenizer: tokenizers.Tokenizer,
  found: dict[str, np.ndarray] | None = None,
) -> pathlib.Path:
  """A folder as transformers writes it, of random tensors or of `found`."""
  folder.mkdir(parents=True, exist_ok=True)
  (folder / 'config.json').write_text(json.dumps(CONFIGS[kind]))
  (folder / 'tokenizer.json').write_text(tokenizer.to_str())
  found = random_tensors(kind) if found is None else found
  safetensors_numpy.save_file(found, folder / 'model.safetensors')
  return folder


def split(folder: pathlib.Path) -> None:
  """Cuts model.safetensors into three shards with an index."""
  whole = safetensors_numpy.load_file(folder / 'model.safetensors')
  (folder / 'model.safetensors').unlink()
  weight_map = {}
  for i in range(3):
    file = f'model-{i + 1:05d}-of-00003.safetensors'
    part = {name: whole[name] for name in sorted(whole)[i::3]}
    safetensors_numpy.save_file(part, folder / file)
    weight_map |= dict.fromkeys(part, file)
  (folder / 'model.safetensors.index.json').write_text(
    json.dumps({'metadata': {}, 'weight_map': weight_map})
  )
