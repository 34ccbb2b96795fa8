"""Feed-forward layers for tests, and the paper's equations in float64."""

import functools

import jax
from jax import numpy as jnp
from ml_collections import FrozenConfigDict
import numpy as np

from qat.nn import ffn
from qat.quant import dot
from qat.quant import rules as rules_lib
from tests import tiny

METHOD = dot.Method(int8=False, dtype='float32')


def normal(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def layer(method='pquant', **fields):
  """A feed-forward layer of a small config, its parameters and an input."""
  fields = {f'model.{key}': value for key, value in fields.items()}
  config = tiny.config(method, {**tiny.EXACT, **fields})
  # A layer alone has the path 'wide/up' rather than 'block_0/ffn/wide/up'.
  pairs = [
    (pattern.removeprefix('.*/ffn/'), name)
    for pattern, name in config.quant.rules
  ]
  rules = rules_lib.make_rules(pairs, config.quant.specs)
  model = FrozenConfigDict(config.model)
  if model.ffn == 'decoupled':
    module = ffn.DecoupledFFN(model, rules, METHOD)
  else:
    module = ffn.GatedFFN(model, rules, METHOD, width=model.d_ff)
  x_BTD = normal(2, 6, model.d_model)
  shapes = jax.eval_shape(module.init, jax.random.key(0), x_BTD)['params']
  leaves, tree = jax.tree.flatten(shapes)
  params = [  # Kernels around 0; gains, alpha and beta around 1.
    jnp.asarray(0.2 * normal(*p.shape, seed=i) + (p.ndim < 2))
    for i, p in enumerate(leaves)
  ]
  return module, jax.tree.unflatten(tree, params), x_BTD


@functools.partial(jax.jit, static_argnums=0)
def run(module, params, x_BTD):
  return module.apply({'params': params}, x_BTD)


@functools.partial(jax.jit, static_argnums=0)
def sown(module, params, x_BTD):
  kinds = ['router', 'inputs']
  return module.apply({'params': params}, x_BTD, mutable=kinds)[1]


@functools.partial(jax.jit, static_argnums=0)
@functools.partial(jax.grad, argnums=1)
def gradients(module, params, x_BTD, dy_BTD):
  """Of the parameters, for a gradient of the output."""
  y_BTD = module.apply({'params': params}, x_BTD).astype(jnp.float32)
  return jnp.sum(y_BTD * dy_BTD)


# The forward pass of the paper, sections 3.1 to 3.3, in float64.


def slow_norm(x, params):
  x = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)
  return x * params['norm']['scale']


def slow_int8_input(x):
  scale = np.abs(x).max(-1, keepdims=True) / 127
  return np.round(x / scale) * scale


def slow_binary(w):
  return np.where(w - w.mean() > 0, 1, -1) * np.abs(w).mean()


def slow_int8(w):
  scale = np.abs(w).max() / 127
  return np.round(w / scale) * scale


def slow_linear(x, params, quantize):
  if 'norm' in params:
    x = slow_norm(x, params)
  return slow_int8_input(x) @ quantize(params['kernel'])


def slow_branch(x, params, quantize):
  gate = slow_linear(x, params['gate'], quantize)
  up = slow_linear(x, params['up'], quantize)
  silu = gate / (1 + np.exp(-gate))
  return slow_linear(silu * up, params['down'], quantize)


def slow_decoupled(x, params, gate_probability, norm_shared):
  params = jax.tree.map(np.float64, params)
  x = np.float64(x)
  normed = slow_norm(x, params) if 'norm' in params else x
  source = normed if norm_shared else x
  wide = slow_branch(source, params['wide'], slow_binary)
  if 'router' not in params:
    narrow = slow_branch(source, params['narrow'], slow_int8)
  else:
    narrow = np.zeros_like(wide)
    for token in np.ndindex(x.shape[:2]):
      logits = normed[token] @ params['router']
      p = np.exp(logits) / np.exp(logits).sum()
      branch = one_expert(params['narrow'], p.argmax())
      y = slow_branch(source[token], branch, slow_int8)
      narrow[token] = y * (p.max() if gate_probability else 1)
  return params['alpha'] * narrow + params['beta'] * wide


def one_expert(narrow, i):
  """The parameters of one of the stacked branches; norms are common."""
  return {
    name: {**narrow[name], 'kernel': narrow[name]['kernel'][i]}
    for name in ('gate', 'up', 'down')
  }


def router_of(params, x_BTD):
  """Probabilities `[B, T, E]` in float64."""
  params = jax.tree.map(np.float64, params)
  e = np.exp(slow_norm(np.float64(x_BTD), params) @ params['router'])
  return e / e.sum(-1, keepdims=True)
