"""The training state, and one optimizer step as a pure function."""

from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import jax
from jax import lax
from jax import numpy as jnp
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from ml_collections import ConfigDict
import optax

from qat import optim
from qat import sharding
from qat.nn import loss as loss_lib
from qat.nn import transformer

# tokens, targets: int32 [B, T]; maybe weights, and rng: key data for each
# micro-batch, of a step that draws random numbers.
Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


class State(NamedTuple):
  """All that a step changes.

  Attributes:
    step: int32, optimizer steps made.
    params: float32 master weights.
    opt_state: of the optax chain.
    rng: key data of the run, for steps that draw random numbers: the noise of
      a router.
    healthy: bool; False from the first loss or gradient that is not finite,
      and from then on no step changes anything.
  """

  step: jax.Array
  params: Any
  opt_state: Any
  rng: jax.Array
  healthy: jax.Array


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """How `[B, T]` arrays lie on the mesh."""
  return NamedSharding(mesh, sharding.BATCH)


def initial_state(
  config: ConfigDict, model: transformer.Transformer
) -> Callable[[], State]:
  """A function that makes the state before the first step."""
  optimizer = optim.make(config.optim, config.train.steps)

  def init() -> State:
    init_key, run_key = jax.random.split(jax.random.key(config.seed))
    tokens = jnp.zeros((1, 8), jnp.int32)
    params = model.init(init_key, tokens)['params']
    return State(
      jnp.zeros((), jnp.int32),
      params,
      optimizer.init(params),
      jax.random.key_data(run_key),
      jnp.ones((), bool),
    )

  return init


def abstract_state(init: Callable[[], State], mesh: Mesh) -> State:
  """Shapes, dtypes and shardings of the state; allocates nothing."""
  shapes = jax.eval_shape(init)
  shardings = sharding.state_shardings(mesh, shapes, shapes.params)
  return jax.tree.map(
    lambda leaf, where: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=where
    ),
    shapes,
    shardings,
  )


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
  rngs = None
  if 'rng' in batch:
    rngs = {'router': jax.random.wrap_key_data(batch['rng'][0])}
  (x_BTD, _), sown = model.apply(
    {'params': params},
    batch['tokens'],
    mix=mix,
    rngs=rngs,
    mutable=['router'],
  )
  head_VD = model.apply({'params': params}, method='output_embedding')
  weights = batch.get('weights')
  if weights is None:
    weights = jnp.ones(batch['targets'].shape, jnp.float32)

  def cross_entropy(x_BTD, head_VD, targets_BT, weights_BT):
    return loss_lib.cross_entropy(
      x_BTD,
      head_VD,
      targets_BT,
      weights_BT,
      chunk=config.model.loss_chunk,
      dtype=config.model.dot_dtype,
    )

  split = sharding.over_batch(mesh, cross_entropy, (True, False, True, True))
  total = split(x_BTD, head_VD, batch['targets'], weights)
  return total, sown.get('router', {})


