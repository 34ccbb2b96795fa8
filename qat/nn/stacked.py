"""Trees of a model whose blocks are scanned over, and their form by layer.

A scanned model keeps the parameters of all its blocks in one subtree, 'blocks',
whose arrays have a leading axis of layers: 'blocks/attn/q/kernel' is
`[L, K, N]`. Logs, rules, reports and everything else that names layers speaks
of 'block_0/attn/q', ..., in either form.
"""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
import re
from typing import Any

import jax
from ml_collections import ConfigDict
import numpy as np

from qat.quant import composed
from qat.quant import rules as rules_lib

BLOCKS = 'blocks'  # The subtree of a scanned model.


class UnlikeError(ValueError):
  """Layers that differ in their form cannot be stacked."""


def unstacked(tree: Mapping[str, Any]) -> dict[str, Any]:
  """A tree with a subtree for each block; one without 'blocks' as it is.

  Args:
    tree: parameters, or what modules sowed or returned, keyed by module; its
      leaves are arrays, or shapes (`jax.ShapeDtypeStruct`).

  Returns:
    'block_0', ..., 'block_{L-1}' in the place of 'blocks', in the order of the
    layers, each with its part of every array.
  """
  flat = {}
  for name, branch in tree.items():
    if name != BLOCKS:
      flat[name] = branch
      continue
    layers = {leaf.shape[0] for leaf in jax.tree.leaves(branch)}
    if len(layers) > 1:
      raise ValueError(f'{BLOCKS!r} stacks {sorted(layers)} layers at once.')
    for i in range(max(layers, default=0)):
      flat[f'block_{i}'] = _layer(branch, i)
  return flat


def stacked(tree: dict[str, Any]) -> dict[str, Any]:
  """Inverts `unstacked`, on the host; a tree without 'block_0' as it is.

  Args:
    tree: parameters by layer; quantized matrices may be among them. Its blocks
      are taken out and emptied array by array, so that a host need not have
      room for a model twice.

  Returns:
    'blocks', of NumPy arrays, in the place of 'block_0', ...

  Raises:
    UnlikeError: two layers differ in what they have, or in a shape. The tree is
      whole then.
  """
  names = [name for name in tree if re.fullmatch(r'block_\d+', name)]
  names.sort(key=lambda name: int(name.removeprefix('block_')))
  made = {name: branch for name, branch in tree.items() if name not in names}
  if not names:
    return made
  first, *others = (_kinds(tree[name]) for name in names)
  for name, kinds in zip(names[1:], others, strict=True):
    for path in first | kinds:
      if first.get(path) != kinds.get(path):
        raise UnlikeError(
          f'{names[0]}{path} and {name}{path} are not of one form:'
          f' {first.get(path)} and {kinds.get(path)}.'
        )
  return made | {BLOCKS: _stack([tree.pop(name) for name in names])}


def _stack(layers: list[Any]) -> Any:
  if isinstance(layers[0], dict):
    return {
      name: _stack([layer.pop(name) for layer in layers])
      for name in [*layers[0]]
    }
  return jax.tree.map(lambda *leaves: np.stack(leaves), *layers)


def _kinds(tree: Any) -> dict[str, str]:
  """By path what a leaf must have in common with that of another layer."""
  pairs = jax.tree_util.tree_flatten_with_path(
    tree, is_leaf=composed.is_quantized
  )[0]
  return {
    jax.tree_util.keystr(keys): ', '.join(
      [f'{leaf.dtype}{list(leaf.shape)}' for leaf in jax.tree.leaves(leaf)]
      + ([str(jax.tree.structure(leaf))] if composed.is_quantized(leaf) else [])
    )
    for keys, leaf in pairs
  }


def _layer(tree: Any, i: int) -> Any:
  # Not jax.tree.map: it sorts the keys, whose order may be that of the calls.
  if isinstance(tree, Mapping):
    return {name: _layer(branch, i) for name, branch in tree.items()}
  return jax.tree.map(lambda leaf: _part(leaf, i), tree)


def _part(leaf: Any, i: int) -> Any:
  if isinstance(leaf, jax.ShapeDtypeStruct):
    return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
  return leaf[i]


def one_layer(path: str) -> str:
  """'blocks/attn/q' -> 'block_0/attn/q'; other paths as they are.

  For decisions by path that are the same for every layer (see `told_apart`).
  """
  return re.sub(f'^{BLOCKS}/', 'block_0/', path)


def told_apart(
  paths: Iterable[str], decide: Callable[[str], object]
) -> tuple[str, str] | None:
  """Two paths that differ in their layer alone and are decided differently.

  Args:
    paths: of layers or parameters, by layer: 'block_3/attn/q'.
    decide: what a regex makes of a path.

  Returns:
    The path in block_0 and the first that differs from it; None where all
    layers are alike, and a scan over them can be.
  """
  for path in paths:
    first = re.sub(r'^block_\d+/', 'block_0/', path)
    if decide(path) != decide(first):
      return first, path
  return None


def errors(
  config: ConfigDict, rules: rules_lib.Rules, params: Any
) -> list[str]:
  """What in a config tells apart layers that one compiled block computes.

  Args:
    config: a run's config, with `model.scan_layers`.
    rules: its rules.
    params: its (abstract) parameters, unstacked.

  Returns:
    Messages that name field, value and remedy.
  """
  remedy = (
    'model.scan_layers=True computes all layers alike; set it to False, or'
    ' treat them alike.'
  )
  found = []
  apart = told_apart(rules_lib.kernels(params), rules.find)
  if apart:
    first, other = (f'{p} ({rules.rules[rules.index(p)][0]!r})' for p in apart)
    found.append(
      f'quant.rules: {first} and {other} fall under different rules, but'
      f' {remedy}'
    )
  paths = [
    '/'.join(key.key for key in keys)
    for keys, _ in jax.tree_util.tree_leaves_with_path(params)
  ]
  for field in ('no_decay', 'scales'):
    pattern = config.optim[field]
    apart = told_apart(
      paths, lambda path, p=pattern: bool(re.fullmatch(p, path))
    )
    if apart:
      found.append(
        f'optim.{field}={pattern!r} covers only one of {" and ".join(apart)},'
        f' but {remedy}'
      )
  return found
