"""Feed-forward layers: gated, plain, and pQuant's decoupled one."""

import functools
import math

import flax.linen as nn
import jax
from jax import numpy as jnp
from ml_collections import FrozenConfigDict

from qat.nn import experts
from qat.nn import layers
from qat.nn import remat
from qat.quant import dot
from qat.quant import grouped_dot
from qat.quant import operand as operand_lib
from qat.quant import rules as rules_lib

# The input of a linear layer, and its weight.
Pair = tuple[operand_lib.Operand, operand_lib.Operand]

# Of the gate. 'silu' makes the layer SwiGLU (2002.05202).
ACTIVATIONS = {
  'silu': jax.nn.silu,
  'gelu': jax.nn.gelu,
  'relu': jax.nn.relu,
  'relu2': lambda x: jnp.square(jax.nn.relu(x)),
}


@functools.partial(jax.checkpoint, static_argnums=2)
def gated(gate: jax.Array, up: jax.Array, activation: str) -> jax.Array:
  """act(gate) * up, computed in float32; keeps only its arguments."""
  act = ACTIVATIONS[activation](gate.astype(jnp.float32))
  return (act * up.astype(jnp.float32)).astype(gate.dtype)


class Branch(nn.Module):
  """The three matrices of a gated layer: down(act(gate(x)) * up(x)).

  Attributes:
    width: hidden units.
    experts: how many such branches are stacked; 0 for a single one.
  """

  config: FrozenConfigDict
  rules: rules_lib.Rules
  method: dot.Method
  width: int
  experts: int = 0

  def setup(self):
    c = self.config
    inside = c.norm == 'inside'
    linear = functools.partial(
      layers.Linear,
      rules=self.rules,
      experts=self.experts,
      bias=c.bias == 'all',
    )
    own_eps = c.norm_eps if inside and not c.norm_shared else None
    self.gate = linear(self.width, init_std=c.init_std, norm_eps=own_eps)
    self.up = linear(self.width, init_std=c.init_std, norm_eps=own_eps)
    self.down = linear(
      c.d_model,
      init_std=layers.output_std(c),
      norm_eps=c.norm_eps if inside else None,
    )

  def readers(self) -> list[layers.Linear]:
    """The layers that read the input of the feed-forward layer."""
    return [self.gate, self.up]

  def hidden(
    self, gate: jax.Array, up: jax.Array, mix: jax.Array | None = None
  ) -> jax.Array:
    """The hidden units, in the dtype of products, for what `readers` gave."""
    dtype = self.config.dot_dtype
    gate = remat.product(gate.astype(dtype), self.gate.spec, mix)
    up = remat.product(up.astype(dtype), self.up.spec, mix)
    return gated(gate, up, self.config.activation)

  def finish(
    self, gate: jax.Array, up: jax.Array, mix: jax.Array | None = None
  ) -> jax.Array:
    """Gates and projects down: `[..., F]` to float32 `[..., D]`."""
    hidden = self.hidden(gate, up, mix)
    return layers.project(hidden, [self.down], self.method, mix)[0]


class GatedFFN(Branch):
  """The layer of LLaMA, BitNet and b1.58: one branch of width d_ff."""

  @nn.compact
  def __call__(
    self, x_BTD: jax.Array, mix: jax.Array | None = None
  ) -> jax.Array:
    c = self.config
    if c.norm == 'pre' or c.norm_shared:
      x_BTD = layers.make_norm(c, 'norm')(x_BTD)
    gate, up = layers.project(x_BTD, self.readers(), self.method, mix)
    y_BTD = self.finish(gate, up, mix)
    return y_BTD.astype(x_BTD.dtype)


