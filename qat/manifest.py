"""What a checkpoint says about itself: names, shapes, dtypes, digests.

A step is a folder `<directory>/<step>` with a file manifest.json; a folder
without one that is whole is no checkpoint.
"""

from collections.abc import Mapping
import hashlib
import json
import os
from pathlib import Path
import re
from typing import Any

import jax

from qat import digest

FILE = 'manifest.json'
FORMAT = 1  # A reader refuses a newer one.
_SHOWN = 20  # Lines of a list of differences.


class CorruptError(RuntimeError):
  """A step on disk is not what was saved; names what is wrong with it."""


def named(tree: Any) -> dict[str, Any]:
  """The leaves of a tree by name: {'params/embed/embedding': leaf, ...}.

  Args:
    tree: of jax arrays or jax.ShapeDtypeStruct.

  Returns:
    The leaves, in the order of jax.tree.leaves.

  Raises:
    ValueError, TypeError: a leaf cannot be named, or cannot be saved.
  """
  leaves = {}
  for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
    parts = [jax.tree_util.keystr((key,), simple=True) for key in path]
    name = '/'.join(parts)
    if not parts or not all(re.fullmatch(r'[\w-]+', part) for part in parts):
      raise ValueError(
        f'Leaf {name!r} cannot be named in a checkpoint: every part of its '
        'path must be letters, digits, "_" and "-".'
      )
    if name in leaves:
      raise ValueError(f'Two leaves of the state have the name {name!r}.')
    if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
      raise TypeError(
        f'Leaf {name!r} is a {type(leaf).__name__}; make it a jax array.'
      )
    if 0 in leaf.shape:
      raise ValueError(f'Leaf {name!r} of shape {leaf.shape} holds nothing.')
    try:
      digest.check_dtype(leaf.dtype)
    except TypeError as error:
      raise TypeError(f'Leaf {name!r}: {error}') from None
    leaves[name] = leaf
  if not leaves:
    raise ValueError('A state without a single array cannot be checkpointed.')
  return leaves


def make(step: int, leaves: Mapping[str, Any], extra: dict) -> dict:
  """A manifest that still lacks its leaves' digests.

  Args:
    step: the optimizer step.
    leaves: what `named` returned.
    extra: what else is saved; must be the same after a turn through JSON.

  Raises:
    ValueError, TypeError: `extra` is not.
  """
  copy = json.loads(json.dumps(extra, allow_nan=False))
  if copy != extra:
    raise ValueError(
      'What is saved beside the state must be the same after a turn through '
      f'JSON (lists, not tuples; keys that are strings); got {extra!r}.'
    )
  return {
    'format': FORMAT,
    'step': step,
    'extra': copy,  # The caller's own may change before it is written.
    'leaves': {
      name: {'shape': list(leaf.shape), 'dtype': str(leaf.dtype)}
      for name, leaf in leaves.items()
    },
  }


def write(path: Path, manifest: dict) -> None:
  """Writes the manifest of the step folder `path`."""
  outer = {'sha256': _sha256(manifest), 'manifest': manifest}
  (path / FILE).write_text(json.dumps(outer, indent=1))


def read(path: Path) -> dict:
  """The manifest of the step folder `path`, checked against its own hash.

  Args:
    path: a folder `<directory>/<step>`.

  Returns:
    {'format': int, 'step': int, 'extra': dict, 'leaves': {name: {'shape',
    'dtype', 'digest'}}}.

  Raises:
    CorruptError: it is missing, damaged, or another step's.
    ValueError: it was written by a newer version of this code.
  """
  try:
    outer = json.loads((path / FILE).read_bytes())
    manifest, whole = outer['manifest'], _sha256(outer['manifest'])
    if outer['sha256'] != whole:
      raise CorruptError(f'{path / FILE} does not match its own hash')
  except (FileNotFoundError, NotADirectoryError):
    raise CorruptError(f'{path} has no {FILE}') from None
  except (ValueError, KeyError, TypeError, RecursionError) as error:
    raise CorruptError(f'{path / FILE} is damaged: {error!r}') from None
  if manifest['format'] > FORMAT:
    raise ValueError(
      f'{path} has format {manifest["format"]} and this version reads up to '
      f'{FORMAT}; install the version that wrote it.'
    )
  if manifest['step'] != int(path.name):
    raise CorruptError(f'{path} holds step {manifest["step"]}')
  return manifest


def refuse_mismatch(
  path: Path, manifest: dict, leaves: Mapping[str, Any], *, partial: bool
) -> None:
  """Refuses a step whose leaves are not the wanted ones; casts nothing.

  Args:
    path: the step's folder, for the message.
    manifest: what `read` returned.
    leaves: the wanted ones, by name.
    partial: whether the step may hold more than these.

  Raises:
    ValueError: lists every difference of name, shape and dtype.
  """
  there = {name: _kind(**leaf) for name, leaf in manifest['leaves'].items()}
  here = {
    name: _kind(list(leaf.shape), str(leaf.dtype))
    for name, leaf in leaves.items()
  }
  lines = [
    f'  {name}: {there.get(name, "nothing")} in the checkpoint, '
    f'{here.get(name, "nothing")} here'
    for name in sorted(here.keys() if partial else there.keys() | here.keys())
    if there.get(name) != here.get(name)
  ]
  if lines:
    shown = '\n'.join(lines[:_SHOWN] + ['  ...'] * (len(lines) > _SHOWN))
    raise ValueError(
      f'{path} does not fit this state; {len(lines)} leaves differ:\n{shown}\n'
      'Give the config that it was saved with, or start in another workdir.'
    )


def numbered(directory: Path, suffix: str = '') -> list[int]:
  """Steps that have an entry `<step><suffix>`, complete or not; ascending.

  Raises:
    NotADirectoryError: `directory` is a file.
  """
  if not directory.exists():
    return []
  pattern = re.compile(r'(0|[1-9]\d*)' + re.escape(suffix), re.ASCII)
  matches = map(pattern.fullmatch, os.listdir(directory))
  return sorted(int(match[1]) for match in matches if match)


def steps(directory: Path) -> list[int]:
  """Steps on disk whose manifest is whole, ascending."""
  complete = []
  for step in numbered(directory):
    try:
      read(directory / str(step))
    except CorruptError:
      continue
    complete.append(step)
  return complete


def _kind(shape: list[int], dtype: str, **_: str) -> str:
  return f'{dtype}{shape}'


def _sha256(manifest: dict) -> str:
  text = json.dumps(manifest, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()
