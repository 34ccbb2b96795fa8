"""The decoder-only language model, and how a config becomes one."""

from collections.abc import Callable
from collections.abc import Sequence
import math
import re
from typing import Any

import flax.linen as nn
import jax
from jax import numpy as jnp
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict
from ml_collections import FrozenConfigDict

from pallas_kernels.head_matmul import cpu as head_matmul
from qat.nn import attention
from qat.nn import ffn
from qat.nn import kv_cache
from qat.nn import layers
from qat.nn import remat
from qat.nn import stacked
from qat.quant import choice
from qat.quant import dot
from qat.quant import rules as rules_lib


class Block(nn.Module):
  """x + attention(x), then x + ffn(x)."""

  config: FrozenConfigDict
  rules: rules_lib.Rules
  method: dot.Method

  @nn.compact
  def __call__(
    self,
    x_BTD: jax.Array,
    positions_T: jax.Array,
    cache: kv_cache.Cache | None,
    mix: jax.Array | None = None,
  ) -> tuple[jax.Array, kv_cache.Cache | None]:
    parts = dict(config=self.config, rules=self.rules, method=self.method)
    y_BTD, cache = attention.Attention(**parts, name='attn')(
      x_BTD, positions_T, cache, mix
    )
    x_BTD = x_BTD + y_BTD
    if self.config.ffn == 'decoupled':
      layer = ffn.DecoupledFFN(**parts, name='ffn')
    elif self.config.ffn == 'plain':
      layer = ffn.PlainFFN(**parts, name='ffn')
    else:
      layer = ffn.GatedFFN(**parts, width=self.config.d_ff, name='ffn')
    return x_BTD + layer(x_BTD, mix), cache


# What a scanned block makes for each layer: parameters, and what modules sow.
_STACKED = ('params', 'inputs', 'router', 'intermediates')


