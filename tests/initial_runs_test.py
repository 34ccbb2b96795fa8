"""Whole runs that start from another model: killed, resumed, alone."""

import json
import shutil

import jax
import numpy as np
import pytest

from qat import carried
from qat import config as config_lib
from qat import flops
from qat import guard
from qat import metrics
from qat import sharding
from qat import step as step_lib
from qat import train
from qat.data import dataset as dataset_lib
from qat.infer import load
from qat.interop import folder
from qat.quant import composed
from scripts import evaluate as evaluate_script
from tests import clean
from tests import outcomes
from tests import starts
from tests import tiny

MESH = sharding.make_mesh


@pytest.fixture(scope='module', autouse=True)
def cheap_runs():
  """One device, one program for each config, and no measured peak."""
  programs = {}
  compile_program, make_mesh = step_lib.compile_program, sharding.make_mesh

  def compiled(config, mesh, described):
    key = config_lib.to_json(config), json.dumps(described)
    if key not in programs:
      programs[key] = compile_program(config, mesh, described)
    return programs[key]

  with pytest.MonkeyPatch.context() as patch, tiny.compiled_quickly():
    patch.setattr(step_lib, 'compile_program', compiled)
    patch.setattr(flops, 'measured_peak', lambda: 1e12)
    patch.setattr(
      sharding, 'make_mesh', lambda c, _=None: make_mesh(c, jax.devices()[:1])
    )
    yield


@pytest.fixture(scope='module')
def data(tmp_path_factory) -> dataset_lib.Dataset:
  path = tiny.dataset(tmp_path_factory.mktemp('data'))
  return dataset_lib.open_dataset(path)


@pytest.fixture(scope='module')
def source(tmp_path_factory, data):
  return starts.full(tmp_path_factory.mktemp('models') / 'full', data)


@pytest.fixture(scope='module')
def quantized(tmp_path_factory, data):
  return starts.quantized(tmp_path_factory.mktemp('models') / 'four', data)


@pytest.fixture(scope='module')
def complete(source, data, tmp_path_factory):
  """A run from the folder that was never interrupted."""
  workdir = tmp_path_factory.mktemp('runs') / 'complete'
  assert train.run(starts.get('fp', source, data), workdir) == 0
  return workdir


def test_a_run_goes_on_from_what_the_model_can(complete, source, data, capsys):
  rows = metrics.read(complete)
  options = [f'--model={source}', f'--dataset={data.path}', '--batches=2']
  assert evaluate_script.main([*options, '--json']) == 0
  expected = json.loads(capsys.readouterr().out)
  assert rows[0]['step'] == 0
  assert rows[0]['eval/loss'] == expected['eval/loss']
  losses = [row['eval/loss'] for row in rows if 'eval/loss' in row]
  assert len(losses) == 2 and losses[1] < losses[0]
  config = config_lib.load(complete)
  assert config.init.model == str(source)
  assert (config.model.d_model, config.model.n_layers) == (clean.WIDTH, 2)


def test_a_run_that_was_killed_needs_the_model_until_it_has_a_checkpoint(
  complete, source, data, tmp_path, monkeypatch
):
  # The path stands in the config, so the folder itself goes and comes back.
  hidden = tmp_path / 'hidden'
  config, workdir = starts.get('fp', source, data), tmp_path / 'run'

  def killed_at(stop):
    def check(_, step):
      if step == stop:
        raise RuntimeError('killed')

    with monkeypatch.context() as patch:
      patch.setattr(train, '_stop_requested', check)
      with pytest.raises(RuntimeError, match='killed'):
        train.run(config, workdir)

  killed_at(1)
  source.rename(hidden)
  try:
    with pytest.raises(config_lib.ConfigError, match='init.model'):
      train.run(config, workdir)
    hidden.rename(source)
    killed_at(3)
    source.rename(hidden)
    assert train.run(config, workdir) == 0
  finally:
    if hidden.exists():
      hidden.rename(source)
  assert outcomes.outcome(workdir) == outcomes.outcome(complete)


