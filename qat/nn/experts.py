"""Stacked matrices of which each token meets k: the cost of k, not of all.

The tokens of an expert are brought together, in tiles of equally many rows; a
tile belongs to one expert and is multiplied by that expert's matrix alone. The
last tile of an expert is padded with rows of zeros. Shapes are static: M tokens
with k choices each need at most (k M + E (tile - 1)) / tile tiles, however the
router divides them, so no token has to be left out.

  place    which slot each choice of a token gets, and the reverse
  gather   the tokens' codes and scales in the order of the slots
  multiply tile by tile (`quant.grouped_dot`); also the hidden units, which stay
           in that order
  spread   each token's k results, and `weigh` them

Slots are reached and left by index in both directions of differentiation; no
float is ever scattered. A padded row is zero, as codes, as scale, as hidden
units and as a gradient, and adds nothing anywhere.

The letters besides those of the glossary: G groups of tokens, one a device, so
that no index crosses devices; M tokens of a group; k choices of a token; C
tiles of a group; S = C * tile slots of a group.
"""

from collections.abc import Sequence
import dataclasses
import functools

import jax
from jax import numpy as jnp

from qat.quant import dot
from qat.quant import grouped_dot
from qat.quant import operand as operand_lib


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=('slot_GkM', 'choice_GS', 'expert_GC'),
  meta_fields=(),
)
@dataclasses.dataclass(frozen=True)
class Layout:
  """Where the tokens go.

  Attributes:
    slot_GkM: int32, the slot of each choice; S: of none, beyond the capacity.
    choice_GS: int32, the choice in each slot, as an index into k * M; k * M in
      a padded slot.
    expert_GC: int32, the expert of each tile.
  """

  slot_GkM: jax.Array
  choice_GS: jax.Array
  expert_GC: jax.Array

  @property
  def slots(self) -> int:
    """S, the slots of a group."""
    return self.choice_GS.shape[1]

  @property
  def kept_GkM(self) -> jax.Array:
    """Bool, whether a choice has a slot."""
    return self.slot_GkM < self.slots

  @property
  def filled_GS(self) -> jax.Array:
    """Bool, whether a slot holds a token."""
    return self.choice_GS < self.slot_GkM[0].size

  @property
  def token_GS(self) -> jax.Array:
    """int32, the token in each slot; M in a padded one."""
    tokens = self.slot_GkM.shape[-1]
    return jnp.where(self.filled_GS, self.choice_GS % tokens, tokens)

  @property
  def expert_GS(self) -> jax.Array:
    """int32, the expert of each slot."""
    tile = self.slots // self.expert_GC.shape[1]
    return jnp.repeat(self.expert_GC, tile, axis=1)


def groups(batch: int) -> int:
  """G: the devices of the mesh, or 1 where they cannot share the batch."""
  devices = jax.sharding.get_abstract_mesh().size
  return devices if devices and batch % devices == 0 else 1


