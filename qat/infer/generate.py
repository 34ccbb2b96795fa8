"""Sampling from a model, token by token, with a KV cache."""

from collections.abc import Iterator
from collections.abc import Sequence
import functools
from typing import Any

import jax
from jax import numpy as jnp

from qat.nn import attention
from qat.nn import transformer


def filter_logits(
  logits_BV: jax.Array, temperature: float, top_k: int, top_p: float
) -> jax.Array:
  """Logits of what may be sampled; -inf for the rest.

  Args:
    logits_BV: float32.
    temperature: greater than 0.
    top_k: candidates kept; 0: all.
    top_p: the smallest set of candidates with at least this probability is
      kept, of what top_k left, after the temperature; 1: all.

  Returns:
    float32, of the same shape.
  """
  logits_BV = logits_BV / temperature
  if 0 < top_k < logits_BV.shape[-1]:
    kth_B1 = jax.lax.top_k(logits_BV, top_k)[0][..., -1:]
    logits_BV = jnp.where(logits_BV < kth_B1, -jnp.inf, logits_BV)
  if top_p < 1:
    sorted_BV = jnp.flip(jnp.sort(logits_BV, axis=-1), axis=-1)
    p_BV = jax.nn.softmax(sorted_BV)
    # A candidate stays while those before it have less than top_p.
    kept_BV = jnp.cumsum(p_BV, -1) - p_BV < top_p
    least_B1 = jnp.min(
      jnp.where(kept_BV, sorted_BV, jnp.inf), -1, keepdims=True
    )
    logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
  return logits_BV


def sample(
  logits_BV: jax.Array,
  key: jax.Array,
  temperature: float,
  top_k: int,
  top_p: float,
) -> jax.Array:
  """Token ids `[B]`; the most likely ones at temperature 0."""
  if temperature == 0:
    return jnp.argmax(logits_BV, -1)
  return jax.random.categorical(
    key, filter_logits(logits_BV, temperature, top_k, top_p)
  )


def empty_caches(
  model: transformer.Transformer, batch: int, length: int
) -> list[attention.Cache]:
  """A KV cache for each block, with room for `length` positions."""
  c = model.config
  shape = (batch, length, c.n_kv_heads, c.d_model // c.n_heads)
  return [
    attention.Cache(
      jnp.zeros(shape, c.dot_dtype), jnp.zeros(shape, c.dot_dtype)
    )
    for _ in range(c.n_layers)
  ]


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def _advance(model, params, tokens_BT, caches, start):
  """Logits `[B, V]` after the last of T tokens, and the longer caches."""
  logits_BTV, caches = model.apply(
    {'params': params}, tokens_BT, caches, start, method='logits'
  )
  return logits_BTV[:, -1], caches


def generate(
  model: transformer.Transformer,
  params: Any,
  prompt_T: Sequence[int],
  *,
  tokens: int,
  temperature: float,
  top_k: int,
  top_p: float,
  seed: int,
  stop: int,
) -> Iterator[int]:
  """New token ids, one by one as they are sampled.

  Args:
    model: the model.
    params: its parameters.
    prompt_T: token ids to continue; at least one.
    tokens: at most so many new ones.
    temperature: 0: greedy.
    top_k: candidates; 0: all.
    top_p: probability mass of the candidates; 1: all.
    seed: of the sampling.
    stop: the token id that ends the text; it is not yielded.

  Raises:
    ValueError: at once, for an empty prompt or options out of range.
  """
  if not prompt_T:
    raise ValueError('An empty prompt; begin with the end-of-text token.')
  longest = model.config.max_positions
  if 0 < longest < len(prompt_T) + tokens:
    raise ValueError(
      f'{len(prompt_T)} tokens of a prompt and {tokens} new ones; the model'
      f' takes at most {longest} (config.model.max_positions).'
    )
  # A comparison with NaN is false, so NaN is refused too.
  ok = 0 <= temperature < float('inf') and 0 < top_p <= 1
  if not ok or top_k < 0 or tokens < 0:
    raise ValueError(
      f'temperature={temperature}, top_k={top_k} and tokens={tokens} must not'
      f' be negative nor infinite, and top_p={top_p} must lie in (0, 1].'
    )

  def stream() -> Iterator[int]:
    caches = empty_caches(model, 1, len(prompt_T) + tokens)
    key = jax.random.key(seed)
    new = jnp.asarray([list(prompt_T)], jnp.int32)
    start = 0
    for i in range(tokens):
      logits_BV, caches = _advance(model, params, new, caches, start)
      start += new.shape[1]
      token_B = sample(
        logits_BV, jax.random.fold_in(key, i), temperature, top_k, top_p
      )
      if int(token_B[0]) == stop:
        return
      yield int(token_B[0])
      new = token_B[:, None].astype(jnp.int32)

  return stream()
