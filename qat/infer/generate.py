"""Sampling from a model with a KV cache: one text, or several at once.

The prompts of a batch are filled up on the right to the longest. What stands
there is never read: a row's first new token takes the place after its prompt,
and no token attends to a place behind its own. So a text is that of its row
alone, but for rounding, unless tokens of a batch share something by config
(`activation_granularity='tensor'`, `capacity_factor`).
"""

from collections.abc import Iterator
from collections.abc import Sequence
import functools
import time
from typing import Any
from typing import NamedTuple

import jax
from jax import lax
from jax import numpy as jnp
import numpy as np

from qat.nn import kv_cache
from qat.nn import transformer
from qat.quant import qtensor

# Of the keys and values that are kept.
CACHES = ('bfloat16', 'float32', 'int8')
# New tokens that one call of the compiled program makes, at most. What a call
# costs is shared by them; as many are asked for as take about a moment, so that
# text appears as it grows.
CHUNK = 64
_MOMENT_S = 0.2
# Room for positions is a multiple of it: few programs for many lengths.
_ROOM = 32


class Sampling(NamedTuple):
  """How a token is chosen: `filter_logits`; the likeliest at temperature 0."""

  temperature: float
  top_k: int
  top_p: float


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
  model: transformer.Transformer,
  batch: int,
  length: int,
  kind: str | None = None,
) -> list[kv_cache.Cache]:
  """A KV cache for each block, with room for `length` positions.

  Args:
    model: an unscanned model.
    batch: rows.
    length: positions of a row.
    kind: of `CACHES`; None: the model's `dot_dtype`. 'int8' has a scale for
      each token and head.

  Raises:
    ValueError: no such kind.
  """
  c = model.config
  if kind not in (None, *CACHES):
    raise ValueError(f'No KV cache of kind {kind!r}; one of {list(CACHES)}.')
  shape = (batch, length, c.n_kv_heads, c.d_model // c.n_heads)

  def empty():
    if kind == 'int8':
      scale = jnp.zeros((*shape[:-1], 1), jnp.float32)
      return qtensor.QTensor(jnp.zeros(shape, jnp.int8), scale, 'int8')
    return jnp.zeros(shape, kind or c.dot_dtype)

  return [kv_cache.Cache(empty(), empty()) for _ in range(c.n_layers)]


def advance(
  model: transformer.Transformer,
  params: Any,
  tokens_BT: jax.Array,
  caches: list[kv_cache.Cache],
  start: jax.Array | int,
  last_B: jax.Array,
) -> tuple[jax.Array, list[kv_cache.Cache]]:
  """Logits `[B, V]` after token `last_B` of T, and the longer caches."""
  logits_B1V, caches = model.apply(
    *({'params': params}, tokens_BT, caches, start, last_B), method='logits'
  )
  return logits_B1V[:, 0], caches


def _sampled(logits_BV, keys_B, i, sampling: Sampling) -> jax.Array:
  """The i-th new token of each row, int32."""

  def one(logits_V, key):
    key = jax.random.fold_in(key, i)
    return sample(logits_V[None], key, *sampling)[0]

  return jax.vmap(one)(logits_BV, keys_B).astype(jnp.int32)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=4)
def _first(model, sampling, params, tokens_BT, caches, length_B, keys_B):
  """The first new token of each row, and the caches with the prompts."""
  logits_BV, caches = advance(model, params, tokens_BT, caches, 0, length_B - 1)
  return _sampled(logits_BV, keys_B, 0, sampling), caches


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _more(model, sampling, params, caches, state, keys_B, first, most, stop):
  """Up to CHUNK further tokens: `[CHUNK, B]`, the caches and the state.

  Args:
    model: static.
    sampling: static.
    params: of the model.
    caches: with all tokens but the last.
    state: int32 `[B]` each: the last token of each row, its position; and
      whether the row has ended.
    keys_B: of the rows.
    first: the number of the first of these new tokens.
    most: how many are wanted.
    stop: the token that ends a row.
  """
  made_CB = jnp.zeros((CHUNK, *keys_B.shape), jnp.int32)

  def wanted(turn):
    i, _, (_, _, ended_B), _ = turn
    return (i < most) & ~jnp.all(ended_B)

  def step(turn):
    i, caches, (token_B, position_B, ended_B), made_CB = turn
    # One row's is written as a slice, those of several are scattered.
    start = position_B[0] if len(position_B) == 1 else position_B
    logits_BV, caches = advance(
      *(model, params, token_B[:, None], caches, start),
      jnp.zeros_like(position_B),
    )
    token_B = _sampled(logits_BV, keys_B, first + i, sampling)
    made_CB = made_CB.at[i].set(token_B)
    state = token_B, position_B + 1, ended_B | (token_B == stop)
    return i + 1, caches, state, made_CB

  turn = lax.while_loop(wanted, step, (0, caches, state, made_CB))
  return turn[3], turn[1], turn[2]


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
  cache: str | None = None,
) -> Iterator[int]:
  """New token ids of one text; see `batch`.

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
    cache: of `CACHES`; None: the model's `dot_dtype`.

  Raises:
    ValueError: at once, for an empty prompt or options out of range.
  """
  rows = batch(
    *(model, params, [prompt_T]),
    tokens=tokens,
    temperature=temperature,
    top_k=top_k,
    top_p=top_p,
    seeds=[seed],
    stop=stop,
    cache=cache,
  )
  return (token for (token,) in rows)


