"""w + scale * z for a parameter tree, with z made again wherever it is needed.

Parameters are never overwritten with perturbed ones: (w + e) - e is not w in
floating point, and in bfloat16 w + e often is w. The sum is a value of its own,
in float32, on its way to what reads it: of a matrix at a time, and part of the
loop over its elements where one alone reads it. One copy of the parameters
lives, and nothing has to be restored.
"""

from collections.abc import Iterator
import dataclasses
import functools
import re
from typing import Any
import zlib

import jax
from jax import lax
from jax import numpy as jnp
from jax.experimental import xla_metadata
import numpy as np

from qat.zo import noise

# 'block_3/attn/q' and layer 3 of the stacked 'blocks/attn/q' are one thing.
_LAYER = re.compile(r'block_(\d+)/')
_STACK = re.compile(r'blocks/')
# Of keys: what `noise` computes.
_IMPLEMENTATION = 'threefry2x32'


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=('array', 'key_data', 'scale'),
  meta_fields=('shared',),
)
@dataclasses.dataclass(frozen=True)
class Perturbed:
  """A parameter that is perturbed where it is read.

  It can stand in a parameter tree, and be scanned over: then each turn of the
  loop perturbs its own layer, where the perturbed form of a stacked array would
  be a copy of all layers.

  Attributes:
    array: the parameter, float32 or bfloat16 `[...]`; stacked `[L, ...]`.
    key_data: uint32 `[2]`; stacked `[L, 2]`.
    scale: of the noise, float32 `[]`; stacked `[L]`.
    shared: whether several loops read it, as those of a quantizer do.
  """

  array: jax.Array
  key_data: jax.Array
  scale: jax.Array
  shared: bool

  @property
  def shape(self) -> tuple[int, ...]:
    """Of the parameter."""
    return self.array.shape

  def read(self) -> jax.Array:
    """array + scale * z, float32."""
    parts = self.array, self.key_data, self.scale
    if not self.shared:
      return _sum(*parts)
    return lax.platform_dependent(*parts, cpu=_sum_apart, default=_sum)


@jax.jit
def _sum(array: jax.Array, key_data: jax.Array, scale: jax.Array) -> jax.Array:
  # In a loop over keys, the float32 form of bfloat16 parameters would be
  # computed before it, and stored.
  array, key_data = lax.optimization_barrier((array, key_data))
  z = noise.normal(key_data, array.shape)[0]
  return array.astype(jnp.float32) + _leading(scale, z.ndim) * z


def _sum_apart(*arguments: jax.Array) -> jax.Array:
  """A call of its own: XLA for CPUs would copy it into each loop that reads it.

  A quantizer has four, and noise costs more than the rest of what they do.
  """
  with xla_metadata.set_xla_metadata(inlineable='false'):
    return _sum(*arguments)


def read(tree: Any) -> Any:
  """A tree with every `Perturbed` leaf read; other leaves as they are."""
  return jax.tree.map(
    lambda leaf: leaf.read() if isinstance(leaf, Perturbed) else leaf,
    tree,
    is_leaf=lambda leaf: isinstance(leaf, Perturbed),
  )


def perturb(
  params: Any, key: jax.Array, scale: jax.Array | float, pattern: str
) -> Any:
  """The tree with `Perturbed` leaves in the place of chosen parameters.

  Args:
    params: parameters; frozen ones may have any leaves, packed ones too.
    key: a threefry key; one for each direction.
    scale: of the noise.
    pattern: regex of the whole paths of the parameters that are chosen.

  Raises:
    ValueError: see `leaf_keys`.
  """
  keys = leaf_keys(params, key, pattern)
  scale = jnp.asarray(scale, jnp.float32)

  def one(path, leaf):
    if (name := path_name(path)) not in keys:
      return leaf
    key_data = keys[name]
    # Of an embedding, the rows of a batch's tokens alone are made.
    shared = bool(_LAYER.match(name) or _STACK.match(name))
    scales = jnp.broadcast_to(scale, key_data.shape[:-1])
    return Perturbed(leaf, key_data, scales, shared)

  return jax.tree_util.tree_map_with_path(one, params)