class Transformer(nn.Module):
  """LLaMA-style: rotary positions, RMSNorm, gated feed-forward, no biases.

  Fields of the config make it Qwen's (biases of q, k and v) or OPT's (learned
  positions, LayerNorm, no gate, biases everywhere). Embedding, head, norms and
  router stay in high precision; every other matrix
  is a `Linear` whose path finds its rule. With `scan_layers` one block is
  compiled, and a loop runs it with each layer's parameters; see `stacked`.
  """

  config: FrozenConfigDict  # The model section of the config.
  rules: rules_lib.Rules
  method: dot.Method
  # What makes a block's parameters of what stands in the tree; see `reading`.
  read: Callable[[Any], Any] | None = None

  def setup(self):
    c = self.config
    self.embed = nn.Embed(
      c.vocab_size,
      c.d_model,
      embedding_init=nn.initializers.normal(c.init_std),
    )
    block = Block
    if self.read is not None:
      # Inside the loop: a turn reads its own layer.
      block = nn.map_variables(
        Block, 'params', trans_in_fn=self.read, mutable=True, init=False
      )
    if c.remat != 'none':
      # In a scan nothing can be merged across iterations.
      block = nn.remat(
        block, prevent_cse=not c.scan_layers, policy=remat.POLICIES[c.remat]
      )
    parts = (c, self.rules, self.method)
    if c.scan_layers:
      self.blocks = nn.scan(
        block,
        variable_axes=dict.fromkeys(_STACKED, 0),
        split_rngs={'params': True, 'router': True},
        length=c.n_layers,
        in_axes=nn.broadcast,
      )(*parts)
    else:
      self.block = [block(*parts) for _ in range(c.n_layers)]
    self.final_norm = layers.make_norm(c)
    if c.positions == 'learned':
      self.positions = self.param(
        'positions',
        nn.initializers.normal(c.init_std),
        (c.max_positions, c.d_model),
        jnp.float32,
      )
    if not c.tied_embeddings:
      self.head = self.param(
        'head',
        nn.initializers.normal(c.init_std),
        (c.vocab_size, c.d_model),
        jnp.float32,
      )

  def __call__(
    self,
    tokens_BT: jax.Array,
    caches: Sequence[kv_cache.Cache] | None = None,
    start: jax.Array | int = 0,
    mix: jax.Array | None = None,
  ) -> tuple[jax.Array, list[kv_cache.Cache] | None]:
    """Hidden states before the head.

    Args:
      tokens_BT: int token ids.
      caches: one for each block, to continue from; None to train.
      start: position of the first token; with caches also `[B]`, that of each
        row's.
      mix: share of quantization, 0 to 1, while it is annealed in training;
        None: quantized.

    Returns:
      `[B, T, D]` after the final norm, and the caches with T more positions.
    """
    positions_T = jnp.arange(tokens_BT.shape[1])
    if jnp.ndim(start):
      start, positions_T = start[:, None], positions_T[None]
    positions_T = start + positions_T
    x_BTD = self.embedded(tokens_BT, positions_T)
    if self.config.scan_layers:
      if caches is not None:
        raise ValueError(
          'A model that scans over its layers has no caches; take'
          ' transformer.unscanned(model, params).'
        )
      x_BTD, _ = self.blocks(x_BTD, positions_T, None, mix)
      return self.final_norm(x_BTD), None
    new_caches = []
    for i, block in enumerate(self.block):
      x_BTD, cache = block(
        x_BTD, positions_T, None if caches is None else caches[i], mix
      )
      new_caches.append(cache)
    x_BTD = self.final_norm(x_BTD)
    return x_BTD, None if caches is None else new_caches

  def embedded(self, tokens_BT: jax.Array, positions_T: jax.Array) -> jax.Array:
    """What the first block reads, `[B, T, D]`."""
    c = self.config
    if 0 < c.max_positions < tokens_BT.shape[1]:
      raise ValueError(
        f'A sequence of {tokens_BT.shape[1]} tokens; the model takes at most'
        f' {c.max_positions} (config.model.max_positions).'
      )
    table_VD = self.embed.embedding
    if self.method.gather_codes:
      # Each device then looks its own tokens up; left split, the gradient
      # would bring the whole batch's activations to every device.
      table_VD = jax.lax.with_sharding_constraint(table_VD, P())
    x_BTD = _rows(table_VD, tokens_BT, self.method.few_rows).astype(c.dtype)
    if c.positions == 'learned':
      learned_BTD = self.positions[jnp.atleast_2d(positions_T)]
      x_BTD = x_BTD + learned_BTD.astype(c.dtype)
    return x_BTD

  def output_embedding(self) -> jax.Array:
    """The head's matrix `[V, D]`: the embedding itself where they are tied."""
    if self.config.tied_embeddings:
      return self.embed.embedding
    return self.head

  def logits(self, tokens_BT, caches=None, start=0, only_B=None):
    """Like `__call__`, with float32 logits `[B, T, V]` for hidden states.

    With `only_B` they are those of one token of each row, `[B, 1, V]`.
    """
    x_BTD, caches = self(tokens_BT, caches, start)
    if only_B is not None:
      x_BTD = jnp.take_along_axis(x_BTD, only_B[:, None, None], axis=1)
    x_BTD = x_BTD.astype(self.config.dot_dtype)
    table_VD = self.output_embedding().astype(self.config.dot_dtype)
    rows = math.prod(x_BTD.shape[:2])
    few = rows <= head_matmul.MOST_ROWS and x_BTD.dtype == jnp.bfloat16
    if few and self.method.few_rows:
      logits_MV = head_matmul.matmul(x_BTD.reshape(rows, -1), table_VD)
      return logits_MV.reshape(*x_BTD.shape[:2], -1), caches
    logits_BTV = jnp.einsum(
      'btd,vd->btv', x_BTD, table_VD, preferred_element_type=jnp.float32
    )
    return logits_BTV, caches


