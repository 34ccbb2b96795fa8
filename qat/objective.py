"""What a step minimizes, and its mean loss over a batch.

windows            the mean over all next tokens
right alone        the mean over rows, a task's prompts, of the mean over the
                   tokens of the right continuation
choices            the mean over documents of -log softmax over their choices,
                   each with the mean log-probability of its tokens: what
                   MeZO (2305.17333) trains classification with
"""

from collections.abc import Callable
import functools
from typing import Any

import jax
from jax import lax
from jax import numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from qat import estimators
from qat import sharding
from qat.nn import loss as loss_lib
from qat.nn import reference
from qat.nn import transformer
from qat.zo import perturb

# tokens, targets: int32 [B, T]; maybe weights, float32 [B, T]; right, float32
# [B], of a task's choices: see `task_loader.TaskLoader`; and rng: key data for
# each micro-batch, of a step that draws random numbers.
Batch = dict[str, jax.Array]


def loss_sum(
  model: transformer.Transformer,
  config: ConfigDict,
  mesh: Mesh,
  params: Any,
  batch: Batch,
  mix: jax.Array | None = None,
) -> tuple[jax.Array, dict]:
  """Summed cross-entropy of a batch in nats, and what the routers sowed.

  `mix` is the share of quantization while it is annealed; None: all.
  """
  x_BTD, head_VD, routers = _states(model, params, batch, mix)
  weights = batch.get('weights')
  if weights is None:
    weights = jnp.ones(batch['targets'].shape, jnp.float32)
  split = _over_batch(config, mesh, loss_lib.cross_entropy)
  return split(x_BTD, head_VD, batch['targets'], weights), routers


def of_choices(
  model: transformer.Transformer,
  config: ConfigDict,
  mesh: Mesh,
  params: Any,
  batch: Batch,
  mix: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, dict]:
  """The mean loss of choices, and what has its gradient.

  Args:
    model: any.
    config: of the run; `data.task_choices` rows are a document's.
    mesh: the mesh.
    params: the parameters.
    batch: with 'right'.
    mix: see `loss_sum`.

  Returns:
    The loss in nats, which has no gradient; the same number, with one; and what
    the routers sowed.
  """
  x_BTD, head_VD, routers = _states(model, params, batch, mix)
  targets, weights = batch['targets'], batch['weights']
  by_row = _over_batch(config, mesh, loss_lib.nats_by_row, summed=False)
  nats_B = by_row(*lax.stop_gradient((x_BTD, head_VD)), targets, weights)
  present_B = jnp.any(weights > 0, axis=1)
  loss, slope_B = choice_loss(
    nats_B, present_B, batch['right'], config.data.task_choices
  )
  # With the slopes of its rows known, the gradient is that of a sum of tokens.
  split = _over_batch(config, mesh, loss_lib.cross_entropy)
  total = split(x_BTD, head_VD, targets, weights * slope_B[:, None])
  return loss, loss + total - lax.stop_gradient(total), routers


def choice_loss(
  nats_B: jax.Array, present_B: jax.Array, right_B: jax.Array, choices: int
) -> tuple[jax.Array, jax.Array]:
  """The mean over documents of -log softmax over their choices.

  Args:
    nats_B: float32, -log p of a choice, the mean over its tokens. Row c D + d
      is choice c of document d, of D.
    present_B: whether there is such a choice.
    right_B: float32, 1 for the right one of each document, else 0.
    choices: rows of a document.

  Returns:
    The loss, and its gradient by `nats_B`.
  """
  nats, present, right = (
    a.reshape(choices, -1) for a in (nats_B, present_B, right_B)
  )
  log_p = jax.nn.log_softmax(jnp.where(present, -nats, -jnp.inf), axis=0)
  documents = nats.shape[1]
  loss = -jnp.sum(jnp.where(right > 0, log_p, 0)) / documents
  return loss, ((right - jnp.exp(log_p)) / documents).reshape(-1)


def _states(
  model: transformer.Transformer,
  params: Any,
  batch: Batch,
  mix: jax.Array | None,
) -> tuple[jax.Array, jax.Array, dict]:
  """Hidden states, the matrix of the head, and what the routers sowed."""
  rngs = None
  if 'rng' in batch:
    rngs = {'router': jax.random.wrap_key_data(batch['rng'][0])}
  (x_BTD, _), sown = model.apply(
    transformer.variables(model, params),
    batch['tokens'],
    mix=mix,
    rngs=rngs,
    mutable=['router'],
  )
  if model.read is not None:
    # A head is read after the blocks. One that is the embedding would be made
    # with it, and kept.
    params, x_BTD = lax.optimization_barrier((params, x_BTD))
  head_VD = model.apply(
    transformer.variables(model, params), method='output_embedding'
  )
  return x_BTD, head_VD, sown.get('router', {})


def _over_batch(
  config: ConfigDict,
  mesh: Mesh,
  loss: Callable[..., jax.Array],
  summed: bool = True,
) -> Callable[..., jax.Array]:
  """(x_BTD, head_VD, targets_BT, weights_BT) -> a loss of `qat.nn.loss`."""
  own = functools.partial(
    loss, chunk=config.model.loss_chunk, dtype=config.model.dot_dtype
  )
  batched = (True, False, True, True)
  return sharding.over_batch(mesh, own, batched, summed=summed)


def counted(batch: Batch) -> jax.Array | int:
  """What a mean over a batch divides by: its weights' sum, or its targets."""
  if 'weights' in batch:
    return jnp.sum(batch['weights'])
  return batch['targets'].size


def make(
  config: ConfigDict, model: transformer.Transformer, mesh: Mesh
) -> estimators.Objective:
  """What a step minimizes, in the form that the estimator takes.

  Args:
    config: a run's config.
    model: from `transformer.build`.
    mesh: the mesh it runs on.
  """
  if config.optim.estimator == 'forward':

    def textbook(params, batch, mix):
      del mix
      if 'weights' in batch:
        raise ValueError(
          "optim.estimator='forward' reads batches without weights; take 'spsa'"
          " or 'backprop'."
        )
      loss = reference.loss(params, batch, config.model, model.rules)
      return loss, (loss, {})

    return textbook
  if config.optim.estimator == 'spsa':
    model = transformer.reading(model, perturb.read)

  def objective(params, batch, mix):
    if 'right' in batch:
      loss, minimized, routers = of_choices(
        model, config, mesh, params, batch, mix
      )
    else:
      total, routers = loss_sum(model, config, mesh, params, batch, mix)
      loss = minimized = total / counted(batch)
    balance = sum(
      jnp.sum(value)  # Of one layer, or of all that are stacked.
      for keys, value in jax.tree_util.tree_leaves_with_path(routers)
      if keys[-2].key == 'balance'
    )
    return minimized + config.model.balance_coef * balance, (loss, routers)

  return objective