class PlainFFN(nn.Module):
  """The layer of OPT: down(act(up(x))), without a gate."""

  config: FrozenConfigDict
  rules: rules_lib.Rules
  method: dot.Method

  @nn.compact
  def __call__(
    self, x_BTD: jax.Array, mix: jax.Array | None = None
  ) -> jax.Array:
    c = self.config
    linear = functools.partial(
      layers.Linear, rules=self.rules, bias=c.bias == 'all'
    )
    normed_BTD = layers.make_norm(c, 'norm')(x_BTD)
    up = linear(c.d_ff, init_std=c.init_std, name='up')
    (up_BTF,) = layers.project(normed_BTD, [up], self.method, mix)
    up_BTF = remat.product(up_BTF.astype(c.dot_dtype), up.spec, mix)
    hidden_BTF = ACTIVATIONS[c.activation](up_BTF.astype(jnp.float32))
    down = linear(c.d_model, init_std=layers.output_std(c), name='down')
    (y_BTD,) = layers.project(
      hidden_BTF.astype(c.dot_dtype), [down], self.method, mix
    )
    return remat.product(y_BTD.astype(x_BTD.dtype), down.spec, mix)


class DecoupledFFN(nn.Module):
  """pQuant (2602.22592), section 3.2 and 3.3, eq. 11.

    y = alpha * narrow(x) + beta * wide(x)

  `wide` is a gated layer of width d_ff - r, `narrow` one of width r. With N > 1
  there are N narrow branches, and a linear router with softmax sends each token
  to the one of highest probability, or to the k highest.

  Reconstructions, for the paper does not say: SiLU in the gate; the routed
  output is multiplied by its probability (the router's only gradient; 1 for
  N = 1, which recovers eq. 11), with k = 2 each by its own; the router reads
  the normed input in float32; no load balancing by default.
  """

  config: FrozenConfigDict
  rules: rules_lib.Rules
  method: dot.Method

  @nn.compact
  def __call__(
    self, x_BTD: jax.Array, mix: jax.Array | None = None
  ) -> jax.Array:
    c = self.config
    branch = functools.partial(
      Branch, config=c, rules=self.rules, method=self.method
    )
    wide = branch(width=c.d_ff - c.branch_width, name='wide')
    narrow = branch(
      width=c.branch_width,
      experts=c.n_experts if c.n_experts > 1 else 0,
      name='narrow',
    )
    alpha = beta = 1.0
    if c.feature_scaling:
      alpha = self.param('alpha', nn.initializers.constant(c.alpha_init), ())
      beta = self.param('beta', nn.initializers.constant(c.beta_init), ())
    normed_BTD = x_BTD
    if c.norm == 'pre' or c.norm_shared or c.n_experts > 1:
      normed_BTD = layers.make_norm(c, 'norm')(x_BTD)
    source = normed_BTD if c.norm == 'pre' or c.norm_shared else x_BTD
    readers = wide.readers() + narrow.readers()
    pairs = layers.operands(source, readers, self.method, mix)
    if c.n_experts == 1:
      gate_up = layers.products(narrow.readers(), pairs[2:], self.method)
      y_narrow = narrow.finish(*gate_up, mix)
    else:
      y_narrow = self._experts(normed_BTD, narrow, pairs[2:], mix)
    gate_up = layers.products(wide.readers(), pairs[:2], self.method)
    y_wide = wide.finish(*gate_up, mix)
    return (alpha * y_narrow + beta * y_wide).astype(x_BTD.dtype)

  def _experts(
    self, x_BTD: jax.Array, narrow: Branch, pairs: list[Pair], mix
  ) -> jax.Array:
    """What the chosen narrow branches give, weighed: float32 `[B, T, D]`."""
    c = self.config
    expert_BTk, weight_BTk = self._route(x_BTD)
    batch, length, k = expert_BTk.shape
    groups = experts.groups(batch)

    def in_groups(a_BTk):
      return a_BTk.reshape(groups, -1, k).swapaxes(1, 2)

    capacity = None
    if c.capacity_factor:
      tokens = batch * length // groups
      capacity = math.ceil(c.capacity_factor * k * tokens / c.n_experts)
    layout = experts.place(
      in_groups(expert_BTk), c.n_experts, c.expert_tile, capacity
    )
    kept_BTk = layout.kept_GkM.swapaxes(1, 2).reshape(batch, length, k)
    chosen_BTkE = jax.nn.one_hot(expert_BTk, c.n_experts, dtype=bool)
    chosen_BTkE &= kept_BTk[..., None]
    if c.capacity_factor:
      self.sow('router', 'dropped', 1 - jnp.mean(kept_BTk))
    self.sow('inputs', 'chosen', jnp.any(chosen_BTkE, 2))
    if c.expert_form == 'dense':
      self.sow('inputs', 'chosen_hidden', chosen_BTkE)
      y_BTkD = self._dense(narrow, pairs, chosen_BTkE, mix)
      return jnp.sum(y_BTkD * weight_BTk[..., None], axis=2)
    mine_GSE = jax.nn.one_hot(layout.expert_GS, c.n_experts, dtype=bool)
    mine_GSE &= layout.filled_GS[..., None]
    self.sow('inputs', 'chosen_hidden', mine_GSE)
    gate_up = experts.project(pairs, layout, self.method)
    hidden_GSF = narrow.hidden(*gate_up, mix)
    (pair,) = layers.operands(hidden_GSF, [narrow.down], self.method, mix)
    y_GSD = grouped_dot.grouped_dot(*pair, layout.expert_GC, self.method)
    y_GkMD = experts.spread(y_GSD, layout)
    y_GMD = experts.weigh(y_GkMD, in_groups(weight_BTk))
    return y_GMD.reshape(batch, length, -1)

  def _dense(
    self, narrow: Branch, pairs: list[Pair], chosen_BTkE: jax.Array, mix
  ) -> jax.Array:
    """Every expert for every token; the reference. Float32 `[B, T, k, D]`."""
    gate_up = layers.products(narrow.readers(), pairs, self.method)
    hidden_BTEF = narrow.hidden(*gate_up, mix)
    mine_BTkE1 = chosen_BTkE[..., None]
    hidden_BTkF = jnp.sum(
      jnp.where(mine_BTkE1, hidden_BTEF[:, :, None], 0), axis=3
    )
    (y_BTkED,) = layers.project(hidden_BTkF, [narrow.down], self.method, mix)
    return jnp.sum(jnp.where(mine_BTkE1, y_BTkED, 0), axis=3)

  def _route(self, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The experts of each token, best first, and their weights: `[B, T, k]`.

    Sows what the training loop logs and adds to the loss, under 'router':
    load (share of the choices, `[E]`), entropy (of the mean token, nats) and
    balance (E * sum_e load_e * mean probability_e; Switch, 2101.03961, eq. 4).
    """
    c = self.config
    kernel = self.param(
      'router',
      nn.initializers.normal(c.router_init_std),
      (c.d_model, c.n_experts),
      jnp.float32,
    )
    x_BTD = x_BTD.astype(jnp.float32)
    if c.router_jitter and self.has_rng('router'):
      # Switch, 2101.03961, section 2.4; in training alone.
      span = 1 - c.router_jitter, 1 + c.router_jitter
      x_BTD *= jax.random.uniform(
        self.make_rng('router'), x_BTD.shape, jnp.float32, *span
      )
    # 'highest': accelerators would round the operands of the product.
    logits_BTE = jnp.einsum('btd,de->bte', x_BTD, kernel, precision='highest')
    log_p = jax.nn.log_softmax(logits_BTE)
    p_BTE = jnp.exp(log_p)
    chosen, weights, rest_BTE = [], [], logits_BTE
    for _ in range(c.experts_per_token):
      chosen.append(jnp.argmax(rest_BTE, -1))
      hit_BTE = jax.nn.one_hot(chosen[-1], c.n_experts, dtype=bool)
      weights.append(jnp.sum(jnp.where(hit_BTE, p_BTE, 0), -1))
      rest_BTE = jnp.where(hit_BTE, -jnp.inf, rest_BTE)
    expert_BTk, weight_BTk = jnp.stack(chosen, -1), jnp.stack(weights, -1)
    hits = jax.nn.one_hot(expert_BTk, c.n_experts, dtype=jnp.float32)
    load_E = jnp.mean(hits, axis=(0, 1, 2))
    self.sow('router', 'load', load_E)
    self.sow('router', 'entropy', -jnp.mean(jnp.sum(p_BTE * log_p, -1)))
    balance = c.n_experts * jnp.sum(load_E * jnp.mean(p_BTE, axis=(0, 1)))
    self.sow('router', 'balance', balance)
    if not c.gate_probability:
      weight_BTk = jnp.ones_like(weight_BTk)
    return expert_BTk, weight_BTk