def _rows(table_VD: jax.Array, tokens_BT: jax.Array, native: bool) -> jax.Array:
  """The rows of a table, `[B, T, D]`; `native` by the C++ extension."""
  if table_VD.dtype != jnp.bfloat16:
    return jnp.take(table_VD, tokens_BT, axis=0)
  if native:
    ids_M = tokens_BT.ravel().astype(jnp.int32)
    rows_MD = head_matmul.rows(table_VD, ids_M)
    return rows_MD.reshape(*tokens_BT.shape, -1)
  # To take rows of bfloat16, XLA:CPU makes float32 of the whole table first.
  table_VD = jax.lax.bitcast_convert_type(table_VD, jnp.uint16)
  bits_BTD = jnp.take(table_VD, tokens_BT, axis=0)
  return jax.lax.bitcast_convert_type(bits_BTD, jnp.bfloat16)


def build(config: ConfigDict, platform: str, devices: int) -> Transformer:
  """The model of a whole config, with every 'auto' resolved.

  Args:
    config: a run's config.
    platform: 'cpu', 'gpu' or 'tpu'.
    devices: size of the mesh.
  """
  model = config.model.copy_and_resolve_references().unlock()
  model.attention = attention.choose_form(
    *(model.attention, platform, devices, model.dot_dtype),
    width=model.d_model // model.n_heads,
  )
  method = choice.choose_method(
    *(model.quantized_dot, model.dot_dtype, platform),
    split_parameters=config.mesh.fsdp != 1,
    devices=devices,
  )
  rules = rules_lib.make_rules(config.quant.rules, config.quant.specs)
  return Transformer(FrozenConfigDict(model), rules, method)


def reading(model: Transformer, read: Callable[[Any], Any]) -> Transformer:
  """The model for a tree whose leaves are to be read, for forward passes alone.

  Args:
    model: any.
    read: from a tree to its parameters. A model that scans over its layers
      calls it in each turn for that layer, and so never has the parameters of
      all at once; what stands outside of the blocks `variables` reads.
  """
  # Nothing is kept, without a backward pass.
  return changed(model, remat='none').clone(read=read)


def variables(model: Transformer, params: Any) -> dict[str, Any]:
  """What `model.apply` takes for a parameter tree."""
  if model.read is None:
    return {'params': params}
  return {
    'params': {
      name: branch
      if re.fullmatch(rf'{stacked.BLOCKS}|block_\d+', name)
      else model.read(branch)
      for name, branch in params.items()
    }
  }


def abstract_params(model: Transformer) -> dict:
  """Shapes and dtypes of the parameters; allocates nothing."""

  def init():  # The key too, for a mesh of devices that are not there.
    return model.init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))

  return jax.eval_shape(init)['params']


def unscanned(model: Transformer, params: Any) -> tuple[Transformer, Any]:
  """The model without a scan over its layers, and its parameters in that form.

  It computes the same, takes longer to compile, and can use caches.
  """
  if not model.config.scan_layers:
    return model, params
  return changed(model, scan_layers=False), jax.jit(stacked.unstacked)(params)


def scanned(model: Transformer, params: Any) -> tuple[Transformer, Any]:
  """Inverts `unscanned`: one block is compiled, whatever the depth.

  Args:
    model: any.
    params: its parameters; the blocks' branches of the tree are emptied.

  Returns:
    The model with a scan, and its parameters, those of blocks on the host; both
    as they are where layers differ in their rules or their parameters' form.
  """
  kernels = rules_lib.kernels(params)
  if model.config.scan_layers or stacked.told_apart(kernels, model.rules.find):
    return model, params
  try:
    params = stacked.stacked(params)
  except stacked.UnlikeError:
    return model, params
  return changed(model, scan_layers=True), params


def changed(model: Transformer, **fields: Any) -> Transformer:
  """The model with other fields of its config."""
  config = ConfigDict(model.config.to_dict())
  config.update(fields)
  return model.clone(config=FrozenConfigDict(config))