def place(
  expert_GkM: jax.Array, n_experts: int, tile: int, capacity: int | None = None
) -> Layout:
  """Gives every choice a slot among those of its expert.

  Args:
    expert_GkM: int, the k different experts of each token.
    n_experts: E.
    tile: rows of a tile; fewer where there are not as many tokens.
    capacity: choices that an expert of a group takes at most, first choices
      before second ones and then in the order of the tokens; None: all.
  """
  groups, k, tokens = expert_GkM.shape
  tile = min(tile, tokens)
  capacity = min(tokens if capacity is None else capacity, tokens)
  choices = k * tokens
  n_tiles = min(
    (choices + n_experts * (tile - 1)) // tile,
    n_experts * -(-capacity // tile),
  )
  expert_Gn = expert_GkM.reshape(groups, choices)
  hit_GnE = jax.nn.one_hot(expert_Gn, n_experts, dtype=jnp.int32)
  upto_GnE = jnp.cumsum(hit_GnE, axis=1)
  load_GE = jnp.minimum(upto_GnE[:, -1], capacity)
  tiles_GE = -(-load_GE // tile)
  end_GE = jnp.cumsum(tiles_GE, axis=1)
  first_GE = (end_GE - tiles_GE) * tile
  rank_Gn = jnp.sum(hit_GnE * upto_GnE, -1) - 1
  first_Gn = jnp.sum(hit_GnE * first_GE[:, None], -1)
  slot_Gn = jnp.where(rank_Gn < capacity, first_Gn + rank_Gn, n_tiles * tile)
  choice_GS = jax.vmap(
    lambda slot_n: (
      jnp.full((n_tiles * tile,), choices, jnp.int32)
      .at[slot_n]
      .set(jnp.arange(choices, dtype=jnp.int32), mode='drop')
    )
  )(slot_Gn)
  before_GCE = end_GE[:, None] <= jnp.arange(n_tiles)[None, :, None]
  # Tiles that nobody needs go to the last expert.
  expert_GC = jnp.minimum(jnp.sum(before_GCE, -1), n_experts - 1)
  return Layout(
    slot_Gn.reshape(expert_GkM.shape).astype(jnp.int32),
    choice_GS,
    expert_GC.astype(jnp.int32),
  )


def project(
  pairs: Sequence[tuple[operand_lib.Operand, operand_lib.Operand]],
  layout: Layout,
  method: dot.Method,
) -> list[jax.Array]:
  """Brings tokens to their experts and multiplies.

  Args:
    pairs: inputs `[B, T, K]` and stacks `[E, K, N]`. An input that several
      pairs share is gathered once, and multiplied once where that can be.
    layout: of the tokens.
    method: how to multiply.

  Returns:
    For each pair float32 `[G, S, N]`.
  """
  readers: dict[int, list[int]] = {}
  for i, (x, _) in enumerate(pairs):
    readers.setdefault(id(x), []).append(i)
  found = {}
  for same in readers.values():
    x = gather(pairs[same[0]][0], layout)
    weights = [pairs[i][1] for i in same]
    ys = grouped_dot.grouped_dots(x, weights, layout.expert_GC, method)
    found |= dict(zip(same, ys, strict=True))
  return [found[i] for i in range(len(pairs))]


def gather(x: operand_lib.Operand, layout: Layout) -> operand_lib.Operand:
  """An input `[B, T, K]` in the order of the slots: `[G, S, K]`."""
  groups, _, tokens = layout.slot_GkM.shape

  def rows(leaf):
    leaf = jnp.broadcast_to(leaf, (*x.value.shape[:-1], leaf.shape[-1]))
    return leaf.reshape(groups, tokens, -1)

  value = _gather(rows(x.value), layout)
  quantized = jax.tree.map(
    lambda leaf: _rows(rows(leaf), layout.token_GS), x.quantized
  )
  return operand_lib.Operand(value, quantized)


@jax.custom_vjp
def spread(y_GSN: jax.Array, layout: Layout) -> jax.Array:
  """Each token's results, `[G, k, M, N]`; 0 for a choice without a slot."""
  y_GnN = _rows(y_GSN, _flat(layout))
  return y_GnN.reshape(*layout.slot_GkM.shape, -1)


def _spread_bwd(layout, dy_GkMN):
  dy_GnN = dy_GkMN.reshape(*_flat(layout).shape, -1)
  return _rows(dy_GnN, layout.choice_GS), None


spread.defvjp(lambda y, layout: (spread(y, layout), layout), _spread_bwd)


@jax.custom_vjp
def weigh(y_GkMD: jax.Array, weight_GkM: jax.Array) -> jax.Array:
  """The sum of each token's results times their weights, `[G, M, D]`."""
  return jnp.sum(y_GkMD * weight_GkM[..., None], axis=1)


def _weigh_bwd(residuals, dy_GMD):
  y_GkMD, weight_GkM = residuals
  # As a product: XLA:CPU takes ten times as long for the sum of a product.
  dweight_GkM = jnp.einsum('gkmd,gmd->gkm', y_GkMD, dy_GMD, precision='highest')
  return dy_GMD[:, None] * weight_GkM[..., None], dweight_GkM


weigh.defvjp(lambda y, weight: (weigh(y, weight), (y, weight)), _weigh_bwd)


@jax.custom_vjp
def _gather(x_GMK: jax.Array, layout: Layout) -> jax.Array:
  return _rows(x_GMK, layout.token_GS)


def _gather_bwd(layout, dx_GSK):
  dx_GnK = _rows(dx_GSK, _flat(layout))
  dx_GkMK = dx_GnK.reshape(*layout.slot_GkM.shape, -1)
  if dx_GkMK.shape[1] == 1:
    return dx_GkMK[:, 0], None
  total = jnp.sum(dx_GkMK, axis=1, dtype=jnp.float32)
  return total.astype(dx_GSK.dtype), None


_gather.defvjp(lambda x, layout: (_gather(x, layout), layout), _gather_bwd)


def _flat(layout: Layout) -> jax.Array:
  return layout.slot_GkM.reshape(len(layout.slot_GkM), -1)


def _rows(x_GRK: jax.Array, index_GS: jax.Array) -> jax.Array:
  """Rows by number; zeros for a number that there is not."""

  def take(x_RK, index_S):
    return x_RK.at[index_S].get(mode='fill', fill_value=0)

  return jax.vmap(take)(x_GRK, index_GS)
