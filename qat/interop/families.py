"""Model families of Hugging Face: from their config.json to ours, and back.

LLaMA 1 to 3, Mistral, Qwen2 and Qwen2.5, SmolLM2 (a LLaMA) and OPT. `tensors`
knows the names of their tensors.
"""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

# What transformers takes for a field that a config.json leaves out.
_ABSENT: dict[str, dict[str, Any]] = {
  'llama': dict(max_position_embeddings=2048, attention_bias=False),
  'mistral': dict(max_position_embeddings=131072, sliding_window=4096),
  'qwen2': dict(max_position_embeddings=32768, use_sliding_window=False),
  'opt': dict(
    max_position_embeddings=2048,
    do_layer_norm_before=True,
    activation_function='relu',
    enable_bias=True,
    layer_norm_elementwise_affine=True,
    _remove_final_layer_norm=False,
    tie_word_embeddings=True,
  ),
}
_ABSENT_ROTARY = dict(
  hidden_act='silu',
  rms_norm_eps=1e-6,
  rope_theta=10_000.0,
  mlp_bias=False,
  tie_word_embeddings=False,
)
# config.json names activations so; ours is on the right.
_ACTIVATIONS = {
  'silu': 'silu',
  'gelu_pytorch_tanh': 'gelu',
  'relu': 'relu',
  'relu2': 'relu2',
}
NO_SCALING = dict(
  kind='none',
  factor=1.0,
  low_freq_factor=1.0,
  high_freq_factor=4.0,
  original_positions=8192,
)


def config(
  base: ConfigDict, hf: Mapping[str, Any], name: str, dot_dtype: str
) -> ConfigDict:
  """Our config of a model of theirs.

  Args:
    base: a config of `configs.common`; it has what theirs does not say.
    hf: their config.json.
    name: of the model.
    dot_dtype: of matrix products: 'float32' computes what transformers does in
      float32, 'bfloat16' is faster on accelerators.

  Returns:
    The locked config; a full-precision model.

  Raises:
    ValueError: a family or a field that is not supported.
  """
  made = base.copy_and_resolve_references().unlock()
  made.name = name
  for field, value in model_fields(hf).items():
    made.model[field] = value
  made.model.dot_dtype = dot_dtype
  made.quant.rules = (('.*', 'full'),)
  made.data.seq_len = min(2048, made.model.max_positions)
  return made.lock()


def model_fields(hf: Mapping[str, Any]) -> dict[str, Any]:
  """The model section of our config for a config.json of theirs.

  Raises:
    ValueError: a family or a field that is not supported, or a missing field.
  """
  kind = hf.get('model_type')
  if kind not in _ABSENT:
    raise ValueError(
      f'config.json: model_type={kind!r} is not supported; these are:'
      f' {", ".join(_ABSENT)} (SmolLM2 is a llama).'
    )
  if hf.get('quantization_config'):
    raise ValueError(
      'config.json has a quantization_config: the tensors are no plain floats.'
      ' Take the checkpoint that it was made from.'
    )
  # An empty field is one that is left out, but for a window: there is none.
  given = {
    key: value
    for key, value in hf.items()
    if value is not None or key == 'sliding_window'
  }
  hf = {**(_ABSENT_ROTARY if kind != 'opt' else {}), **_ABSENT[kind], **given}
  needed = ['vocab_size', 'hidden_size', 'num_hidden_layers']
  needed += ['num_attention_heads']
  needed += ['ffn_dim' if kind == 'opt' else 'intermediate_size']
  if missing := [key for key in needed if key not in hf]:
    raise ValueError(f'config.json lacks {", ".join(missing)}.')
  fields = {
    'vocab_size': int(hf['vocab_size']),
    'd_model': int(hf['hidden_size']),
    'n_layers': int(hf['num_hidden_layers']),
    'n_heads': int(hf['num_attention_heads']),
    'norm': 'pre',
    'norm_shared': True,
    'tied_embeddings': bool(hf['tie_word_embeddings']),
    'n_experts': 1,
    'dtype': 'float32',
    'remat': 'none',
    'scan_layers': False,
    **(_opt_fields(hf) if kind == 'opt' else _rotary_fields(kind, hf)),
  }
  return fields


def _rotary_fields(kind: str, hf: Mapping[str, Any]) -> dict[str, Any]:
  """Of LLaMA, Mistral and Qwen2."""
  head, heads = hf.get('head_dim'), hf['num_attention_heads']
  if head is not None and head * heads != hf['hidden_size']:
    raise ValueError(
      f'config.json: head_dim={head} times num_attention_heads={heads} is not'
      f' hidden_size={hf["hidden_size"]}; such heads are not supported.'
    )
  bias = 'qkv' if kind == 'qwen2' else 'none'
  if kind == 'llama' and (hf['attention_bias'] or hf['mlp_bias']):
    if not (hf['attention_bias'] and hf['mlp_bias']):
      raise ValueError(
        f'config.json: attention_bias={hf["attention_bias"]} and'
        f' mlp_bias={hf["mlp_bias"]}; supported are both or neither.'
      )
    bias = 'all'
  positions = int(hf['max_position_embeddings'])
  windowed = kind == 'mistral' or (kind == 'qwen2' and hf['use_sliding_window'])
  if windowed and hf.get('sliding_window'):
    # A token sees so many tokens before it, itself included. In a sequence no
    # longer than that this is causal attention, which is what we compute.
    positions = min(positions, int(hf['sliding_window']))
  theta, scaling = _rope(hf)
  return {
    'n_kv_heads': int(hf.get('num_key_value_heads', heads)),
    'd_ff': int(hf['intermediate_size']),
    'activation': _activation(hf['hidden_act']),
    'norm_eps': float(hf['rms_norm_eps']),
    'norm_type': 'rms',
    'bias': bias,
    'positions': 'rotary',
    'max_positions': positions,
    'rope_theta': theta,
    'rope_scaling': ConfigDict(scaling),
    'ffn': 'gated',
  }


