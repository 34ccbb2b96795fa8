"""What a model thinks of a continuation behind a context: its log-probability.

Requests are sorted by length and padded to one of few lengths, so that few
programs are compiled and little is computed for nothing; those that read the
same tokens share a row. Logits are made only where a continuation is predicted,
and only `_CHUNK` positions at a time.
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
import contextlib
import itertools
import time
from typing import Any
from typing import NamedTuple

import jax
from jax import lax
from jax import numpy as jnp
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict
import numpy as np
import tokenizers

from qat import display
from qat import sharding
from qat.data import progress
from qat.data import tokenizer as tokenizer_lib
from qat.nn import transformer

_CHUNK = 256  # Positions whose logits live at once.
_SHORTEST = 32  # Of the lengths that requests are padded to.


class Request(NamedTuple):
  """A continuation to score, and the text that it follows."""

  context: str
  continuation: str


class Tokens(NamedTuple):
  """A request as the model reads it.

  Attributes:
    ids: int32, context and continuation.
    scored: how many of the last ones are the continuation's; at least 1.
    cut: whether the context lost its beginning.
  """

  ids: np.ndarray
  scored: int
  cut: bool


class Score(NamedTuple):
  """What a model thinks of a continuation.

  Attributes:
    nats: -log p of all its tokens.
    greedy: whether each of them is the most likely one.
  """

  nats: float
  greedy: bool


def encode(
  tokenizer: tokenizers.Tokenizer,
  requests: Sequence[Request],
  *,
  start: Sequence[int],
  longest: int,
) -> list[Tokens]:
  """Tokens of requests: of the whole text, split where the context ends.

  Spaces at the end of a context count as the continuation's, since tokens
  begin with a space. A text and its beginning may be tokenized differently
  where they meet; the split is then by the number of the context's tokens.

  Args:
    tokenizer: of the model.
    requests: what to encode.
    start: what begins a text for this model, or nothing.
    longest: tokens that the model reads at most; a longer context loses its
      beginning. 0: no limit.

  Raises:
    ValueError: a continuation without tokens of its own, or with too many, or
      without one before it.
  """
  bare = [len(r.context.rstrip()) for r in requests]
  contexts = tokenizer_lib.encode(
    tokenizer, [r.context[:n] for r, n in zip(requests, bare, strict=True)]
  )
  wholes = tokenizer_lib.encode(
    tokenizer, [r.context + r.continuation for r in requests]
  )
  found = []
  for request, context, whole in zip(requests, contexts, wholes, strict=True):
    scored = len(whole) - len(context)
    ids = np.concatenate([np.asarray(start, np.int64), whole]).astype(np.int32)
    # The model reads all tokens but the last.
    cut = bool(longest) and len(ids) - 1 > longest
    ids = ids[-(longest + 1) :] if cut else ids
    if not 0 < scored < len(ids):
      raise ValueError(
        f'The continuation {request.continuation[:80]!r} of'
        f' {request.context[-80:]!r} has {scored} tokens of its own, of'
        f' {len(ids)} that the model can read: it needs one or more, and one'
        ' before them.'
      )
    found.append(Tokens(ids, scored, cut))
  return found


# (params, tokens_BT, place_S, target_S, count) -> -log p of each target at its
# place of the flat batch, and whether it is the most likely token there: of the
# first `count`; nothing of the others.
Step = Callable[..., tuple[jax.Array, jax.Array]]


def make_step(config: ConfigDict, model: transformer.Transformer) -> Step:
  """A jitted step for batches of any shape; each is compiled once."""
  dtype = config.model.dot_dtype

  @jax.jit
  def step(params, tokens_BT, place_S, target_S, count):
    x_BTD, _ = model.apply({'params': params}, tokens_BT)
    head_VD = model.apply({'params': params}, method='output_embedding')
    head_VD = head_VD.astype(dtype)
    x_MD = x_BTD.reshape(-1, x_BTD.shape[-1]).astype(dtype)

    def add(i, found):
      nats_S, greedy_S = found
      place_C, target_C = (
        lax.dynamic_slice_in_dim(a, i * _CHUNK, _CHUNK)
        for a in (place_S, target_S)
      )
      logits_CV = jnp.einsum(
        'cd,vd->cv',
        x_MD[place_C],
        head_VD,
        preferred_element_type=jnp.float32,
      )
      hit_C1 = jnp.take_along_axis(logits_CV, target_C[:, None], -1)
      nats_C = jax.nn.logsumexp(logits_CV, -1) - hit_C1[:, 0]
      greedy_C = jnp.argmax(logits_CV, -1) == target_C
      return (
        lax.dynamic_update_slice_in_dim(nats_S, nats_C, i * _CHUNK, 0),
        lax.dynamic_update_slice_in_dim(greedy_S, greedy_C, i * _CHUNK, 0),
      )

    start = (jnp.zeros(place_S.shape), jnp.zeros(place_S.shape, bool))
    found = lax.fori_loop(0, (count + _CHUNK - 1) // _CHUNK, add, start)
    return lax.with_sharding_constraint(found, P())  # Whole, on each device.

  return step


def score(
  step: Step,
  params: Any,
  mesh: Mesh,
  requests: Sequence[Tokens],
  *,
  batch_tokens: int,
  longest: int,
  label: str,
  hurry: Callable[[], object] = lambda: False,
  limit: Callable[[], contextlib.AbstractContextManager] = (
    contextlib.nullcontext
  ),
) -> list[Score]:
  """Scores requests.

  Args:
    step: from `make_step`.
    params: the parameters.
    mesh: the devices, which share the rows of a batch; every process asks for
      the same requests.
    requests: from `encode`.
    batch_tokens: positions of a batch, padding included; a request that is
      longer is a batch of its own.
    longest: as in `encode`; nothing is padded beyond it.
    label: what the progress is called; '': none is shown.
    hurry: asked between batches; true ends the scoring without a result.
    limit: makes what each batch is computed within, a time limit say.

  Returns:
    The scores, in the order of the requests; in a hurry, none.
  """
  found: list[Score | None] = [None] * len(requests)
  readings = _readings(requests)
  lengths = [len(requests[first].ids) - 1 for first, *_ in readings]
  parts = list(_batches(lengths, batch_tokens, longest, mesh.size))
  total = sum(rows * length for _, rows, length in parts)
  done, start, scored = 0, time.monotonic(), 0
  shown = contextlib.nullcontext(lambda done, words: None)
  if label:
    shown = progress.bar(label, total)
  with jax.set_mesh(mesh), shown as show:
    for members, rows, length in parts:
      if hurry():
        return []
      own = [readings[i] for i in members]
      tokens_BT, *rest = _fill(
        [[requests[i] for i in row] for row in own], rows, length
      )
      batch = _spread(tokens_BT, mesh), *rest
      with limit():
        nats_S, greedy_S = jax.device_get(step(params, *batch))
      at = 0
      for i in itertools.chain(*own):
        part = slice(at, at + requests[i].scored)
        nats = float(np.sum(nats_S[part], dtype=np.float64))
        found[i] = Score(nats, bool(np.all(greedy_S[part])))
        at = part.stop
      done, scored = done + rows * length, scored + sum(map(len, own))
      left = display.left(start, done, total)
      show(done, f'{scored} of {len(requests)} requests, {left}')
  return found


def padded(length: int) -> int:
  """The smallest of 32, 48, 64, 96, 128, 192, ... that is not below."""
  size = _SHORTEST
  while length > size:
    size = size * 3 // 2 if size.bit_count() == 1 else size * 4 // 3
  return size


def _spread(tokens_BT: np.ndarray, mesh: Mesh) -> jax.Array:
  """Rows that all processes have, as one array over the devices."""
  return jax.make_array_from_callback(
    tokens_BT.shape,
    NamedSharding(mesh, sharding.BATCH),
    lambda index: tokens_BT[index],
  )


def _readings(requests: Sequence[Tokens]) -> list[list[int]]:
  """Requests by what the model reads: choices of one token read the same.

  A row has as many targets as tokens at most, so that there is room for them.
  """
  found: list[list[int]] = []
  last: dict[bytes, tuple[list[int], int]] = {}  # And room that is left.
  for i, (ids, scored, _) in enumerate(requests):
    read = ids[:-1].tobytes()
    row, room = last.get(read, ([], 0))
    if room < scored:
      row, room = [], len(ids) - 1
      found.append(row)
    row.append(i)
    last[read] = row, room - scored
  return found


def _batches(
  lengths: Sequence[int], batch_tokens: int, longest: int, devices: int
) -> Iterator[tuple[list[int], int, int]]:
  """Which rows of these lengths go together, their batch's rows and length.

  The longest come first: what does not fit into memory fails at once. A length
  with few of them has fewer rows, of a number that other tasks have, too.
  """
  by_length: dict[int, list[int]] = {}
  for i, length in enumerate(map(padded, lengths)):
    length = min(length, longest) if longest else length
    by_length.setdefault(length, []).append(i)
  for length in sorted(by_length, reverse=True):
    members = by_length[length]
    few = 1 << (len(members) - 1).bit_length()
    rows = max(1, min(batch_tokens // length, few))
    rows = -(-rows // devices) * devices
    for i in range(0, len(members), rows):
      yield members[i : i + rows], rows, length


def _fill(
  readings: Sequence[Sequence[Tokens]], rows: int, length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.int32]:
  """The arguments of a step after the parameters, of one shape for a length."""
  tokens_BT = np.zeros((rows, length), np.int32)
  size = -(-rows * length // _CHUNK) * _CHUNK
  place_S, target_S = np.zeros((2, size), np.int32)
  at = 0
  for row, requests in enumerate(readings):
    read = requests[0].ids[:-1]
    tokens_BT[row, : len(read)] = read
    end = row * length + len(read)
    for ids, scored, _ in requests:
      place_S[at : at + scored] = np.arange(end - scored, end)
      target_S[at : at + scored] = ids[-scored:]
      at += scored
  return tokens_BT, place_S, target_S, np.int32(at)
