"""Perplexity and bits per byte on the validation split."""

from collections.abc import Callable
import contextlib
import math
import time
from typing import Any
from typing import NamedTuple

import jax
from jax import numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict
import numpy as np

from qat import display
from qat import guard
from qat import objective as objective_lib
from qat import step as step_lib
from qat.data import dataset as dataset_lib
from qat.data import loader
from qat.data import progress
from qat.nn import transformer


class Sums(NamedTuple):
  """What the batches of a split add up to: float32 scalars."""

  nats: jax.Array
  tokens: jax.Array
  bytes: jax.Array


EvalStep = Callable[[Any, step_lib.Batch, jax.Array], Sums]


def make_eval_step(
  config: ConfigDict, model: transformer.Transformer, mesh: Mesh
) -> EvalStep:
  """A jitted (params, batch with weights, token_bytes_V) -> Sums."""

  @jax.jit
  def eval_step(params, batch, token_bytes_V) -> Sums:
    nats, _ = objective_lib.loss_sum(model, config, mesh, params, batch)
    bytes_BT = token_bytes_V[batch['targets']] * batch['weights']
    return Sums(nats, jnp.sum(batch['weights']), jnp.sum(bytes_BT))

  return eval_step


def put(batch: dict[str, np.ndarray], mesh: Mesh) -> step_lib.Batch:
  """A process's rows of a batch as global arrays on the mesh."""
  where = step_lib.batch_sharding(mesh)
  return {
    name: jax.make_array_from_process_local_data(where, rows)
    for name, rows in batch.items()
  }


def evaluate(
  eval_step: EvalStep,
  params: Any,
  config: ConfigDict,
  dataset: dataset_lib.Dataset,
  mesh: Mesh,
  hurry: Callable[[], object] = lambda: False,
  label: str = '',
) -> dict[str, float]:
  """Predicts every token of the validation split once.

  Args:
    eval_step: from `make_eval_step`.
    params: the parameters.
    config: a run's config; `eval` says how many batches.
    dataset: the open data set.
    mesh: the mesh.
    hurry: asked between batches; true ends the evaluation without a result.
    label: what the progress is called; '': none is shown.

  Returns:
    Nothing, in a hurry; else eval/loss (nats per token), eval/perplexity, and
    eval/bits_per_byte: the bits of all predicted tokens, ends of text included,
    over the bytes of the text they stand for.
  """
  token_bytes_V = jnp.asarray(dataset.token_bytes, jnp.float32)
  sums, start = [], time.monotonic()
  batches = loader.EvalBatches(
    dataset.path,
    seq_len=config.data.seq_len,
    batch_size=config.eval.batch_size,
    batches=config.eval.batches,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )
  total = len(batches)
  shown = (
    progress.bar(label, total)
    if label
    else contextlib.nullcontext(lambda done, words: None)
  )
  with jax.set_mesh(mesh), shown as show:
    for done, batch in enumerate(batches):
      if hurry():
        return {}
      sums.append(eval_step(params, put(batch, mesh), token_bytes_V))
      if done:  # Not far ahead of the device: `hurry` must be seen.
        with guard.time_limit('an evaluation', config.train.timeout_s):
          sums[-2].nats.block_until_ready()
        left = display.left(start, done, total)
        show(done, f'{done} of {total} batches, {left}')
    with guard.time_limit('the evaluation', config.train.timeout_s):
      found = np.array(jax.device_get(sums), np.float64)
    show(total, f'{total} of {total} batches')
  # Added up in float64 on the host: float32 would lose small parts.
  nats, tokens, size = np.sum(found, axis=0)
  loss = float(nats / tokens)
  return {
    'eval/loss': loss,
    'eval/perplexity': math.exp(min(loss, 700.0)),
    'eval/bits_per_byte': float(nats / math.log(2) / size),
  }
