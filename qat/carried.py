"""Quantized matrices in a training state: carried as they are, never trained.

A model that was quantized after training has `composed.Quantized` leaves in the
place of kernels, and so has the state of a run that starts from it. A
checkpoint stores their arrays under names of their own, as those of any leaf;
what they are parts of stands in its `extra`, so that the tree can be built
before an array is read.
"""

from collections.abc import Mapping
import dataclasses
from pathlib import Path
from typing import Any

import jax

from qat import manifest
from qat.interop import folder as folder_lib
from qat.quant import composed

EXTRA = 'quantized'  # The key of a checkpoint's `extra`.
# By parameter path what a quantized leaf is made of, as JSON has it.
Description = dict[str, Any]

_KINDS = {kind.__name__: kind for kind in (*composed.KINDS, composed.Levels)}


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
