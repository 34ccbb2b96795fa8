"""The tensors of Hugging Face's families: their names, and places in our tree.

A matrix is [out, in] there and [in, out] here. Both rotate the halves of a
head, so that queries and keys need no other order.
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
import dataclasses
import re
from typing import Any
from typing import NamedTuple

import jax
from ml_collections import ConfigDict
import numpy as np
import tokenizers

from qat.interop import files
from qat.nn import transformer
from qat.quant import rules as rules_lib

_SHOWN = 20  # Lines of a list of differences.

# Modules of a block and of the whole model: ours, and theirs.
_LLAMA = {
  'embed': 'embed_tokens',
  'final_norm': 'norm',
  'attn/norm': 'layers.{}.input_layernorm',
  'attn/q': 'layers.{}.self_attn.q_proj',
  'attn/k': 'layers.{}.self_attn.k_proj',
  'attn/v': 'layers.{}.self_attn.v_proj',
  'attn/o': 'layers.{}.self_attn.o_proj',
  'ffn/norm': 'layers.{}.post_attention_layernorm',
  'ffn/gate': 'layers.{}.mlp.gate_proj',
  'ffn/up': 'layers.{}.mlp.up_proj',
  'ffn/down': 'layers.{}.mlp.down_proj',
}
_OPT = {
  'embed': 'decoder.embed_tokens',
  'positions': 'decoder.embed_positions',
  'final_norm': 'decoder.final_layer_norm',
  'attn/norm': 'decoder.layers.{}.self_attn_layer_norm',
  'attn/q': 'decoder.layers.{}.self_attn.q_proj',
  'attn/k': 'decoder.layers.{}.self_attn.k_proj',
  'attn/v': 'decoder.layers.{}.self_attn.v_proj',
  'attn/o': 'decoder.layers.{}.self_attn.out_proj',
  'ffn/norm': 'decoder.layers.{}.final_layer_norm',
  'ffn/up': 'decoder.layers.{}.fc1',
  'ffn/down': 'decoder.layers.{}.fc2',
}
# Buffers that older versions of transformers saved, and a head that is the
# embedding: known, and not read.
_IGNORED = re.compile(r'.*rotary_emb\.inv_freq|decoder\.version')
# Rows of OPT's table of positions before that of the first token.
OPT_OFFSET = 2


@dataclasses.dataclass(frozen=True)
class Source:
  """A model of another program, open.

  Attributes:
    config: as config.json has it.
    tensors: what the files say of each tensor, by transformers' name without a
      leading 'model.'.
    read: from such a name to the tensor.
    tokenizer: its tokenizer.
    begin: the id that an empty prompt begins with.
    end: the id that ends a text.
    about: where it comes from; JSON.
  """

  config: dict[str, Any]
  tensors: dict[str, files.Tensor]
  read: Callable[[str], np.ndarray]
  tokenizer: tokenizers.Tokenizer
  begin: int
  end: int
  about: dict[str, Any]


class Place(NamedTuple):
  """Where a tensor of theirs lies in our tree.

  Attributes:
    path: of our leaf: 'block_0/attn/q/kernel'.
    turned: whether theirs is ours transposed.
    skipped: how many first rows of theirs have no place here.
    shape: of theirs.
  """

  path: str
  turned: bool
  skipped: int
  shape: tuple[int, ...]


def table(config: ConfigDict) -> dict[str, Place]:
  """Where each tensor of theirs lies in our tree, by name without 'model.'.

  Args:
    config: ours, of a model that `families.to_hf` has a config for.
  """
  model = transformer.build(config, 'cpu', 1)
  params = transformer.abstract_params(model)
  names = _OPT if config.model.positions == 'learned' else _LLAMA
  # What quantizers learn is in the matrices that they make.
  learned = {
    f'{linear}/{name}'
    for linear in rules_lib.kernels(params)
    for name in model.rules.find(linear).parameters
  }
  found = {}
  for keys, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
    path = '/'.join(key.key for key in keys)
    if path in learned:
      continue
    name, skipped = _their_name(path, names), 0
    turned = path.endswith('/kernel')
    shape = leaf.shape[::-1] if turned else leaf.shape
    if path == 'positions':
      skipped = OPT_OFFSET
      shape = (shape[0] + skipped, *shape[1:])
    found[name] = Place(path, turned, skipped, tuple(shape))
  return found


def _their_name(path: str, names: Mapping[str, str]) -> str:
  if path == 'head':
    return 'lm_head.weight'
  if path == 'positions':
    return names[path] + '.weight'
  module, leaf = path.rsplit('/', 1)
  block = re.fullmatch(r'block_(\d+)/(.*)', module)
  layer, module = block.groups() if block else ('', module)
  suffix = 'bias' if leaf == 'bias' else 'weight'
  return f'{names[module].format(layer)}.{suffix}'


def check(
  places: Mapping[str, Place], source: Source, tied_embeddings: bool
) -> None:
  """Refuses tensors that are not the model's, before any is read.

  Raises:
    ValueError: lists the missing, the unexpected and those of another shape.
  """
  lines = []
  there = source.tensors
  for name, place in places.items():
    if name not in there:
      lines.append(f'{name}: missing; {list(place.shape)} wanted')
    elif there[name].shape != place.shape:
      lines.append(
        f'{name}: {list(there[name].shape)} in {there[name].file.name},'
        f' {list(place.shape)} wanted'
      )
    elif there[name].dtype not in files.DTYPES:
      lines.append(f'{name}: of dtype {there[name].dtype}, which is no float')
  ignored = {'lm_head.weight'} if tied_embeddings else set()
  for name in sorted(there.keys() - places.keys() - ignored):
    if not _IGNORED.fullmatch(name):
      lines.append(f'{name}: unexpected, in {there[name].file.name}')
  if lines:
    shown = '\n  '.join(lines[:_SHOWN] + ['...'] * (len(lines) > _SHOWN))
    raise ValueError(
      f'{source.about["name"]} is not the model that its config describes;'
      f' {len(lines)} tensors:\n  {shown}'
    )


def leaves(
  source: Source, places: Mapping[str, Place]
) -> Iterator[tuple[str, np.ndarray]]:
  """Path and array of each leaf of ours, read one by one."""
  for name, place in places.items():
    x = source.read(name)[place.skipped :]
    # A view would keep theirs in memory beside ours.
    yield place.path, np.ascontiguousarray(x.T) if place.turned else x


def tensors(
  places: Mapping[str, Place], leaf: Callable[[str], np.ndarray]
) -> Iterator[tuple[str, np.ndarray]]:
  """Inverts `leaves`: full name and array of each tensor of theirs.

  Args:
    places: the model's `table`.
    leaf: from one of our paths to the array.
  """
  for name, place in places.items():
    x = leaf(place.path)
    x = np.ascontiguousarray(x.T) if place.turned else x
    if place.skipped:  # Only padding has these positions.
      x = np.concatenate([np.zeros((place.skipped, *x.shape[1:]), x.dtype), x])
    yield full_name(name), x


def full_name(name: str) -> str:
  """The name with the 'model.' that a model with a head has."""
  return name if name.startswith('lm_head') else f'model.{name}'