def _rope(hf: Mapping[str, Any]) -> tuple[float, dict[str, Any]]:
  """The base of the wavelengths, and our rope_scaling.

  Newer files have both in one field, `rope_parameters`.
  """
  rope = hf.get('rope_parameters') or hf.get('rope_scaling') or {}
  theta = float(rope.get('rope_theta', hf['rope_theta']))
  kind = rope.get('rope_type', rope.get('type', 'default'))
  share = rope.get('partial_rotary_factor', hf.get('partial_rotary_factor', 1))
  if share != 1:
    raise ValueError(f'config.json: partial_rotary_factor={share}, not 1.')
  if kind == 'default':
    return theta, dict(NO_SCALING)
  if kind != 'llama3':
    raise ValueError(
      f'config.json: rope scaling {rope!r} is not supported; the ones that are:'
      " 'default', 'llama3'."
    )
  names = {
    'factor': 'factor',
    'low_freq_factor': 'low_freq_factor',
    'high_freq_factor': 'high_freq_factor',
    'original_positions': 'original_max_position_embeddings',
  }
  if missing := [theirs for theirs in names.values() if theirs not in rope]:
    raise ValueError(f'config.json: rope scaling lacks {", ".join(missing)}.')
  values = {ours: float(rope[theirs]) for ours, theirs in names.items()}
  values['original_positions'] = int(values['original_positions'])
  return theta, {'kind': 'llama3', **values}


def _opt_fields(hf: Mapping[str, Any]) -> dict[str, Any]:
  width = hf.get('word_embed_proj_dim', hf['hidden_size'])
  if not hf['do_layer_norm_before'] or width != hf['hidden_size']:
    raise ValueError(
      'config.json: an OPT whose norms come after its layers'
      f' (do_layer_norm_before={hf["do_layer_norm_before"]}) or whose embedding'
      f' is projected (word_embed_proj_dim={width}, hidden_size='
      f'{hf["hidden_size"]}). Of the published sizes that is 350m alone, which'
      ' is not supported; take 125m or 1.3b.'
    )
  for field, only in (
    ('enable_bias', True),
    ('layer_norm_elementwise_affine', True),
    ('_remove_final_layer_norm', False),
  ):
    if hf[field] != only:
      raise ValueError(f'config.json: {field}={hf[field]}; only {only} is.')
  return {
    'n_kv_heads': int(hf['num_attention_heads']),
    'd_ff': int(hf['ffn_dim']),
    'activation': _activation(hf['activation_function']),
    'norm_eps': 1e-5,  # Fixed there.
    'norm_type': 'layer',
    'bias': 'all',
    'positions': 'learned',
    'max_positions': int(hf['max_position_embeddings']),
    'rope_scaling': ConfigDict(NO_SCALING),
    'ffn': 'plain',
  }


def _activation(name: str) -> str:
  if name not in _ACTIVATIONS:
    raise ValueError(
      f'config.json: activation {name!r} is not supported; one of'
      f' {", ".join(_ACTIVATIONS)} is.'
    )
  return _ACTIVATIONS[name]


def to_hf(config: ConfigDict) -> dict[str, Any]:
  """A config.json for transformers; `model_fields` inverts it.

  A Mistral becomes a llama, which within its window computes the same.

  Raises:
    ValueError: transformers has no such model; names the field.
  """
  m = config.model
  opt = m.positions == 'learned'
  wanted = dict(norm='pre', norm_shared=True, n_experts=1)
  wanted |= dict(ffn='plain' if opt else 'gated')
  wanted |= dict(norm_type='layer' if opt else 'rms')
  if opt:
    wanted |= dict(bias='all', norm_eps=1e-5, n_kv_heads=m.n_heads)
  for field, value in wanted.items():
    if m[field] != value:
      raise ValueError(
        f'config.model.{field}={m[field]!r}: transformers has no such model'
        f' (it would have to be {value!r}).'
      )
  kind = 'opt' if opt else 'qwen2' if m.bias == 'qkv' else 'llama'
  activation = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}
  common = {
    'architectures': [
      {'opt': 'OPT', 'qwen2': 'Qwen2', 'llama': 'Llama'}[kind] + 'ForCausalLM'
    ],
    'model_type': kind,
    'vocab_size': m.vocab_size,
    'hidden_size': m.d_model,
    'num_hidden_layers': m.n_layers,
    'num_attention_heads': m.n_heads,
    'max_position_embeddings': m.max_positions or config.data.seq_len,
    'tie_word_embeddings': m.tied_embeddings,
  }
  if opt:
    return common | {
      'ffn_dim': m.d_ff,
      'word_embed_proj_dim': m.d_model,
      'activation_function': activation[m.activation],
      'do_layer_norm_before': True,
    }
  scaling = None
  if m.rope_scaling.kind == 'llama3':
    scaling = {
      'rope_type': 'llama3',
      'factor': m.rope_scaling.factor,
      'low_freq_factor': m.rope_scaling.low_freq_factor,
      'high_freq_factor': m.rope_scaling.high_freq_factor,
      'original_max_position_embeddings': m.rope_scaling.original_positions,
    }
  return common | {
    'intermediate_size': m.d_ff,
    'num_key_value_heads': m.n_kv_heads,
    'hidden_act': activation[m.activation],
    'rms_norm_eps': m.norm_eps,
    'rope_theta': m.rope_theta,
    'rope_scaling': scaling,
    'attention_bias': m.bias != 'none',
    'mlp_bias': m.bias == 'all',
  }
