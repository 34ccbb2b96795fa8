"""A run, read from top to bottom: data, program, state, loop, report."""

from collections.abc import Iterator
import contextlib
import pathlib
import time
from typing import Any

import jax
from ml_collections import ConfigDict

from qat import carried
from qat import changes
from qat import checkpoint
from qat import config as config_lib
from qat import evaluate
from qat import finish
from qat import flops
from qat import guard
from qat import health
from qat import initial
from qat import launch
from qat import lock
from qat import metrics
from qat import objective as objective_lib
from qat import sharding
from qat import step as step_lib
from qat import task_run
from qat.data import dataset as dataset_lib
from qat.data import loader as loader_lib
from qat.data import task_loader
from qat.infer import load
from qat.nn import transformer

# The key of a checkpoint's `extra` for what a signal kept from being measured.
_OWED = 'owed'


class NonFiniteError(RuntimeError):
  """A loss or a gradient was not finite; the message names the place."""


def run(config: ConfigDict, workdir: pathlib.Path) -> int:
  """Trains, from where `workdir` stands to `config.train.steps`.

  Args:
    config: a locked config.
    workdir: folder of the run; made if it is not there.

  Returns:
    The exit code: 0 when complete, 143 or 130 after a signal.

  Raises:
    ConfigError: an impossible config, or another than the run's own.
    LockedError: another process writes to `workdir`.
    NonFiniteError: the last good checkpoint is kept.
  """
  primary = jax.process_index() == 0
  started = time.monotonic()
  config = initial.resolve(config, workdir)
  config_lib.check(
    config, devices=jax.device_count(), processes=jax.process_count()
  )
  if (workdir / 'config.json').exists():
    old = config_lib.load(workdir)
    changes.refuse_changes(old, config, str(workdir))
  workdir.mkdir(parents=True, exist_ok=True)
  with contextlib.ExitStack() as stack:
    enter = stack.enter_context
    if primary:
      enter(lock.hold(workdir))
    interrupts = enter(guard.Interrupts())

    # 1. What needs no state, and loses nothing when it is interrupted.
    with interrupts.nothing_to_lose():
      with _mended_by_the_user():
        dataset = load.open_dataset(config)
        parts = task_run.open_parts(config, dataset)
        loader = enter(contextlib.closing(_open_loader(config, dataset, parts)))
      # Another model is read by this process alone, before there is a mesh.
      start = initial.find(config, workdir, dataset)
      finish.check(config, dataset)
      launch.trim()
      mesh = sharding.make_mesh(config.mesh)
      peak = flops.measured_peak() * mesh.size
      enter(jax.set_mesh(mesh))
      with guard.time_limit('compiling', config.train.timeout_s):
        program = step_lib.compile_program(config, mesh, start.described)
      eval_step = evaluate.make_eval_step(config, program.model, mesh)
      evaluate_task = task_run.evaluator(program, parts)
    if primary:
      with metrics.replacing(workdir / 'config.json') as file:
        file.write(config_lib.to_json(config).encode())

    # 2. Where the state comes from; the first that applies:
    #    the newest good checkpoint of this workdir, the parameters of
    #    config.init.model, or fresh ones.
    checkpoints = enter(
      checkpoint.Checkpointer(
        workdir / 'checkpoints',
        keep_last=config.checkpoint.keep_last,
        keep_every=config.checkpoint.keep_every,
        timeout_s=config.checkpoint.timeout_s,
      )
    )
    restored = checkpoints.restore(program.abstract)
    due = set()  # What is to be measured of the parameters as they are.
    if restored is None:
      first, seconds_before = 0, 0.0
      if start.words:
        due.add('evaluation')
      state = program.init(initial.place(start, program.abstract))
      launch.trim()
    else:
      first, state = restored.step, restored.state
      _refuse_shorter(config, workdir, first)
      loader.restore(restored.extra['data'])
      seconds_before = restored.extra['seconds']
      due.update(restored.extra.get(_OWED, ()))
    log = enter(
      metrics.Logger(
        workdir,
        total_steps=config.train.steps,
        first_step=first,
        primary=primary,
      )
    )
    log.say(finish.introduction(program, state.params, peak))
    if first:
      log.say(f'Going on from step {first} in {workdir}.')

    # 3. The loop. What a step measured is read while the next one runs, so
    #    that the device never waits; before anything looks at the state, the
    #    newest measurements are read too, so that no state is saved or
    #    evaluated that came out of a step gone wrong.
    signals = guard.Agreement(interrupts, mesh)
    evaluated = {}

    def evaluate_all() -> dict[str, float]:
      found = evaluate.evaluate(
        eval_step, state.params, config, dataset, mesh, signals.heard
      )
      launch.trim()
      return found and found | evaluate_task(state.params, 'dev', signals.heard)

    def look(step: int, due: set[str]) -> set[str]:
      """Measures what is due; returns what is owed, after a signal."""
      nonlocal evaluated
      owed = set(due)
      if 'evaluation' in owed and (evaluated := evaluate_all()):
        log.scalars(step, evaluated)
        owed.remove('evaluation')
      if 'study' in owed and finish.study(
        program, state.params, dataset, workdir, log, step, signals.heard
      ):
        owed.remove('study')
      return owed

    if restored is None and start.words:
      log.say(start.words)
    if look(first, due):
      log.say(f'{signals.heard()}: still at step {first}.')
      return interrupts.exit_code()
    described = {carried.EXTRA: start.described}
    meter = flops.Meter(config, program.abstract.params, peak, first)
    late = None
    for step in range(first + 1, config.train.steps + 1):
      with guard.time_limit('the next batch', config.data.timeout_s):
        batch = evaluate.put(next(loader), mesh)
      done = step == config.train.steps
      inspected = done or step % config.train.health_every == 0
      if inspected:
        codes = sharding.in_turn(
          health.codes(state.params, program.model.rules)
        )
      state, measured = sharding.in_turn(program.train_step(state, batch))
      routers = measured.pop('router')
      if inspected:
        measured |= health.routers(routers)
        measured |= sharding.in_turn(
          health.measure(state.params, codes, program.model.rules)
        )
      if late:
        _settle(*late, state, program, log, meter)
      late = step, measured, batch

      stop = _stop_requested(signals, step)
      due = set()
      if done or step % config.eval.every == 0:
        due.add('evaluation')
      if config.sensitivity.every and step % config.sensitivity.every == 0:
        due.add('study')
      saves = done or step % config.checkpoint.every == 0
      if not (stop or due or saves):
        continue
      _settle(*late, state, program, log, meter)
      late = None
      with meter.pause():
        owed = due if stop else look(step, due)
        stop = stop or _stop_requested(signals, step)
        if saves or stop:
          extra = {
            'data': loader.state(),
            'seconds': seconds_before + time.monotonic() - started,
            _OWED: sorted(owed),
          }
          checkpoints.save(step, state, extra | described)
        checkpoints.poll()
      if stop:
        checkpoints.wait()
        log.say(f'{stop}: step {step} is saved; the same command goes on.')
        return interrupts.exit_code()
    checkpoints.wait()

    # 4. What a finished run leaves.
    with interrupts.nothing_to_lose():
      if not evaluated:  # It was complete when it was started again.
        evaluated = evaluate_all()
      if parts:
        tested = evaluate_task(state.params, 'test', signals.heard)
        log.scalars(config.train.steps, tested)
        evaluated |= tested
      seconds = seconds_before + time.monotonic() - started
      finish.finish(
        program, state.params, dataset, workdir, log, evaluated, seconds
      )
  return 0


