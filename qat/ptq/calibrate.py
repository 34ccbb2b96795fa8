"""Blocks one at a time: what their layers read, and what they pass on.

The hidden states of all calibration sequences are kept on the host, and the
blocks take their turn on them. What lives on the device at once is one block's
float32 weights, the Gram matrices of its inputs and the hidden states of one
batch. All functions are jitted once: the parameters of a block are an argument,
so that every block is the first to them.
"""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import functools
from typing import Any
from typing import NamedTuple

import flax.linen as nn
import jax
from jax import numpy as jnp
from ml_collections import FrozenConfigDict
import numpy as np

from qat.nn import stacked
from qat.nn import transformer
from qat.ptq import examples as examples_lib
from qat.ptq import statistics as statistics_lib
from qat.quant import dot
from qat.quant import rules as rules_lib

Statistics = statistics_lib.Statistics


class Group(NamedTuple):
  """Linear layers of a block that read one input.

  Attributes:
    layers: their paths in the block, such as 'attn/q'.
    norm: path of the norm that gives the input; None where none does.
  """

  layers: tuple[str, ...]
  norm: str | None


def groups(config: FrozenConfigDict) -> tuple[Group, ...]:
  """The linear layers of a block, in the order in which they are applied.

  Args:
    config: the model section of a config.

  Raises:
    ValueError: the model has layers that are not known here.
  """
  if config.ffn == 'decoupled':
    raise ValueError(
      "config.model.ffn='decoupled': pQuant's branches are trained in low bits"
      " and not quantized afterwards; take a model with ffn 'gated' or 'plain'."
    )
  if config.norm == 'inside' and not config.norm_shared:
    raise ValueError(
      'config.model.norm_shared=False: each linear layer then has an input of'
      ' its own; only models whose layers share a norm can be quantized.'
    )
  readers = ('ffn/gate', 'ffn/up') if config.ffn == 'gated' else ('ffn/up',)
  return (
    Group(('attn/q', 'attn/k', 'attn/v'), 'attn/norm'),
    Group(('attn/o',), None),
    Group(readers, 'ffn/norm'),
    Group(('ffn/down',), None),
  )


class OneBlock(nn.Module):
  """A block by itself, under the name of the first: rules know its layers."""

  config: FrozenConfigDict  # The model section of the config.
  rules: rules_lib.Rules
  method: dot.Method

  @nn.compact
  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    """What the block passes on, `[B, T, D]`."""
    parts = (self.config, self.rules, self.method)
    positions_T = jnp.arange(x_BTD.shape[1])
    return transformer.Block(*parts, name='block_0')(x_BTD, positions_T, None)[
      0
    ]


def one_block(model: transformer.Transformer, params: Mapping) -> OneBlock:
  """The block that stands for all of a model's.

  Raises:
    ValueError: the model's rules tell its blocks apart.
  """
  paths = rules_lib.kernels(params)
  apart = stacked.told_apart(paths, model.rules.find)
  if apart:
    raise ValueError(
      f'config.quant.rules: {apart[0]} and {apart[1]} fall under different'
      ' rules, but one compiled block computes all layers; treat them alike.'
    )
  return OneBlock(model.config, model.rules, model.method)


def embed(
  model: transformer.Transformer, params: Mapping, tokens_BT: np.ndarray
) -> jax.Array:
  """What the first block reads, `[B, T, D]`.

  Args:
    model: the model.
    params: its parameters outside of the blocks; of the embedding only the rows
      of these tokens go to the device.
    tokens_BT: int token ids.
  """
  rows_BTD = np.asarray(params['embed']['embedding'])[tokens_BT]
  others = {k: v for k, v in params.items() if k == 'positions'}
  return embed_rows(model, others, rows_BTD)


@functools.partial(jax.jit, static_argnums=0)
def embed_rows(
  model: transformer.Transformer, params: Mapping, rows_BTD: jax.Array
) -> jax.Array:
  """`embed`, from the rows of the embedding and `params['positions']`, if any.

  It is a model of as many tokens as there are rows.
  """
  batch, length, width = rows_BTD.shape
  model = transformer.changed(
    model, vocab_size=batch * length, tied_embeddings=True
  )
  table = {'embedding': rows_BTD.reshape(-1, width)}
  return model.apply(
    {'params': {**params, 'embed': table}},
    jnp.arange(batch * length).reshape(batch, length),
    jnp.arange(length),
    method='embedded',
  )


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def advance(block: OneBlock, params: Mapping, x_BTD: jax.Array) -> jax.Array:
  """What a block passes on.

  Args:
    block: from `one_block`.
    params: of any block of the model.
    x_BTD: what it reads; donated.
  """
  return block.apply({'params': {'block_0': params}}, x_BTD)