def direction(params: Any, key: jax.Array, pattern: str) -> Any:
  """z as a tree, float32; zeros of a leaf's own dtype where none is chosen."""
  keys = leaf_keys(params, key, pattern)

  def one(path, leaf):
    if (name := path_name(path)) not in keys:
      return jnp.zeros_like(leaf)
    return noise.normal(keys[name], leaf.shape)[0]

  return jax.tree_util.tree_map_with_path(one, params)


def leaf_keys(
  params: Any, key: jax.Array, pattern: str
) -> dict[str, jax.Array]:
  """Key data of each chosen parameter, from its path and its layer.

  It does not depend on what other parameters there are, nor on whether layers
  are stacked: `[L, 2]` holds what L separate layers would have.

  Args:
    params: the tree.
    key: a threefry key.
    pattern: regex of the whole paths that are chosen.

  Returns:
    Path -> uint32 `[2]`, or `[L, 2]` of a stack.

  Raises:
    ValueError: no path is covered, a covered one is neither float32 nor
      bfloat16, two paths have one hash, or the key is no threefry key.
  """
  single = jax.eval_shape(lambda: jax.random.key(0, impl=_IMPLEMENTATION))
  if (key.shape, key.dtype) != (single.shape, single.dtype):
    raise ValueError(
      f'Noise needs one key of jax.random.key(seed, impl={_IMPLEMENTATION!r});'
      f' this is {key.dtype}{[*key.shape]}.'
    )
  rows, sizes = [], {}
  for path, leaf in chosen(params, pattern):
    rows += (own := _rows(path, leaf))
    sizes[path] = len(own) if _STACK.match(path) else None
  _refuse_collisions(rows)
  fold_in = jax.vmap(jax.random.fold_in)
  hashes, layers = np.array(rows, np.uint32).T
  keys = jnp.broadcast_to(key, hashes.shape)
  data = jax.random.key_data(fold_in(fold_in(keys, hashes), layers))
  found, start = {}, 0
  for path, size in sizes.items():
    found[path] = data[start : start + size] if size else data[start]
    start += size or 1
  return found


def chosen(params: Any, pattern: str) -> Iterator[tuple[str, jax.Array]]:
  """Path and array of the parameters whose whole path the regex covers."""
  names = []
  for keys, leaf in jax.tree_util.tree_leaves_with_path(params):
    name = path_name(keys)
    if not re.fullmatch(pattern, name):
      continue
    names.append(name)
    if leaf.dtype not in (jnp.float32, jnp.bfloat16):
      raise ValueError(
        f'perturbed={pattern!r} covers {name!r}, which is {leaf.dtype}; noise'
        ' is added to float32 and bfloat16 parameters: choose among those.'
      )
    yield name, leaf
  if not names:
    raise ValueError(
      f'perturbed={pattern!r} covers no parameter, so nothing would be'
      ' trained; paths read like "block_0/attn/q/kernel", and those of a model'
      ' that scans over its layers like "blocks/attn/q/kernel".'
    )


def wrap_key(key_data: jax.Array) -> jax.Array:
  """A key from its data, whatever implementation is jax's default."""
  return jax.random.wrap_key_data(key_data, impl=_IMPLEMENTATION)


def path_name(path: tuple) -> str:
  """'block_0/attn/q/kernel' from the keys of a path."""
  return '/'.join(
    str(getattr(k, 'key', getattr(k, 'name', getattr(k, 'idx', k))))
    for k in path
  )


def _rows(path: str, leaf: jax.Array) -> list[tuple[int, int]]:
  """(hash of the path in a block, layer) of each layer of a parameter."""
  layers, rest = range(1), path
  if match := _LAYER.match(path):
    layers, rest = (int(match[1]),), 'block/' + path[match.end() :]
  elif match := _STACK.match(path):
    layers, rest = range(leaf.shape[0]), 'block/' + path[match.end() :]
  return [(zlib.crc32(rest.encode()), layer) for layer in layers]


def _refuse_collisions(rows: list[tuple[int, int]]) -> None:
  if len(set(rows)) < len(rows):
    raise ValueError(
      'Two parameters would get the same noise: their paths have one CRC-32,'
      ' or both "blocks/..." and "block_0/..." stand in the tree. Rename one.'
    )


def _leading(scale: jax.Array, ndim: int) -> jax.Array:
  return scale.reshape(scale.shape + (1,) * (ndim - scale.ndim))
