"""OmniQuant's equivalent transformations of a block, and their fold.

What a linear layer reads is shifted and scaled for each channel, and its matrix
and bias take it back (eq. 3 of 2308.13137):

  x W + b = ((x - d) / s) (s W) + (b + d W)

The first factor is folded into what gives x:

- a norm, gain / s and (bias - d) / s, before q k v and before gate and up;
- v before o, its columns and bias: a token's weights of attention sum to 1;
- queries / s against keys * s, whose product is left.

down is not transformed: its input is a product. Heads that share keys share the
scales of v and k. Rotary positions mix the channels i and i + H/2 of a head, so
these have one scale in queries and keys.

Everything learned stands in one dict, 'attn/norm/scale' or 'attn/v/shift' -> an
array; without an entry nothing is transformed.
"""

from collections.abc import Mapping
from typing import Any
from typing import NamedTuple

import jax
from jax import numpy as jnp

from qat.ptq import omniquant
from qat.ptq import smoothquant

# As in the released code: no scale is nearer to 0.
SMALLEST = 1e-2


class Heads(NamedTuple):
  """The heads of attention.

  Attributes:
    queries: how many heads of queries.
    keys: how many of keys and values.
    width: of a head, H.
    rotary: whether positions rotate queries and keys.
  """

  queries: int
  keys: int
  width: int
  rotary: bool

  def spread(self, values_C: jax.Array) -> jax.Array:
    """Values of the channels of keys, for each channel of the queries."""
    values_G1H = values_C.reshape(self.keys, 1, self.width)
    each = self.queries // self.keys
    return jnp.repeat(values_G1H, each, 1).ravel()

  def shared(self, values_C: jax.Array) -> jax.Array:
    """For the channels of keys the largest of the queries' that share them."""
    return jnp.max(values_C.reshape(self.keys, -1, self.width), 1).ravel()

  def pairs(self, values_C: jax.Array) -> jax.Array:
    """A scale of queries and keys for each channel of the keys."""
    if not self.rotary:
      return values_C
    values_GH = values_C.reshape(self.keys, self.width // 2)
    return jnp.concatenate([values_GH, values_GH], 1).ravel()


class Range(NamedTuple):
  """What an input of a layer was, `[K]` each.

  Attributes:
    absmax_K: the largest |x|.
    middle_K: half way between the least and the most, the mean over batches.
  """

  absmax_K: jax.Array
  middle_K: jax.Array


# Path of a norm -> paths of the layers that read it.
Readers = tuple[tuple[str, tuple[str, ...]], ...]


def start(
  params: Mapping[str, Any],
  ranges: Mapping[str, Range],
  readers: Readers,
  heads: Heads,
  options: omniquant.Options,
) -> dict[str, jax.Array]:
  """Where training starts: SmoothQuant's scales, shifts to the inputs' middle.

  Args:
    params: of a block.
    ranges: the inputs of the first layer of each of the `readers` and of o.
    readers: of the block's norms.
    heads: of its attention.
    options: `let` and what begins with it.
  """
  smooth = smoothquant.Options(options.alpha)
  found = {}
  for norm, layers in readers:
    kernels = [_leaves(params, name)['kernel'] for name in layers]
    of = ranges[layers[0]]
    found[f'{norm}/scale'] = smoothquant.scales(of.absmax_K, kernels, smooth)
    can = 'bias' in _leaves(params, norm)
    if options.let_shift and can and _biased(params, layers):
      found[f'{norm}/shift'] = of.middle_K
  of, o_KN = ranges['attn/o'], _leaves(params, 'attn/o')['kernel']
  most_C = heads.shared(jnp.max(jnp.abs(o_KN), 1))
  found['attn/v/scale'] = (
    jnp.ones_like(most_C)
    if options.let_v_ones
    else smoothquant.scales(
      heads.shared(of.absmax_K), [most_C[:, None]], smooth
    )
  )
  if options.let_shift and _biased(params, ('attn/v', 'attn/o')):
    middle_C = of.middle_K.reshape(heads.keys, -1, heads.width)
    found['attn/v/shift'] = jnp.mean(middle_C, 1).ravel()
  if options.let_qk:
    width = heads.width // 2 if heads.rotary else heads.width
    found['attn/k/scale'] = jnp.ones(heads.keys * width, jnp.float32)
  return away_from_zero(found)


def away_from_zero(learned: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
  """What is learned, with no scale nearer to 0 than `SMALLEST`."""

  def away(scale: jax.Array) -> jax.Array:
    least = jnp.where(scale < 0, -SMALLEST, SMALLEST)
    return jnp.where(jnp.abs(scale) < SMALLEST, least, scale)

  return {
    name: away(value) if name.endswith('/scale') else value
    for name, value in learned.items()
  }


def fold(
  params: Mapping[str, Any],
  learned: Mapping[str, jax.Array],
  readers: Readers,
  heads: Heads,
) -> dict[str, Any]:
  """The parameters of a block that computes the same, transformed.

  Args:
    params: of the block.
    learned: from `start`, and maybe trained; other entries are not read.
    readers: of the block's norms.
    heads: of its attention.
  """
  params = dict(params)
  for norm, layers in readers:
    if f'{norm}/scale' not in learned:
      continue
    scale_K, shift_K = learned[f'{norm}/scale'], learned.get(f'{norm}/shift')
    _give(params, norm, scale_K, shift_K)
    for name in layers:
      _read(params, name, scale_K, shift_K)
  if 'attn/v/scale' in learned:
    scale_C, shift_C = learned['attn/v/scale'], learned.get('attn/v/shift')
    _give(params, 'attn/v', scale_C, shift_C)
    shift_K = None if shift_C is None else heads.spread(shift_C)
    _read(params, 'attn/o', heads.spread(scale_C), shift_K)
  if 'attn/k/scale' in learned:
    scale_C = heads.pairs(learned['attn/k/scale'])
    _give(params, 'attn/k', 1 / scale_C, None)
    _give(params, 'attn/q', heads.spread(scale_C), None)
  return params


def _give(
  params: dict[str, Any],
  name: str,
  scale_N: jax.Array,
  shift_N: jax.Array | None,
) -> None:
  """Makes a norm or a layer give (y - shift) / scale for y."""
  leaves = dict(_leaves(params, name))
  if shift_N is not None:
    leaves['bias'] = leaves['bias'] - shift_N
  for key, leaf in leaves.items():  # A gain or a bias `[N]`, or a matrix.
    leaves[key] = leaf / (scale_N[None] if leaf.ndim == 2 else scale_N)
  _set(params, name, leaves)


def _read(
  params: dict[str, Any],
  name: str,
  scale_K: jax.Array,
  shift_K: jax.Array | None,
) -> None:
  """Makes a layer give for (x - shift) / scale what it gave for x."""
  leaves = dict(_leaves(params, name))
  if shift_K is not None:
    back_N = jnp.matmul(shift_K, leaves['kernel'], precision='highest')
    leaves['bias'] = leaves['bias'] + back_N
  leaves['kernel'] = leaves['kernel'] * scale_K[:, None]
  _set(params, name, leaves)


def _leaves(params: Mapping[str, Any], name: str) -> Mapping[str, jax.Array]:
  part, layer = name.split('/')
  return params[part][layer]


def _set(params: dict[str, Any], name: str, leaves: dict[str, Any]) -> None:
  part, layer = name.split('/')
  params[part] = {**params[part], layer: leaves}


def _biased(params: Mapping[str, Any], names: tuple[str, ...]) -> bool:
  return all('bias' in _leaves(params, name) for name in names)