@functools.partial(
  jax.jit, static_argnums=(0, 1), static_argnames='onward', donate_argnums=3
)
def observe(
  block: OneBlock,
  names: tuple[str, ...],
  params: Mapping,
  sums: dict[str, Statistics],
  x_BTD: jax.Array,
  weights_BT: jax.Array,
  rows_BR: jax.Array | None,
  *,
  onward: bool = False,
) -> tuple[dict[str, Statistics], dict[str, jax.Array], jax.Array | None]:
  """Adds a batch to the statistics of what some layers of a block read.

  Args:
    block: from `one_block`.
    names: the layers, such as ('attn/q', 'attn/o'); what comes after the last
      of them in the block is not computed, unless it is to go `onward`.
    params: of any block of the model.
    sums: name -> statistics as yet; donated.
    x_BTD: what the block reads.
    weights_BT: 1 where a token is, 0 on padding.
    rows_BR: positions of the tokens whose inputs are returned; None: none.
    onward: whether what the block passes on is wanted.

  Returns:
    The statistics; name -> inputs `[B, R, K]`, float32; and what the block
    passes on.
  """
  y_BTD, sown = block.apply(
    {'params': {'block_0': params}}, x_BTD, mutable=['inputs']
  )
  added, rows = {}, {}
  for name in names:
    part, layer = name.split('/')
    (x_BTK,) = sown['inputs']['block_0'][part][layer]['x']
    x_MK = x_BTK.reshape(-1, x_BTK.shape[-1])
    added[name] = statistics_lib.add(sums[name], x_MK, weights_BT.ravel())
    if rows_BR is not None:
      kept = jnp.take_along_axis(x_BTK, rows_BR[..., None], axis=1)
      rows[name] = kept.astype(jnp.float32)
  return added, rows, y_BTD if onward else None


class Calibration:
  """Hidden states of the calibration sequences before some block.

  They and the Gram matrices are NumPy arrays between programs, so that a device
  has one batch of them at a time. On a CPU these are the same memory.

  Attributes:
    block: the block that stands for all.
  """

  def __init__(
    self,
    model: transformer.Transformer,
    params: Mapping,
    examples: examples_lib.Examples,
    *,
    batch_size: int,
    rows: int,
    seed: int,
  ):
    """Embeds the sequences.

    Args:
      model: the model; its rules say how inputs are quantized.
      params: its parameters; blocks are not read.
      examples: the calibration sequences.
      batch_size: sequences that a block takes at once.
      rows: how many inputs of a layer `statistics` keeps; 0: none.
      seed: of their choice.
    """
    self.block = one_block(model, params)
    self._count = rows
    top = outside(params)
    batches = list(examples.batches(batch_size))
    self._weights = [weights_BT for _, weights_BT in batches]
    rows_SR = examples.rows(rows, batch_size, seed)
    self._rows = [None] * len(batches)
    if rows_SR is not None:
      self._rows = list(map(jnp.asarray, np.split(rows_SR, len(batches))))
    self._states = [
      np.asarray(embed(model, top, tokens_BT)) for tokens_BT, _ in batches
    ]

  def statistics(
    self,
    params: Mapping,
    names: Sequence[str],
    path: str,
    gram: bool = True,
    onward: bool = False,
  ) -> dict[str, Statistics]:
    """What some layers of a block read, over all sequences.

    Args:
      params: of the block.
      names: its layers; see `observe`.
      path: of the block, for errors.
      gram: whether Gram matrices are wanted; they come as NumPy arrays.
      onward: also moves on to what this block passes on, as `advance` does, for
        less: attention is computed once for both.

    Raises:
      ValueError: an input of a layer is not finite.
    """
    sums = {
      name: statistics_lib.empty(kernel(params, name).shape[0], gram)
      for name in names
    }
    rows: dict[str, list] = {name: [] for name in names}
    for i, (x_BTD, weights_BT, rows_BR) in enumerate(
      zip(self._states, self._weights, self._rows, strict=True)
    ):
      sums, kept, y_BTD = observe(
        *(self.block, tuple(names), params, sums, x_BTD, weights_BT, rows_BR),
        onward=onward,
      )
      if onward:
        self._states[i] = np.asarray(y_BTD)
      for name, x_BRK in kept.items():
        rows[name].append(x_BRK.reshape(-1, x_BRK.shape[-1]))
    for name in names:  # In their order, which a dict loses under `jit`.
      found = sums[name]
      # A maximum passes a NaN on; the Gram matrix may also overflow.
      sizes = [found.absmax_K]
      if gram:
        sizes.append(jnp.diagonal(found.gram_KK))
      if not all(bool(jnp.all(jnp.isfinite(size))) for size in sizes):
        raise ValueError(
          f'The inputs of {path}/{name} are not finite (NaN or infinite) on the'
          ' calibration sequences. Look at the parameters of the layers before'
          " it, or run the model with config.model.dtype='float32'."
        )
      if gram:
        found = dataclasses.replace(found, gram_KK=np.asarray(found.gram_KK))
      if self._count:
        inputs_SK = jnp.concatenate(rows[name])[: self._count]
        found = dataclasses.replace(found, inputs_SK=inputs_SK)
      sums[name] = found
    return sums

  def advance(self, params: Mapping) -> None:
    """Moves on to what the block with these parameters passes on."""
    for i, x_BTD in enumerate(self._states):
      self._states[i] = np.asarray(advance(self.block, params, x_BTD))


def outside(params: Mapping) -> dict[str, Any]:
  """The parameters that are in no block."""
  return {k: v for k, v in params.items() if not k.startswith('block_')}


def kernel(params: Mapping, name: str) -> jax.Array:
  """The matrix of the layer `name`, such as 'attn/q', of a block."""
  part, layer = name.split('/')
  return params[part][layer]['kernel']


def with_kernel(
  params: Mapping,
  name: str,
  w_KN: jax.Array,
  bias: Callable[[np.ndarray], np.ndarray] | None = None,
) -> dict[str, Any]:
  """The parameters of a block with another matrix in the layer `name`.

  Args:
    params: of the block.
    name: of the layer.
    w_KN: its new matrix.
    bias: what becomes of its bias, if it has one; None: nothing.
  """
  part, layer = name.split('/')
  changed = {**params[part][layer], 'kernel': w_KN}
  if bias is not None and 'bias' in changed:
    changed['bias'] = jnp.asarray(bias(np.asarray(changed['bias'])))
  return {**params, part: {**params[part], layer: changed}}
