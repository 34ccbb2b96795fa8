"""Causal self-attention: rotary positions, grouped queries, a KV cache."""

import functools
import math

import flax.linen as nn
import jax
from jax import lax
from jax import numpy as jnp
from ml_collections import FrozenConfigDict

from qat.nn import kv_cache
from qat.nn import layers
from qat.nn import remat
from qat.quant import dot
from qat.quant import rules as rules_lib

# Queries that the blocked form takes at a time; keys after the block are never
# touched, so small blocks save work and large ones run faster.
_BLOCK = 128


def rotary(
  x_BTNH: jax.Array,
  positions_T: jax.Array,
  theta: float,
  scaling: FrozenConfigDict | None = None,
) -> jax.Array:
  """Rotates pairs (i, i + H/2) by position * theta^(-2i/H), as LLaMA does.

  Args:
    x_BTNH: float queries or keys; H is the width of a head.
    positions_T: int, the position of each of the T tokens; or `[B, T]`.
    theta: base of the wavelengths.
    scaling: a config's `model.rope_scaling`; None: 'none'.

  Returns:
    float32 of the same shape.
  """
  half = x_BTNH.shape[-1] // 2
  frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  if scaling is not None and scaling.kind == 'llama3':
    frequency = _stretched(frequency, scaling)
  positions_1T = jnp.atleast_2d(positions_T).astype(jnp.float32)
  angle = positions_1T[..., None] * frequency[None, None]
  cos, sin = jnp.cos(angle)[:, :, None], jnp.sin(angle)[:, :, None]
  first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate(
    [first * cos - second * sin, second * cos + first * sin], axis=-1
  )


def _stretched(frequency: jax.Array, scaling: FrozenConfigDict) -> jax.Array:
  """LLaMA 3.1: long wavelengths times `factor`, a line between long and short.

  By how often a wave repeats in the `original_positions`: below
  `low_freq_factor` times it is long, above `high_freq_factor` times short.
  """
  low, high = scaling.low_freq_factor, scaling.high_freq_factor
  repeats = scaling.original_positions * frequency / (2 * math.pi)
  share = jnp.clip((repeats - low) / (high - low), 0, 1)  # Of the short.
  return frequency * (share + (1 - share) / scaling.factor)


class Attention(nn.Module):
  """Multi-head causal attention; its four projections are `Linear`."""

  config: FrozenConfigDict  # The model section of the config.
  rules: rules_lib.Rules
  method: dot.Method

  @nn.compact
  def __call__(
    self,
    x_BTD: jax.Array,
    positions_T: jax.Array,
    cache: kv_cache.Cache | None = None,
    mix: jax.Array | None = None,
  ) -> tuple[jax.Array, kv_cache.Cache | None]:
    """Returns the output `[B, T, D]` and the cache with T more positions.

    Positions are `[T]`; with a cache also `[B, T]`, those of each row.
    """
    c = self.config
    head = c.d_model // c.n_heads
    linear = functools.partial(layers.Linear, rules=self.rules)
    inside = c.norm == 'inside'
    own_eps = c.norm_eps if inside and not c.norm_shared else None
    read = functools.partial(
      linear,
      init_std=c.init_std,
      norm_eps=own_eps,
      bias=c.bias in ('qkv', 'all'),
    )
    if own_eps is None:
      x_BTD = layers.make_norm(c, 'norm')(x_BTD)
    readers = [
      read(c.n_heads * head, name='q'),
      read(c.n_kv_heads * head, name='k'),
      read(c.n_kv_heads * head, name='v'),
    ]
    q, k, v = layers.project(x_BTD, readers, self.method, mix)

    def split(y_BTN: jax.Array) -> jax.Array:
      return y_BTN.reshape(*y_BTN.shape[:2], -1, head)

    q_BTNH, k_BTKH = split(q), split(k)
    if c.positions == 'rotary':
      turn = functools.partial(
        rotary,
        positions_T=positions_T,
        theta=c.rope_theta,
        scaling=c.rope_scaling,
      )
      q_BTNH, k_BTKH = turn(q_BTNH), turn(k_BTKH)
    q_BTNH, k_BTKH, v_BTKH = (
      remat.product(a.astype(c.dot_dtype), linear.spec, mix)
      for a, linear in zip((q_BTNH, k_BTKH, split(v)), readers, strict=True)
    )
    if cache is None:
      y_BTNH = causal_attention(q_BTNH, k_BTKH, v_BTKH, c.attention)
    else:
      new = q_BTNH, k_BTKH, v_BTKH
      y_BTNH, cache = cache.attend(*new, positions_T, self.method.few_rows)
    out = linear(
      c.d_model,
      init_std=layers.output_std(c),
      norm_eps=c.norm_eps if inside else None,
      bias=c.bias == 'all',
      name='o',
    )
    y_BTD = remat.attention(y_BTNH, c.attention).reshape(*x_BTD.shape[:2], -1)
    (y_BTD,) = layers.project(y_BTD, [out], self.method, mix)
    return remat.product(y_BTD.astype(x_BTD.dtype), out.spec, mix), cache