@contextlib.contextmanager
def _mended_by_the_user() -> Iterator[None]:
  """Makes a ConfigError of what data raise that are damaged or do not fit."""
  try:
    yield
  except config_lib.ConfigError:
    raise
  except ValueError as error:
    raise config_lib.ConfigError(str(error)) from error


def _open_loader(
  config: ConfigDict,
  dataset: dataset_lib.Dataset,
  parts: dict[str, task_run.Part],
) -> loader_lib.TrainLoader | task_loader.TaskLoader:
  if parts:
    return task_run.open_loader(config, dataset, parts['train'])
  return loader_lib.TrainLoader(
    dataset.path,
    seq_len=config.data.seq_len,
    batch_size=config.data.batch_size,
    seed=config.seed,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
    workers=config.data.workers,
    threads=config.data.threads,
  )


def _refuse_shorter(config: ConfigDict, workdir: pathlib.Path, at: int) -> None:
  if at > config.train.steps:
    raise config_lib.ConfigError(
      f'config.train.steps={config.train.steps}, but {workdir} stands at step'
      f' {at}: its parameters are not those of the earlier step. Give at least'
      f' {at}, or take another workdir.'
    )


def _stop_requested(signals: guard.Agreement, step: int) -> str | None:
  """The signal that asked for the end, after a step."""
  del step  # Of those who stop a run at one.
  return signals.heard()


def _settle(
  step: int,
  measured: dict[str, jax.Array],
  batch: step_lib.Batch,
  state: step_lib.State,
  program: step_lib.Program,
  log: metrics.Logger,
  meter: flops.Meter,
) -> None:
  """Waits for a step's measurements; logs them where that is due."""
  config = program.config
  with guard.time_limit(f'step {step}', config.train.timeout_s):
    healthy = bool(measured['healthy'])
  if not healthy:
    backprop = config.optim.estimator == 'backprop'
    key, name, lower = (
      ('grad_norm', 'gradient norm', 'config.optim.clip_norm')
      if backprop
      else ('slope', 'slope', 'config.zo.eps')
    )
    raise NonFiniteError(
      f'Step {step}: loss {float(measured["train/loss"])}, {name}'
      f' {float(measured[f"train/{key}"])}.'
      f' {_diagnose(program, state.params, batch)} The parameters are those'
      f' before step {step}; the checkpoints are untouched. Lower'
      f' config.optim.peak_lr, or lower {lower}, and go on in a new workdir.'
    )
  values = {k: v for k, v in measured.items() if k != 'healthy'}
  if step % config.train.log_every and step != config.train.steps:
    values = {k: v for k, v in values.items() if k.startswith('health/')}
    if values:
      log.scalars(step, jax.device_get(values))
    return
  values = jax.device_get(values) | meter.read(step)
  log.scalars(step, values)
  log.progress(
    step,
    loss=values['train/loss'],
    tokens_per_s=values['train/tokens_per_s'],
    eta_s=values['train/eta_s'],
  )


def _diagnose(
  program: step_lib.Program, params: Any, batch: step_lib.Batch
) -> str:
  """Runs a step's passes again, and names a culprit."""
  model, params = transformer.unscanned(program.model, params)

  def forward(params, batch):
    return model.apply(
      {'params': params}, batch['tokens'], capture_intermediates=True
    )[1]['intermediates']

  def gradient(params, batch):
    if program.config.optim.estimator != 'backprop':
      return {}  # There was none, and may be no room for one.

    def loss(params):
      return objective_lib.loss_sum(
        model, program.config, program.mesh, params, batch
      )[0]

    return jax.grad(loss)(params)

  return health.first_non_finite(forward, gradient, params, batch)
