"""The training state, and one optimizer step as a pure function."""

from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import jax
from jax import numpy as jnp
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from ml_collections import ConfigDict
import optax

from qat import carried
from qat import estimators
from qat import objective as objective_lib
from qat import optim
from qat import sharding
from qat.nn import transformer

Batch = objective_lib.Batch
Metrics = dict[str, jax.Array]


class State(NamedTuple):
  """All that a step changes.

  Attributes:
    step: int32, optimizer steps made.
    params: master weights: float32, or as `zo.master` says; matrices that were
      quantized after training stay as they are, codes of 2 and 4 bits packed.
    opt_state: of the optax chain; () where parameters are moved in place.
    rng: key data of the run, for steps that draw random numbers: the noise of
      a router, directions.
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
) -> Callable[..., State]:
  """A function that makes the state before the first step.

  It takes the parameters; None, and without them: fresh ones.
  """

  def init(params: Any = None) -> State:
    init_key, run_key = jax.random.split(jax.random.key(config.seed))
    tokens = jnp.zeros((1, 8), jnp.int32)
    if params is None:
      params = model.init(init_key, tokens)['params']
    params = estimators.stored(config, params)
    return State(
      jnp.zeros((), jnp.int32),
      params,
      estimators.optimizer_state(config, params),
      jax.random.key_data(run_key),
      jnp.ones((), bool),
    )

  return init


def abstract_state(
  init: Callable[..., State], mesh: Mesh, params: Any = None
) -> State:
  """Shapes, dtypes and shardings of the state; allocates nothing.

  `params` are the shapes of what `init` takes.
  """
  shapes = jax.eval_shape(init, params)
  shardings = sharding.state_shardings(mesh, shapes, shapes.params)
  return jax.tree.map(
    lambda leaf, where: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=where
    ),
    shapes,
    shardings,
  )


def abstract_batch(config: ConfigDict, mesh: Mesh) -> Batch:
  """Shapes of a training batch; see `objective.Batch`."""
  rows = (config.data.batch_size,)
  shape = (*rows, config.data.seq_len)
  made = {'tokens': (shape, jnp.int32), 'targets': (shape, jnp.int32)}
  if config.data.task:
    made['weights'] = (shape, jnp.float32)
    if config.data.task_choices > 1:
      made['right'] = (rows, jnp.float32)
  where = batch_sharding(mesh)
  return {
    name: jax.ShapeDtypeStruct(*one, sharding=where)
    for name, one in made.items()
  }


def make_train_step(
  config: ConfigDict, model: transformer.Transformer, mesh: Mesh
) -> Callable[[State, Batch], tuple[State, Metrics]]:
  """One optimizer step; to be jitted with the state donated.

  A step whose loss, gradient or slope is not finite leaves the state as it was,
  apart from `healthy`; so do all steps after it.

  Args:
    config: a run's config.
    model: from `transformer.build`.
    mesh: the mesh it runs on.

  Returns:
    A function (state, batch) -> (state, metrics). Metrics are float32 scalars
    named as the log names them, `healthy` and, with experts, 'router'.
  """
  in_place = estimators.in_place(config)
  quantization = optim.quantization(config.quant.anneal)
  objective = objective_lib.make(config, model, mesh)
  if in_place:
    move = estimators.moving(config, objective)
  else:
    gradient = estimators.gradient(config, objective)
    optimizer = optim.make(config.optim, config.train.steps)

  def by_gradient(trained, frozen, batch, mix, key, state):
    measured, grads = gradient(trained, frozen, batch, mix, key)
    numbers = [v for k, v in measured.items() if k != 'router']
    healthy = jnp.isfinite(jnp.stack(numbers)).all() & state.healthy
    updates, opt_state = optimizer.update(grads, state.opt_state, trained)
    changed = optax.apply_updates(trained, updates), opt_state
    kept = jax.tree.map(
      lambda new, old: jnp.where(healthy, new, old),
      changed,
      (trained, state.opt_state),
    )
    now = opt_state.hyperparams
    measured['train/lr'] = now['learning_rate']
    measured['train/weight_decay'] = now['weight_decay']
    return *kept, measured | {'healthy': healthy}

  def step(state: State, batch: Batch) -> tuple[State, Metrics]:
    mix = quantization(state.step) if quantization else None
    key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
    if config.model.router_jitter:
      # Of another key than directions are.
      noise = jax.random.fold_in(key, 2**32 - 1)
      keys = jax.random.split(noise, config.optim.accumulate)
      batch = {**batch, 'rng': jax.random.key_data(keys)}
    trained, frozen = estimators.split(config, state.params)
    if in_place:
      trained, metrics = move(
        trained, frozen, batch, mix, key, state.step, state.healthy
      )
      opt_state = state.opt_state
    else:
      trained, opt_state, metrics = by_gradient(
        trained, frozen, batch, mix, key, state
      )
    metrics['train/param_norm'] = optax.tree.norm(
      jax.tree.map(lambda w: w.astype(jnp.float32), trained)
    )
    if mix is not None:
      metrics['train/quantization'] = mix
    return State(
      state.step + metrics['healthy'],
      estimators.merge(trained, frozen),
      opt_state,
      state.rng,
      metrics['healthy'],
    ), metrics

  return step


class Program(NamedTuple):
  """A config made ready to run on a mesh; nothing in it holds parameters.

  Attributes:
    config: the config it was made from.
    mesh: the devices.
    model: the transformer.
    init: makes the state before the first step, of the parameters it is given,
      which it may take over, or of fresh ones.
    abstract: shapes, dtypes and shardings of the state.
    train_step: compiled (state, batch) -> (state, metrics); the state given is
      donated.
  """

  config: ConfigDict
  mesh: Mesh
  model: transformer.Transformer
  init: Callable[..., State]
  abstract: State
  train_step: Callable[[State, Batch], tuple[State, Metrics]]


def compile_program(
  config: ConfigDict,
  mesh: Mesh,
  described: carried.Description | None = None,
) -> Program:
  """Builds the model and compiles the train step, without any parameters.

  Args:
    config: a run's config.
    mesh: the mesh it runs on.
    described: the quantized matrices in the parameter tree, if there are any.
  """
  platform = mesh.devices.flat[0].platform
  model = transformer.build(config, platform, mesh.size)
  init = initial_state(config, model)
  with jax.set_mesh(mesh):
    shapes = transformer.abstract_params(model)
    abstract = abstract_state(
      init, mesh, carried.with_shapes(shapes, described or {})
    )
  shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
  train_step = jax.jit(
    make_train_step(config, model, mesh),
    donate_argnums=0,
    out_shardings=(shardings, None),
  )

  # What is given becomes the state, where it is stored as it comes.
  given = () if config.zo.master == 'bfloat16' else (0,)
  fill = jax.jit(init, out_shardings=shardings, donate_argnums=given)

  def initialize(params: Any = None) -> State:
    with jax.set_mesh(mesh):
      state = fill(params)
      return state._replace(params=estimators.snapped(config, state.params))

  with jax.set_mesh(mesh):
    batch = abstract_batch(config, mesh)
    compiled = train_step.lower(abstract, batch).compile()
  return Program(config, mesh, model, initialize, abstract, compiled)
