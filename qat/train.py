"""A run, read from top to bottom: data, program, state, loop, report."""

import contextlib
import pathlib
import time
from typing import Any

import jax
from jax.experimental import multihost_utils
from ml_collections import ConfigDict
import numpy as np

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
      dataset = load.open_dataset(config)
      parts = task_run.open_parts(config, dataset)
      loader = enter(contextlib.closing(_open_loader(config, dataset, parts)))
      # Another model is read by this process alone, before there is a mesh.
      start = initial.find(config, workdir, dataset)
      launch.trim()
      mesh = sharding.make_mesh(config.mesh)
      enter(jax.set_mesh(mesh))
      with guard.time_limit('compiling', config.train.timeout_s):
        program = step_lib.compile_program(config, mesh, start.described)
      eval_step = evaluate.make_eval_step(config, program.model, mesh)
      evaluate_task = task_run.evaluator(program, parts)
      peak = flops.measured_peak() * mesh.size
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
    if restored is None:
      first, seconds_before = 0, 0.0
      state = program.init(initial.place(start, program.abstract))
      launch.trim()
    else:
      first, state = restored.step, restored.state
      loader.restore(restored.extra['data'])
      seconds_before = restored.extra['seconds']
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
    def hurry() -> bool:
      return jax.process_count() == 1 and interrupts.requested is not None

    def evaluate_all() -> dict[str, float]:
      found = evaluate.evaluate(
        eval_step, state.params, config, dataset, mesh, hurry
      )
      launch.trim()
      return found and found | evaluate_task(state.params, 'dev', hurry)

    if restored is None and start.words:
      log.say(start.words)
      if before := evaluate_all():
        log.scalars(0, before)
    described = {carried.EXTRA: start.described}
    meter = _Meter(program, peak, first)
    late = None
    evaluated = {}
    for step in range(first + 1, config.train.steps + 1):
      with guard.time_limit('the next batch', config.data.timeout_s):
        batch = evaluate.put(next(loader), mesh)
      done = step == config.train.steps
      look = done or step % config.train.health_every == 0
      if look:
        codes = sharding.in_turn(
          health.codes(state.params, program.model.rules)
        )
      state, measured = sharding.in_turn(program.train_step(state, batch))
      routers = measured.pop('router')
      if look:
        measured |= health.routers(routers)
        measured |= sharding.in_turn(
          health.measure(state.params, codes, program.model.rules)
        )
      if late:
        _settle(*late, state, program, log, meter)
      late = step, measured, batch

      stop = _stop_requested(interrupts, step, config.train.log_every)
      evaluates = done or step % config.eval.every == 0
      studies = _divides(config.sensitivity.every, step)
      saves = done or step % config.checkpoint.every == 0
      if not (stop or evaluates or studies or saves):
        continue
      _settle(*late, state, program, log, meter)
      late = None
      with meter.pause():
        if evaluates and not stop:
          evaluated = evaluate_all()
          if evaluated:
            log.scalars(step, evaluated)
        if studies and not stop:
          finish.study(
            program, state.params, dataset, workdir, log, step, hurry
          )
        stop = stop or _stop_requested(interrupts, step, config.train.log_every)
        if saves or stop:
          seconds = seconds_before + time.monotonic() - started
          checkpoints.save(
            step,
            state,
            {'data': loader.state(), 'seconds': seconds, **described},
          )
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
        tested = evaluate_task(state.params, 'test', hurry)
        log.scalars(config.train.steps, tested)
        evaluated |= tested
      seconds = seconds_before + time.monotonic() - started
      finish.finish(
        program, state.params, dataset, workdir, log, evaluated, seconds
      )
  return 0


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


def _divides(every: int, step: int) -> bool:
  return bool(every) and step % every == 0


def _stop_requested(
  interrupts: guard.Interrupts, step: int, every: int
) -> str | None:
  """The signal that asked for the end; all processes agree on it."""
  if jax.process_count() == 1:
    return interrupts.requested
  if step % every:
    return None
  mine = np.int32(interrupts.requested is not None)
  if multihost_utils.process_allgather(mine).any():
    return interrupts.requested or 'A signal to another process'
  return None


class _Meter:
  """Speed and time left, with pauses (evaluation, saving) left out."""

  def __init__(self, program: step_lib.Program, peak: float, first: int):
    c = program.config
    self.tokens_per_step = c.data.batch_size * c.data.seq_len
    self._flops_per_token = flops.train_flops_per_token(
      c, program.abstract.params
    )
    self._peak, self._total = peak, c.train.steps
    self._last, self._since = first, time.monotonic()

  @contextlib.contextmanager
  def pause(self):
    """Leaves the time of the body out."""
    begin = time.monotonic()
    yield
    self._since += time.monotonic() - begin

  def read(self, step: int) -> dict[str, float]:
    """The log's speeds since the last call, at `step`."""
    now = time.monotonic()
    seconds_per_step = (now - self._since) / max(1, step - self._last)
    self._last, self._since = step, now
    tokens_per_s = self.tokens_per_step / seconds_per_step
    flops_per_s = tokens_per_s * self._flops_per_token
    return {
      'train/tokens': step * self.tokens_per_step,
      'train/tokens_per_s': tokens_per_s,
      'train/eta_s': (self._total - step) * seconds_per_step,
      'train/flops_per_s': flops_per_s,
      'train/flops_share': flops_per_s / self._peak,
    }


def _settle(
  step: int,
  measured: dict[str, jax.Array],
  batch: step_lib.Batch,
  state: step_lib.State,
  program: step_lib.Program,
  log: metrics.Logger,
  meter: _Meter,
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