def test_a_resumed_run_may_not_start_from_another_model(
  complete, source, quantized, data
):
  for changed in (
    starts.get('fp', quantized, data),
    starts.get('fp', source, data, init__quant=True),
  ):
    with pytest.raises(config_lib.ConfigError, match=r'init\.') as caught:
      train.run(changed, complete)
    lines = [line for line in str(caught.value).splitlines() if '->' in line]
    assert len(lines) == 1


def test_a_run_from_another_run(complete, data):
  expected = load.load_run(complete)
  start = starts.find(starts.get('fp', complete, data), data)
  starts.same(start.params, jax.tree.map(np.asarray, expected.params))
  assert start.words.endswith(f'step {starts.STEPS}.') and not start.described


@pytest.mark.parametrize(
  ('fields', 'devices'),
  [
    ({'zo__master': 'bfloat16'}, 1),
    pytest.param({'model__scan_layers': True}, 1, marks=pytest.mark.slow),
    pytest.param(
      {'model__scan_layers': True, 'mesh__fsdp': 2}, 2, marks=pytest.mark.slow
    ),
  ],
  ids=['in bfloat16', 'stacked', 'on two devices'],
)
def test_a_run_carries_quantized_matrices(
  fields, devices, quantized, data, tmp_path, monkeypatch, capsys
):
  config = starts.get(
    'fp',
    quantized,
    data,
    optim__estimator='spsa',
    optim__optimizer='sgd',
    optim__clip_norm=0.0,
    zo__perturbed='.*norm/scale',
    **fields,
  )
  monkeypatch.setattr(
    sharding,
    'make_mesh',
    lambda c, chosen=None: MESH(c, (chosen or jax.devices())[:devices]),
  )
  with monkeypatch.context() as patch:
    patch.setattr(
      train,
      '_stop_requested',
      lambda _, step: 'TERM' if step == 3 else None,
    )
    patch.setattr(guard.Interrupts, 'exit_code', lambda _: 143)
    assert train.run(config, tmp_path) == 143
  moved = tmp_path / 'moved'
  shutil.move(quantized, moved)
  try:
    assert train.run(config, tmp_path) == 0
  finally:
    shutil.move(moved, quantized)
  capsys.readouterr()
  options = [f'--model={quantized}', f'--dataset={data.path}', '--batches=2']
  assert evaluate_script.main([*options, '--json', '--packed']) == 0
  expected = json.loads(capsys.readouterr().out)['eval/loss']
  first = metrics.read(tmp_path)[0]['eval/loss']
  exact = config.zo.master == 'float32'
  assert first == pytest.approx(expected, rel=1e-6 if exact else 1e-2)
  before = folder.flat(load.load_model(quantized, None).params)
  run = load.load_run(tmp_path)
  assert run.step == starts.STEPS
  for path, leaf in folder.flat(run.params).items():
    old = before[path]
    if composed.is_quantized(leaf):
      starts.same(leaf, old)
    else:
      if not path.endswith('scale'):
        old = old.astype(config.zo.master)
      assert leaf.dtype == np.float32
      assert np.array_equal(leaf, old) != path.endswith('norm/scale'), path
  summary = json.loads((tmp_path / 'summary.json').read_text())
  # Half of... attention is 4 of 7 matrices, of 4 bits and a scale.
  assert 4 * 4 / 7 + 16 * 3 / 7 < summary['bits_per_weight'] < 10
  blocks = ['blocks'] if config.model.scan_layers else ['block_0', 'block_1']
  saved = carried.saved(tmp_path / 'checkpoints')
  assert saved.keys() == {
    f'{block}/attn/{name}/kernel' for block in blocks for name in 'qkvo'
  }
  assert {made['codes']['bits'] for made in saved.values()} == {4}