def causal_attention(
  q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, form: str
) -> jax.Array:
  """softmax(q k^T / sqrt(H), causal) v.

  Args:
    q_BTNH: queries of N heads.
    k_BTKH: keys of K heads; K divides N.
    v_BTKH: values.
    form: 'blocked' (fast on CPUs), 'looped' (as few scores at once, for a GPU),
      'xla', or 'cudnn' (flash attention).

  Returns:
    `[B, T, N, H]`.
  """
  if form == 'looped':
    return _looped(q_BTNH, k_BTKH, v_BTKH)
  if form != 'blocked':
    return jax.nn.dot_product_attention(
      q_BTNH, k_BTKH, v_BTKH, is_causal=True, implementation=form
    )
  repeat = q_BTNH.shape[2] // k_BTKH.shape[2]
  k, v = (jnp.repeat(a, repeat, axis=2) for a in (k_BTKH, v_BTKH))
  turned = (a.transpose(0, 2, 1, 3) for a in (q_BTNH, k, v))
  return _blocked(*turned).transpose(0, 2, 1, 3)


def choose_form(
  name: str, platform: str, devices: int, dtype: str, width: int
) -> str:
  """Resolves a config's attention='auto' for a platform.

  The blocked form walks over the sequences of a batch and so suits one device
  that holds the whole batch.

  Args:
    name: of the form, or 'auto'.
    platform: 'cpu', 'gpu' or 'tpu'.
    devices: size of the mesh.
    dtype: of float products.
    width: of a head; cuDNN has multiples of 8 up to 128.
  """
  forms = ('auto', 'blocked', 'xla', 'cudnn', 'looped')
  if name not in forms:
    raise ValueError(f'model.attention={name!r}; one of {", ".join(forms)}.')
  if name == 'cudnn' and (platform != 'gpu' or dtype != 'bfloat16'):
    raise ValueError(
      "model.attention='cudnn' needs a GPU and model.dot_dtype='bfloat16', not"
      f' {platform} and {dtype!r}; choose auto.'
    )
  if name != 'auto':
    return name
  if platform == 'gpu':
    fits = dtype == 'bfloat16' and width % 8 == 0 and width <= 128
    return 'cudnn' if fits else 'xla'
  return 'blocked' if platform == 'cpu' and devices == 1 else 'xla'


def _looped(
  q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array
) -> jax.Array:
  """XLA's form, block of queries after block, whose scores are never kept.

  The blocked form is as sparing where its blocks follow one another, as on a
  CPU; a GPU's compiler lays out all of them at once.
  """
  length = q_BTNH.shape[1]
  block = min(_BLOCK, length)
  q_BTNH = jnp.pad(q_BTNH, ((0, 0), (0, -length % block), (0, 0), (0, 0)))
  q_BctNH = q_BTNH.reshape(len(q_BTNH), -1, block, *q_BTNH.shape[2:])

  @jax.checkpoint
  def one(number_q):
    number, q_BtNH = number_q
    query_t = number * block + jnp.arange(block)
    seen_tS = jnp.arange(length)[None] <= query_t[:, None]
    return jax.nn.dot_product_attention(
      q_BtNH, k_BTKH, v_BTKH, mask=seen_tS[None, None], implementation='xla'
    )

  numbers = jnp.arange(q_BctNH.shape[1])
  y_cBtNH = lax.map(one, (numbers, q_BctNH.swapaxes(0, 1)))
  return y_cBtNH.swapaxes(0, 1).reshape(q_BTNH.shape)[:, :length]


