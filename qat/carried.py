"""Quantized matrices in a training state: carried as they are, never trained.

A model that was quantized after training has `composed.Quantized` leaves in the
place of kernels, and so has the state of a run that starts from it. Their codes
are packed there, two or four to a byte (`quant.narrow`), and are unpacked where
they are read. A checkpoint stores their arrays under names of their own, as
those of any leaf; what they are parts of stands in its `extra`, so that the
tree can be built before an array is read.
"""

from collections.abc import Mapping
import dataclasses
from pathlib import Path
import re
from typing import Any

import jax
from jax import numpy as jnp
from ml_collections import ConfigDict
import numpy as np

from qat import estimators
from qat import manifest
from qat.interop import folder as folder_lib
from qat.nn import stacked
from qat.nn import transformer
from qat.quant import composed
from qat.quant import narrow
from qat.quant import qtensor
from qat.quant import rules as rules_lib

EXTRA = 'quantized'  # The key of a checkpoint's `extra`.
# By parameter path what a quantized leaf is made of, as JSON has it.
Description = dict[str, Any]

_KINDS = {
  kind.__name__: kind
  for kind in (*composed.KINDS, composed.Levels, narrow.Narrow)
}
# Those whose `codes` are read by `astype` alone.
_WITH_CODES = (
  *(qtensor.QTensor, composed.TwoLevel, composed.Clustered),
  composed.MixedBits,
)


def packed(params: Any) -> Any:
  """A tree whose quantized leaves have codes of as few bits as they need.

  Args:
    params: a parameter tree, of NumPy arrays.
  """
  return jax.tree.map(_packed, params, is_leaf=composed.is_quantized)


def unpacked(params: Any) -> Any:
  """Inverts `packed`: int8 codes, as methods and files have them.

  Args:
    params: a parameter tree, or a leaf.
  """
  is_narrow = lambda leaf: isinstance(leaf, narrow.Narrow)  # noqa: E731
  return jax.tree.map(
    lambda a: a.astype(jnp.int8) if is_narrow(a) else a,
    params,
    is_leaf=is_narrow,
  )


def shapes(config: ConfigDict) -> dict[str, Any]:
  """Shapes of the parameters of a config's model, before there is a mesh."""
  alone = config.copy_and_resolve_references().unlock()
  alone.mesh.data = alone.mesh.fsdp = 1
  model = transformer.build(alone.lock(), jax.default_backend(), 1)
  return transformer.abstract_params(model)


def described_from_shapes(
  config: ConfigDict,
) -> tuple[ConfigDict, Description]:
  """What a run from a partly quantized model has, known without the model.

  To compile such a run for a shape: what has a rule for its weights and is not
  trained counts as quantized for good by that rule.

  Args:
    config: a run's config, with no `init.model`.

  Returns:
    The config with rules as the model's, which leave these weights alone; and
    the description, empty where there is nothing of the kind.
  """
  own = rules_lib.make_rules(config.quant.rules, config.quant.specs)
  changed = config.copy_and_resolve_references().unlock()
  described, rules, used = {}, {}, set()
  for path, layer in rules_lib.layers(shapes(config)).items():
    index = own.index(stacked.one_layer(path))
    spec = own.rules[index][1]
    if spec.weight == 'none' or estimators.is_trained(config, f'{path}/kernel'):
      used.add(index)
      continue
    leaf = jax.eval_shape(spec.quantize, layer)
    values = qtensor.ALPHABETS[leaf.alphabet]
    if (bits := narrow.holding(int(values[0]), int(values[-1]))) < 8:
      codes = narrow.shaped(leaf.codes.shape, bits)
      leaf = dataclasses.replace(leaf, codes=codes)
    described[f'{path}/kernel'] = _described(leaf)
    name = f'frozen_{config.quant.rules[index][1]}'
    without = dataclasses.replace(spec, weight='none')
    changed.quant.specs[name] = ConfigDict(dataclasses.asdict(without))
    rules[re.sub(rf'^{stacked.BLOCKS}/', r'block_\\d+/', path)] = name
  others = [config.quant.rules[i] for i in sorted(used)]
  changed.quant.rules = (*rules.items(), *others)
  return changed.lock(), described


def describe(params: Any) -> Description:
  """What the quantized leaves of a tree are made of; empty without any.

  Args:
    params: a parameter tree, of arrays or of shapes.
  """
  return {
    path: _described(leaf)
    for path, leaf in folder_lib.flat(params).items()
    if composed.is_quantized(leaf)
  }


def with_shapes(params: Any, description: Mapping[str, Any]) -> Any:
  """A tree of shapes with those of quantized leaves where there are such.

  Args:
    params: of `transformer.abstract_params`.
    description: from `describe`.

  Raises:
    ValueError: it describes what the model does not have.
  """
  leaves = folder_lib.flat(params)
  for path, made in description.items():
    leaf = _structure(made)
    if path not in leaves or leaves[path].shape != leaf.shape:
      raise ValueError(
        f'The checkpoint holds a quantized matrix {path!r} of'
        f' {list(leaf.shape)}, which is not of this model.'
      )
    leaves[path] = leaf
  return folder_lib.nested(leaves)


def saved(checkpoints: Path) -> Description:
  """The description that a run's checkpoints share; empty without any.

  Args:
    checkpoints: the folder of the checkpoints.
  """
  for step in reversed(manifest.numbered(checkpoints)):
    try:
      extra = manifest.read(checkpoints / str(step))['extra']
    except manifest.CorruptError:
      continue  # Told of, and set aside, by who restores it.
    return extra.get(EXTRA, {})
  return {}


def _packed(leaf: Any) -> Any:
  if isinstance(leaf, composed.Sum):
    return composed.Sum(tuple(map(_packed, leaf.parts)))
  if isinstance(leaf, _WITH_CODES) and leaf.codes.dtype == np.int8:
    return dataclasses.replace(leaf, codes=narrow.pack(leaf.codes))
  return leaf


def _described(value: Any) -> Any:
  if value is None or isinstance(value, str | int):
    return value
  if isinstance(value, tuple):
    return [_described(part) for part in value]
  if dataclasses.is_dataclass(value):
    fields = dataclasses.fields(value)
    parts = {f.name: _described(getattr(value, f.name)) for f in fields}
    return {'kind': type(value).__name__, **parts}
  return {'shape': list(value.shape), 'dtype': str(value.dtype)}


def _structure(made: Any) -> Any:
  """Inverts `_described`, with shapes for arrays."""
  if isinstance(made, list):
    return tuple(map(_structure, made))
  if not isinstance(made, Mapping):
    return made
  if 'kind' not in made:
    return jax.ShapeDtypeStruct(tuple(made['shape']), made['dtype'])
  parts = {k: _structure(v) for k, v in made.items() if k != 'kind'}
  return _KINDS[made['kind']](**parts)
