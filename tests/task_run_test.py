"""Fine-tuning on a task: what is trained on, what is measured, a whole run."""

import json

import jax
import numpy as np
import pytest

from qat import flops
from qat import guard
from qat import metrics
from qat import scores
from qat import sharding
from qat import step as step_lib
from qat import task_run
from qat import tasks
from qat import train
from qat.data import dataset as dataset_lib
from qat.infer import load
from qat.nn import transformer
from tests import made_up_tasks
from tests import outcomes
from tests import tiny

STEPS, STOP = 6, 3
SIZES = {'data.task_train': 24, 'data.task_dev': 5, 'data.task_test': 10}


@pytest.fixture(autouse=True, scope='module')
def quickly():
  with tiny.compiled_quickly():
    yield


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A data set, and a task."""
  folder = tmp_path_factory.mktemp('task')
  tiny.dataset(folder)
  made_up_tasks.write(folder / 'words', 45)
  return folder


def make_config(folder, **changes):
  fields = {
    **tiny.EXACT,
    **SIZES,
    'model.vocab_size': 288,
    'data.dataset': str(folder / 'set'),
    'data.task': str(folder / 'words'),
    'data.seq_len': 24,
    'optim.warmup_steps': 1,
    'optim.peak_lr': 1e-2,
    'train.steps': STEPS,
    'train.log_every': 1,
    'eval.every': STOP,
    'eval.batches': 2,
    'checkpoint.every': STOP,
    'sensitivity.sequences': 1,
    'sample.tokens': 0,
  }
  return tiny.config('fp', {**fields, **changes})


def open_dataset(folder):
  return dataset_lib.open_dataset(folder / 'set')


def test_parts_are_those_of_the_config(folder):
  config = make_config(folder)
  dataset = open_dataset(folder)
  parts = task_run.open_parts(config, dataset)
  whole = tasks.read(folder / 'words')
  expected = tasks.split(whole, dict(train=24, dev=5, test=10), 0)
  for name, part in parts.items():
    assert part.task == expected[name]
    first, request = part.tokens[0], part.task.requests[0]
    assert first.ids[0] == dataset.eot_id
    text = dataset.tokenizer.decode(first.ids[1:])
    assert text == request.context + request.continuation
  # As the tokenizer begins a text: this one with nothing.
  bare = task_run.open_parts(
    make_config(folder, **{'data.begin': 'tokenizer'}), dataset
  )
  np.testing.assert_array_equal(
    bare['dev'].tokens[0].ids, parts['dev'].tokens[0].ids[1:]
  )
  assert task_run.open_parts(make_config(folder, **{'data.task': ''}), 0) == {}
  with pytest.raises(ValueError, match='45 documents, fewer than'):
    task_run.open_parts(make_config(folder, **{'data.task_dev': 900}), dataset)


def test_the_right_continuations_are_trained_on(folder):
  config = make_config(folder)
  dataset = open_dataset(folder)
  part = task_run.open_parts(config, dataset)['train']
  loader = task_run.open_loader(config, dataset, part)
  assert loader.fingerprint['dataset'] == dataset.digest
  expected = {
    document.requests[0].context: document.requests[document.label].continuation
    for document in part.task.documents
  }
  found = {}
  for batch in (next(loader) for _ in range(3)):  # An epoch.
    for tokens, targets, weights in zip(*batch.values(), strict=True):
      scored = targets[weights > 0]
      length = np.flatnonzero(weights)[-1] + 1
      context = tokens[1 : length + 1 - len(scored)]
      found[dataset.tokenizer.decode(context)] = dataset.tokenizer.decode(
        scored
      )
  assert found == expected


@pytest.mark.parametrize(
  ('estimator', 'micro_batches'),
  [
    pytest.param('backprop', 1, marks=pytest.mark.slow),
    ('backprop', 2),
    pytest.param('spsa', 1, marks=pytest.mark.slow),
    ('spsa', 4),
  ],
)
def test_a_step_means_over_weights(folder, estimator, micro_batches):
  """The loss of a batch with weights is that of its weighted targets."""
  fields = {'optim.estimator': estimator, 'optim.accumulate': micro_batches}
  if estimator == 'spsa':
    fields |= {'optim.optimizer': 'sgd', 'optim.clip_norm': 0.0}
    fields |= {'zo.eps': 1e-4}  # The mean to both sides is that of no move.
  config = make_config(folder, **fields)
  dataset = open_dataset(folder)
  part = task_run.open_parts(config, dataset)['train']
  batch = next(task_run.open_loader(config, dataset, part))
  model = transformer.build(config, 'cpu', 1)
  mesh = tiny.mesh(config)
  with jax.set_mesh(mesh):
    state = jax.jit(step_lib.initial_state(config, model))()
    step = jax.jit(step_lib.make_train_step(config, model, mesh))
    loss = float(step(state, batch)[1]['train/loss'])
  logits_of = jax.jit(
    lambda params, tokens: model.apply(
      {'params': params}, tokens, method='logits'
    )[0]
  )
  logits = np.asarray(logits_of(state.params, batch['tokens']), np.float64)
  log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  hit = np.take_along_axis(log_p, batch['targets'][..., None], -1)[..., 0]
  rows = [-hit[i][w > 0].mean() for i, w in enumerate(batch['weights'])]
  np.testing.assert_allclose(loss, np.mean(rows), rtol=3e-5)
  names = step_lib.abstract_batch(config, mesh).keys()
  assert names == batch.keys()
  windows = make_config(folder, **{'data.task': ''})
  assert 'weights' not in step_lib.abstract_batch(windows, mesh)


def test_devices_share_what_is_measured(folder):
  config = make_config(folder, **{'mesh.fsdp': 2})
  dataset = open_dataset(folder)
  part = task_run.open_parts(config, dataset)['test']
  found = []
  for devices in (8, 2):
    mesh = tiny.mesh(config, devices)
    model = transformer.build(config, 'cpu', devices)
    with jax.set_mesh(mesh):
      params = jax.jit(step_lib.initial_state(config, model))().params
    found.append(
      task_run.measure(
        scores.make_step(config, model),
        params,
        mesh,
        part,
        batch_tokens=100,
        longest=24,
        label='',
      )
    )
  assert found[0] == pytest.approx(found[1], rel=1e-5)
  assert found[0]['documents'] == 10
  # Of 288 tokens, without having learnt anything.
  assert found[0]['loss'] == pytest.approx(np.log(288), rel=0.1)


@pytest.fixture(scope='module')
def runs(folder, tmp_path_factory):
  """The same run uninterrupted, and stopped and started again."""
  config = make_config(folder)
  out = tmp_path_factory.mktemp('runs')
  original, made = step_lib.compile_program, []

  def once(*arguments, **options):
    made.append(made[0] if made else original(*arguments, **options))
    return made[0]

  def on_one_device(config, devices=None, make_mesh=sharding.make_mesh):
    del devices
    return make_mesh(config, jax.devices()[:1])

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(step_lib, 'compile_program', once)
    patch.setattr(flops, 'measured_peak', lambda: 1e12)
    patch.setattr(sharding, 'make_mesh', on_one_device)
    assert train.run(config, out / 'whole') == 0
    with pytest.MonkeyPatch.context() as stop:
      stop.setattr(
        train,
        '_stop_requested',
        lambda _, step: 'SIGTERM' if step == STOP + 1 else None,
      )
      stop.setattr(guard.Interrupts, 'exit_code', lambda _: 143)
      assert train.run(config, out / 'stopped') == 143
    assert train.run(config, out / 'stopped') == 0
  return out


def test_a_stopped_run_goes_on_bit_for_bit(runs):
  whole, stopped = (outcomes.outcome(runs / n) for n in ('whole', 'stopped'))
  assert whole == stopped


def test_a_run_logs_its_task(runs, folder):
  workdir = runs / 'whole'
  rows = [r for r in metrics.read(workdir) if 'task/dev/acc' in r]
  assert [row['step'] for row in rows] == [STOP, STEPS]
  for row in rows:
    assert row['task/dev/documents'] == 5
    assert row['task/dev/acc_stderr'] >= 0
    assert 0 < row['task/dev/loss'] < 20
  # It does learn: from 1/288 for each token to a few qualities.
  assert rows[-1]['task/dev/loss'] < rows[0]['task/dev/loss'] < np.log(288)
  summary = json.loads((workdir / 'summary.json').read_text())
  (last,) = [r for r in metrics.read(workdir) if 'task/test/acc' in r]
  for key in ('acc', 'acc_norm', 'acc_stderr', 'loss', 'documents'):
    assert summary[f'task/test/{key}'] == last[f'task/test/{key}']
  assert summary['task/dev/loss'] == rows[-1]['task/dev/loss']
  assert 'chart' in (page := (workdir / 'report.html').read_text())
  assert 'task accuracy' in page and 'On the dev documents' in page
  # What the loaded model says of the same documents.
  run = load.load_run(workdir)
  part = task_run.open_parts(run.config, run.dataset)['test']
  again = task_run.measure(
    scores.make_step(run.config, run.model),
    run.params,
    run.mesh,
    part,
    batch_tokens=64,
    longest=24,
    label='',
  )
  assert again['acc'] == summary['task/test/acc']
  assert again['loss'] == pytest.approx(summary['task/test/loss'], rel=1e-5)


def test_a_hurry_leaves_no_result(folder):
  config = make_config(folder)
  part = task_run.open_parts(config, open_dataset(folder))['dev']
  found = task_run.measure(
    None,
    None,
    tiny.mesh(config),
    part,
    batch_tokens=64,
    longest=24,
    label='',
    hurry=lambda: True,
  )
  assert found == {}