# The blocked form. One sequence at a time, so that its scores stay in the
# processor's cache; keys beyond the block's last query are skipped; the
# backward pass recomputes the scores from the saved log-sum-exp (the scheme of
# FlashAttention, 2205.14135). Operands are kept in the order in which XLA:CPU
# multiplies fast: a left operand contracts its last axis.


@jax.custom_vjp
def _blocked(q_BNTH, k_BNTH, v_BNTH):
  return _blocked_fwd(q_BNTH, k_BNTH, v_BNTH)[0]


def _blocks(length: int) -> list[tuple[int, int]]:
  return [(i, min(i + _BLOCK, length)) for i in range(0, length, _BLOCK)]


def _scores(q_NtH, k_NsH, start: int) -> jax.Array:
  """Masked scores of queries from `start` on with keys from 0 on, float32."""
  s = jnp.einsum(
    'nth,nsh->nts', q_NtH, k_NsH, preferred_element_type=jnp.float32
  ) * (q_NtH.shape[-1] ** -0.5)
  query = start + lax.broadcasted_iota(jnp.int32, s.shape, 1)
  key = lax.broadcasted_iota(jnp.int32, s.shape, 2)
  return jnp.where(key <= query, s, -jnp.inf)


def _blocked_fwd(q_BNTH, k_BNTH, v_BNTH):
  def one(qkv):
    q, k, v = qkv
    outputs, lses = [], []
    for a, b in _blocks(q.shape[1]):
      s = _scores(q[:, a:b], k[:, :b], a)
      top = jnp.max(s, -1, keepdims=True)
      p = jnp.exp(s - top)
      total = jnp.sum(p, -1, keepdims=True)
      o = jnp.einsum(
        'nts,nsh->nth',
        p.astype(v.dtype),
        v[:, :b],
        preferred_element_type=jnp.float32,
      )
      outputs.append((o / total).astype(v.dtype))
      lses.append(top + jnp.log(total))
    return jnp.concatenate(outputs, 1), jnp.concatenate(lses, 1)

  o, lse = lax.map(one, (q_BNTH, k_BNTH, v_BNTH))
  return o, (q_BNTH, k_BNTH, v_BNTH, o, lse)


def _blocked_bwd(residuals, do_BNTH):
  q, k, v, o, lse = residuals
  do = do_BNTH.astype(q.dtype)
  delta = jnp.sum(
    do.astype(jnp.float32) * o.astype(jnp.float32), -1, keepdims=True
  )
  product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
  scale = q.shape[-1] ** -0.5

  def one(args):
    q, k, v, do, lse, delta, q_NHT, do_NHT = args
    dqs = []
    dk_NHS = jnp.zeros(q_NHT.shape, jnp.float32)
    dv_NHS = jnp.zeros(q_NHT.shape, jnp.float32)
    for a, b in _blocks(q.shape[1]):
      p = jnp.exp(_scores(q[:, a:b], k[:, :b], a) - lse[:, a:b])
      dp = product('nth,nsh->nts', do[:, a:b], v[:, :b])
      ds = (p * (dp - delta[:, a:b]) * scale).astype(q.dtype)
      p = p.astype(q.dtype)
      dqs.append(product('nts,nsh->nth', ds, k[:, :b]))
      dk = product('nht,nts->nhs', q_NHT[..., a:b], ds)
      dv = product('nht,nts->nhs', do_NHT[..., a:b], p)
      dk_NHS = dk_NHS.at[..., :b].add(dk)
      dv_NHS = dv_NHS.at[..., :b].add(dv)
    grads = (jnp.concatenate(dqs, 1), dk_NHS, dv_NHS)
    return jax.tree.map(lambda g: g.astype(q.dtype), grads)

  turn = functools.partial(jnp.swapaxes, axis1=-1, axis2=-2)
  dq, dk, dv = lax.map(one, (q, k, v, do, lse, delta, turn(q), turn(do)))
  return dq, turn(dk), turn(dv)


_blocked.defvjp(_blocked_fwd, _blocked_bwd)