def make_train_step(
  config: ConfigDict, model: transformer.Transformer, mesh: Mesh
) -> Callable[[State, Batch], tuple[State, Metrics]]:
  """One optimizer step; to be jitted with the state donated.

  A step whose loss or gradient is not finite leaves the state as it was, apart
  from `healthy`; so do all steps after it.

  Args:
    config: a run's config.
    model: from `transformer.build`.
    mesh: the mesh it runs on.

  Returns:
    A function (state, batch) -> (state, metrics). Metrics are float32 scalars
    named as the log names them, `healthy` and, with experts, 'router'.
  """
  optimizer = optim.make(config.optim, config.train.steps)
  micro_batches = config.optim.accumulate
  quantization = optim.quantization(config.quant.anneal)

  def objective(params, batch, mix):
    total, routers = loss_sum(model, config, mesh, params, batch, mix)
    loss = total / batch['targets'].size
    balance = sum(
      jnp.sum(value)  # Of one layer, or of all that are stacked.
      for keys, value in jax.tree_util.tree_leaves_with_path(routers)
      if keys[-2].key == 'balance'
    )
    return loss + config.model.balance_coef * balance, (loss, routers)

  def gradient(params, batch, mix):
    (_, aux), grads = jax.value_and_grad(objective, has_aux=True)(
      params, batch, mix
    )
    return aux, grads

  def accumulated(params, batch, mix):
    if micro_batches == 1:
      return gradient(params, batch, mix)
    parts = jax.tree.map(lambda a: _micro_batches(a, micro_batches), batch)
    shapes = jax.eval_shape(
      gradient, params, jax.tree.map(lambda a: a[0], parts), mix
    )
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def add(total, part):
      part = gradient(params, part, mix)
      return jax.tree.map(lambda a, b: a + b / micro_batches, total, part), None

    return lax.scan(add, zeros, parts)[0]

  def step(state: State, batch: Batch) -> tuple[State, Metrics]:
    mix = quantization(state.step) if quantization else None
    if config.model.router_jitter:
      key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
      keys = jax.random.split(key, micro_batches)
      batch = {**batch, 'rng': jax.random.key_data(keys)}
    (loss, routers), grads = accumulated(state.params, batch, mix)
    grad_norm = optax.tree.norm(grads)
    healthy = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & state.healthy
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    changed = State(state.step + 1, params, opt_state, state.rng, healthy)
    new_state = jax.tree.map(
      lambda new, old: jnp.where(healthy, new, old), changed, state
    )._replace(healthy=healthy)
    metrics = {
      'train/loss': loss,
      'train/grad_norm': grad_norm,
      'train/param_norm': optax.tree.norm(new_state.params),
      'train/lr': opt_state.hyperparams['learning_rate'],
      'train/weight_decay': opt_state.hyperparams['weight_decay'],
      'healthy': healthy,
      'router': routers,
    }
    if mix is not None:
      metrics['train/quantization'] = mix
    return new_state, metrics

  return step


def _micro_batches(a_BT: jax.Array, n: int) -> jax.Array:
  """`[B, ...]` -> `[n, B / n, ...]`, each part spread over all devices."""
  return a_BT.reshape(a_BT.shape[0] // n, n, *a_BT.shape[1:]).swapaxes(0, 1)


class Program(NamedTuple):
  """A config made ready to run on a mesh; nothing in it holds parameters.

  Attributes:
    config: the config it was made from.
    mesh: the devices.
    model: the transformer.
    init: makes the state before the first step.
    abstract: shapes, dtypes and shardings of the state.
    train_step: compiled (state, batch) -> (state, metrics); the state given is
      donated.
  """

  config: ConfigDict
  mesh: Mesh
  model: transformer.Transformer
  init: Callable[[], State]
  abstract: State
  train_step: Callable[[State, Batch], tuple[State, Metrics]]


def compile_program(config: ConfigDict, mesh: Mesh) -> Program:
  """Builds the model and compiles the train step, without any parameters."""
  platform = mesh.devices.flat[0].platform
  model = transformer.build(config, platform, mesh.size)
  init = initial_state(config, model)
  with jax.set_mesh(mesh):
    abstract = abstract_state(init, mesh)
  shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
  rows = jax.ShapeDtypeStruct(
    (config.data.batch_size, config.data.seq_len),
    jnp.int32,
    sharding=batch_sharding(mesh),
  )
  train_step = jax.jit(
    make_train_step(config, model, mesh),
    donate_argnums=0,
    out_shardings=(shardings, None),
  )

  def initialize() -> State:
    with jax.set_mesh(mesh):
      return jax.jit(init, out_shardings=shardings)()

  with jax.set_mesh(mesh):
    compiled = train_step.lower(
      abstract, {'tokens': rows, 'targets': rows}
    ).compile()
  return Program(config, mesh, model, initialize, abstract, compiled)