def batch(
  model: transformer.Transformer,
  params: Any,
  prompts: Sequence[Sequence[int]],
  *,
  tokens: int,
  temperature: float,
  top_k: int,
  top_p: float,
  seeds: Sequence[int],
  stop: int,
  cache: str | None = None,
) -> Iterator[list[int | None]]:
  """New token ids of several texts, as they are sampled.

  Args:
    model: the model, unscanned.
    params: its parameters.
    prompts: token ids to continue; at least one prompt, of at least one each.
    tokens: at most so many new ones.
    temperature: 0: greedy.
    top_k: candidates; 0: all.
    top_p: probability mass of the candidates; 1: all.
    seeds: of the sampling, one for each prompt.
    stop: the token id that ends a text; it is not yielded.
    cache: of `CACHES`; None: the model's `dot_dtype`.

  Returns:
    Rows in turn: a new token of each text, None of one that has ended.

  Raises:
    ValueError: at once, for an empty prompt or options out of range.
  """
  if not prompts or not all(prompts):
    raise ValueError('An empty prompt; begin with the end-of-text token.')
  if len(seeds) != len(prompts):
    raise ValueError(f'{len(seeds)} seeds for {len(prompts)} prompts.')
  longest, most = max(map(len, prompts)), model.config.max_positions
  if 0 < most < longest + tokens:
    raise ValueError(
      f'{longest} tokens of a prompt and {tokens} new ones; the model'
      f' takes at most {most} (config.model.max_positions).'
    )
  # A comparison with NaN is false, so NaN is refused too.
  ok = 0 <= temperature < float('inf') and 0 < top_p <= 1
  if not ok or top_k < 0 or tokens < 0:
    raise ValueError(
      f'temperature={temperature}, top_k={top_k} and tokens={tokens} must not'
      f' be negative nor infinite, and top_p={top_p} must lie in (0, 1].'
    )
  room = -(-(longest + tokens) // _ROOM) * _ROOM
  caches = empty_caches(model, len(prompts), room, cache)
  sampling = Sampling(temperature, top_k, top_p)
  return _rows(model, sampling, params, prompts, tokens, caches, seeds, stop)


def _rows(model, sampling, params, prompts, tokens, caches, seeds, stop):
  if not tokens:
    return
  length_B = np.array([len(prompt) for prompt in prompts], np.int32)
  tokens_BT = np.zeros((len(prompts), length_B.max()), np.int32)
  for row_T, prompt in zip(tokens_BT, prompts, strict=True):
    row_T[: len(prompt)] = prompt
  keys_B = jnp.stack([jax.random.key(seed) for seed in seeds])
  token_B, caches = _first(
    model, sampling, params, tokens_BT, caches, length_B, keys_B
  )
  state = token_B, jnp.asarray(length_B), token_B == stop
  made, rows_nB = 1, np.asarray(token_B)[None]
  # A clock may not decide what several processes run together.
  ask = 1 if jax.process_count() == 1 else CHUNK
  ended_B = np.zeros(len(prompts), bool)
  while True:
    for row_B in rows_nB:
      ended_B |= row_B == stop
      if ended_B.all():
        return
      pairs = zip(row_B, ended_B, strict=True)
      yield [None if ended else int(token) for token, ended in pairs]
    if made == tokens:
      return
    most = min(ask, tokens - made)
    start = time.monotonic()
    new_CB, caches, state = _more(
      *(model, sampling, params, caches, state, keys_B, made, most, stop)
    )
    made, rows_nB = made + most, np.asarray(new_CB)[:most]
    if time.monotonic() - start < _MOMENT_S:
      ask = min(2 * ask, CHUNK)
