"""The same models in the textbook form: what the fast ones are compared with.

Plain float32 straight-through autodiff: every projection norms, quantizes and
multiplies for itself, `q = x + stop_gradient(quantize(x) - x)` leaves the
gradient to autodiff, attention and cross-entropy hold all their scores. Tests
compare values and gradients with it, and the benchmark times it.

It reads the parameter tree of `transformer.Transformer`.
"""

from typing import Any

import jax
from jax import lax
from jax import numpy as jnp
from ml_collections import ConfigDict

from qat.nn import stacked
from qat.quant import composed
from qat.quant import rules as rules_lib


def _pass_through(x: jax.Array, quantized: jax.Array) -> jax.Array:
  """The value of `quantized` with the gradient of `x`."""
  return x + lax.stop_gradient(quantized - x)


def _norm(x: jax.Array, params: Any, eps: float) -> jax.Array:
  gain_D = params['norm']['scale']
  mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
  gain = gain_D.reshape((1,) * (x.ndim - 1) + gain_D.shape)
  return x / jnp.sqrt(mean_square + eps) * gain


def loss(
  params: Any,
  batch: dict[str, jax.Array],
  config: ConfigDict,
  rules: rules_lib.Rules,
) -> jax.Array:
  """Mean cross-entropy of a batch, nats per token.

  Args:
    params: the parameter tree of the model of `config`, in either form.
    batch: tokens and targets, int32 `[B, T]`.
    config: the `model` section; one narrow branch at most.
    rules: how layers are quantized.

  Raises:
    ValueError: for experts.
  """
  c = config
  params = stacked.unstacked(params)
  if c.n_experts > 1:
    raise ValueError('The textbook form has no experts; set model.n_experts=1.')

  def linear(x, path):
    parameters = params
    for part in path.split('/'):
      parameters = parameters[part]
    spec = rules.find(path)
    w_KN = parameters['kernel']
    if 'norm' in parameters:
      x = _norm(x, parameters, c.norm_eps)
    if spec.activation != 'none':
      x = _pass_through(x, spec.quantize_input(x).dequantize())
    if composed.is_quantized(w_KN):
      w_KN = w_KN.dequantize()
    elif spec.weight != 'none':
      w_KN = _pass_through(w_KN, spec.quantize(parameters).dequantize())
    return x @ w_KN

  def input_of(layer, x):
    """What a layer's linears share: nothing, where each has its own norm."""
    return _norm(x, layer, c.norm_eps) if 'norm' in layer else x

  def attention(x, path, layer):
    x = input_of(layer, x)
    head = c.d_model // c.n_heads
    q, k, v = (
      linear(x, f'{path}/{name}').reshape(*x.shape[:2], -1, head)
      for name in 'qkv'
    )
    q, k = _rotate(q, c.rope_theta), _rotate(k, c.rope_theta)
    groups = c.n_heads // c.n_kv_heads
    k, v = jnp.repeat(k, groups, axis=2), jnp.repeat(v, groups, axis=2)
    scores = jnp.einsum('bqnh,bknh->bnqk', q, k) / jnp.sqrt(float(head))
    causal = jnp.tril(jnp.ones((1, 1, *scores.shape[2:]), bool))
    p = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf), axis=-1)
    y = jnp.einsum('bnqk,bknh->bqnh', p, v)
    return linear(y.reshape(x.shape), f'{path}/o')

  def gated(x, path):
    gate = linear(x, f'{path}/gate')
    return linear(jax.nn.silu(gate) * linear(x, f'{path}/up'), f'{path}/down')

  def ffn(x, path, layer):
    x = input_of(layer, x)
    if 'narrow' not in layer:
      return gated(x, path)
    narrow, wide = gated(x, f'{path}/narrow'), gated(x, f'{path}/wide')
    return layer.get('alpha', 1) * narrow + layer.get('beta', 1) * wide

  x = params['embed']['embedding'][batch['tokens']]
  for i in range(c.n_layers):
    block = params[f'block_{i}']
    x = x + attention(x, f'block_{i}/attn', block['attn'])
    x = x + ffn(x, f'block_{i}/ffn', block['ffn'])
  x = _norm(x, {'norm': params['final_norm']}, c.norm_eps)
  head_VD = (
    params['embed']['embedding'] if c.tied_embeddings else params['head']
  )
  log_p = jax.nn.log_softmax(x @ head_VD.T)
  hit = jnp.take_along_axis(log_p, batch['targets'][..., None], axis=-1)
  return -jnp.mean(hit)


def _rotate(x_BTNH: jax.Array, theta: float) -> jax.Array:
  """Rotary positions, as multiplication of complex numbers."""
  half = x_BTNH.shape[-1] // 2
  rate = theta ** (-jnp.arange(half) / half)
  angle = jnp.arange(x_BTNH.shape[1])[:, None] * rate[None]
  turn = jnp.exp(1j * angle)[None, :, None]
  z = lax.complex(x_BTNH[..., :half], x_BTNH[..., half:]) * turn
  return jnp.concatenate([z.real, z.imag], axis=-1)
