"""Feed-forward layers: the gated one, and pQuant's decoupled one."""

import functools
import math

import flax.linen as nn
import jax
from jax import numpy as jnp
from ml_collections import FrozenConfigDict

from qat.nn import layers
from qat.quant import dot
from qat.quant import rules as rules_lib

# Of the gate. 'silu' makes the layer SwiGLU (2002.05202).
ACTIVATIONS = {
  'silu': jax.nn.silu,
  'gelu': jax.nn.gelu,
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
    std = c.init_std
    if c.init_residual_scale:
      std /= math.sqrt(2 * c.n_layers)
    linear = functools.partial(
      layers.Linear, rules=self.rules, experts=self.experts
    )
    own_eps = c.norm_eps if inside and not c.norm_shared else None
    self.gate = linear(self.width, init_std=c.init_std, norm_eps=own_eps)
    self.up = linear(self.width, init_std=c.init_std, norm_eps=own_eps)
    self.down = linear(
      c.d_model, init_std=std, norm_eps=c.norm_eps if inside else None
    )

  def readers(self) -> list[layers.Linear]:
    """The layers that read the input of the feed-forward layer."""
    return [self.gate, self.up]

  def finish(
    self,
    gate: jax.Array,
    up: jax.Array,
    chosen: jax.Array | None = None,
    mix: jax.Array | None = None,
  ) -> jax.Array:
    """Gates and projects down.

    Args:
      gate: `[..., F]`, or `[..., E, F]` of stacked experts.
      up: like `gate`.
      chosen: bool `[..., E]`, the expert of each token; None without experts.
      mix: as in `layers.project`.

    Returns:
      float32 `[..., D]`.
    """
    dtype = self.config.dot_dtype
    hidden = gated(gate.astype(dtype), up.astype(dtype), self.config.activation)
    if chosen is None:
      return layers.project(hidden, [self.down], self.method, mix)[0]
    hidden = jnp.sum(jnp.where(chosen[..., None], hidden, 0), axis=-2)
    return layers.project_by_expert(hidden, self.down, chosen, self.method, mix)


class GatedFFN(Branch):
  """The layer of LLaMA, BitNet and b1.58: one branch of width d_ff."""

  @nn.compact
  def __call__(
    self, x_BTD: jax.Array, mix: jax.Array | None = None
  ) -> jax.Array:
    c = self.config
    if c.norm == 'pre' or c.norm_shared:
      x_BTD = layers.RMSNorm(c.norm_eps, name='norm')(x_BTD)
    gate, up = layers.project(x_BTD, self.readers(), self.method, mix)
    y_BTD = self.finish(gate, up, mix=mix)
    return y_BTD.astype(x_BTD.dtype)


class DecoupledFFN(nn.Module):
  """pQuant (2602.22592), section 3.2 and 3.3, eq. 11.

    y = alpha * narrow(x) + beta * wide(x)

  `wide` is a gated layer of width d_ff - r, `narrow` one of width r. With N > 1
  there are N narrow branches, and a linear router with softmax sends each token
  to the one of highest probability.

  Reconstructions, for the paper does not say: SiLU in the gate; the routed
  output is multiplied by its probability (the router's only gradient; 1 for
  N = 1, which recovers eq. 11); the router reads the normed input in float32;
  no load balancing by default.
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
    alpha = self.param('alpha', nn.initializers.constant(c.alpha_init), ())
    beta = self.param('beta', nn.initializers.constant(c.beta_init), ())
    normed_BTD = x_BTD
    if c.norm == 'pre' or c.norm_shared or c.n_experts > 1:
      normed_BTD = layers.RMSNorm(c.norm_eps, name='norm')(x_BTD)
    source = normed_BTD if c.norm == 'pre' or c.norm_shared else x_BTD
    wide_gate, wide_up, gate, up = layers.project(
      source, wide.readers() + narrow.readers(), self.method, mix
    )
    if c.n_experts > 1:
      chosen_BTE, weight_BT1 = self._route(normed_BTD)
      y_narrow = narrow.finish(gate, up, chosen_BTE, mix) * weight_BT1
    else:
      y_narrow = narrow.finish(gate, up, mix=mix)
    y_wide = wide.finish(wide_gate, wide_up, mix=mix)
    return (alpha * y_narrow + beta * y_wide).astype(x_BTD.dtype)

  def _route(self, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The chosen expert, one-hot bool `[B, T, E]`, and its weight `[B, T, 1]`.

    Sows what the training loop logs and adds to the loss, under 'router':
    load (share of tokens, `[E]`), entropy (of the mean token, nats) and balance
    (E * sum_e load_e * mean probability_e; Switch, 2101.03961, eq. 4).
    """
    c = self.config
    kernel = self.param(
      'router',
      nn.initializers.normal(c.router_init_std),
      (c.d_model, c.n_experts),
      jnp.float32,
    )
    # 'highest': accelerators would round the operands of the product.
    logits = jnp.einsum(
      'btd,de->bte', x_BTD.astype(jnp.float32), kernel, precision='highest'
    )
    log_p = jax.nn.log_softmax(logits)
    p = jnp.exp(log_p)
    chosen = jax.nn.one_hot(jnp.argmax(logits, -1), c.n_experts, dtype=bool)
    load = jnp.mean(chosen, axis=(0, 1))
    self.sow('inputs', 'chosen', chosen)
    self.sow('router', 'load', load)
    self.sow('router', 'entropy', -jnp.mean(jnp.sum(p * log_p, -1)))
    self.sow(
      'router',
      'balance',
      c.n_experts * jnp.sum(load * jnp.mean(p, axis=(0, 1))),
    )
    weight = jnp.sum(jnp.where(chosen, p, 0), -1, keepdims=True)
    if not c.gate_probability:
      weight = jnp.ones_like(weight)
    return chosen, weight
