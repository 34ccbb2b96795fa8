"""What can be loaded of a run, and what is said when it cannot."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from qat import changes
from qat import config as config_lib
from qat import manifest
from qat.data import prepare
from qat.infer import generate
from qat.infer import load
from qat.interop import folder
from qat.quant import composed
from qat.quant import weights
from tests import tiny


def files(folder: pathlib.Path) -> dict[str, bytes]:
  return {
    str(path.relative_to(folder)): path.read_bytes()
    for path in folder.rglob('*')
    if path.is_file()
  }


def test_the_newest_checkpoint_is_loaded_onto_one_device(saved):
  before = files(saved.workdir)
  run = load.load_run(saved.workdir)
  assert run.step == 10
  assert jax.tree.structure(run.params) == jax.tree.structure(saved.params[10])
  for leaf, expected in zip(
    jax.tree.leaves(run.params), jax.tree.leaves(saved.params[10]), strict=True
  ):
    np.testing.assert_array_equal(leaf, expected)
    assert leaf.devices() == {jax.devices()[0]}
  assert run.mesh.size == 1
  # All but the mesh is the run's own.
  found = changes.changes(saved.config, run.config)
  assert {change.field for change in found} == {'mesh.data', 'mesh.fsdp'}
  assert run.config.is_locked
  assert str(run.dataset.path) == saved.config.data.dataset
  # It can be used.
  options = dict(temperature=1.0, top_k=0, top_p=1.0, seed=0, stop=-1)
  text = generate.generate(run.model, run.params, [0], tokens=2, **options)
  assert len(list(text)) == 2
  assert files(saved.workdir) == before


def test_a_run_may_be_named_relative_to_the_working_folder(saved, monkeypatch):
  monkeypatch.chdir(saved.workdir.parent)
  assert load.load_run(pathlib.Path(saved.workdir.name)).step == 10


def damage(step: pathlib.Path) -> None:
  file = step / manifest.FILE
  file.write_bytes(file.read_bytes()[:-9])


def test_a_damaged_checkpoint_is_passed_over_and_left(copied, capsys):
  damage(copied.workdir / 'checkpoints' / '10')
  before = files(copied.workdir)
  run = load.load_run(copied.workdir)
  assert run.step == 2
  np.testing.assert_array_equal(
    run.params['embed']['embedding'], copied.params[2]['embed']['embedding']
  )
  printed = capsys.readouterr()
  assert not printed.out
  assert 'Checkpoint 10 is damaged' in printed.err
  assert files(copied.workdir) == before


def test_only_damaged_checkpoints_are_an_error(copied):
  for step in ('2', '10'):
    damage(copied.workdir / 'checkpoints' / step)
  with pytest.raises(manifest.CorruptError, match=r'steps \[2, 10\]'):
    load.load_run(copied.workdir)


def test_a_folder_without_a_run(tmp_path):
  with pytest.raises(FileNotFoundError, match='holds no run.*--workdir'):
    load.load_run(tmp_path)


def test_a_run_without_a_checkpoint(copied):
  shutil.rmtree(copied.workdir / 'checkpoints')
  with pytest.raises(
    FileNotFoundError, match='no checkpoint yet.*config.checkpoint.every'
  ):
    load.load_run(copied.workdir)


def test_a_data_set_that_is_gone(copied):
  shutil.rmtree(copied.config.data.dataset)
  with pytest.raises(FileNotFoundError, match='No finished data set in'):
    load.load_run(copied.workdir)


def test_another_data_set_in_its_place(copied, tmp_path):
  place = pathlib.Path(copied.config.data.dataset)
  shutil.rmtree(place)
  (tmp_path / 'other').mkdir()
  tiny.dataset(tmp_path / 'other', seed=1).rename(place)
  with pytest.raises(ValueError, match='is not the data set that') as caught:
    load.load_run(copied.workdir)
  assert str(copied.workdir) in str(caught.value)


def test_a_config_of_another_model(copied):
  file = copied.workdir / 'config.json'
  config = json.loads(file.read_text())
  config['model']['d_ff'] = 64
  file.write_text(json.dumps(config))
  with pytest.raises(ValueError, match='block_0/ffn/up/kernel'):
    load.load_run(copied.workdir)


def test_the_embedded_corpus_is_prepared_where_the_config_says(monkeypatch):
  asked = []

  def ensure_embedded(*arguments):
    asked.append(arguments)
    raise LookupError

  monkeypatch.setattr(prepare, 'ensure_embedded', ensure_embedded)
  fields = {'data.cache_dir': 'some/where', 'model.vocab_size': 300}
  with pytest.raises(LookupError):
    load.open_dataset(tiny.config('fp', fields))
  assert asked == [('some/where', 300)]


def test_a_vocabulary_too_small_for_the_data(dataset):
  config = tiny.config('fp', {'data.dataset': str(dataset)})
  with pytest.raises(config_lib.ConfigError, match='model.vocab_size=64'):
    load.open_dataset(config)


# ---------------------------------------------------------------- load_model


@pytest.fixture(scope='module')
def loaded_run(saved):
  """To be changed by nobody."""
  return load.load_run(saved.workdir)


@pytest.fixture
def run(loaded_run):
  return loaded_run._replace(
    params=jax.tree.map(lambda p: p, loaded_run.params)
  )


def as_folder(run: load.Run, path: pathlib.Path) -> pathlib.Path:
  folder.save(
    path,
    run.config,
    folder.flat(run.params).items(),
    run.dataset.tokenizer,
    begin=3,
    end=run.dataset.eot_id,
    source={'name': 'x'},
  )
  return path


def test_a_workdir_is_a_model(saved, run):
  loaded = load.load_model(str(saved.workdir), None)
  assert loaded.config == run.config
  jax.tree.map(np.testing.assert_array_equal, loaded.params, run.params)
  assert loaded.begin == loaded.end == run.dataset.eot_id
  assert loaded.dataset.path == run.dataset.path
  assert loaded.source['step'] == 10


def test_a_model_folder_is_a_model(run, tmp_path):
  path = as_folder(run, tmp_path / 'model')
  loaded = load.load_model(path, None)
  assert loaded.config == run.config
  assert loaded.mesh == run.mesh
  for a, b in zip(
    jax.tree.leaves(loaded.params), jax.tree.leaves(run.params), strict=True
  ):
    np.testing.assert_array_equal(a, b)
    assert a.devices() == {jax.devices()[0]}
  assert jax.tree.structure(loaded.params) == jax.tree.structure(run.params)
  assert (loaded.begin, loaded.end) == (3, run.dataset.eot_id)
  assert loaded.source == {'name': 'x'}
  assert loaded.dataset is None
  options = dict(temperature=0.0, top_k=0, top_p=1.0, seed=0, stop=-1)
  texts = [
    list(generate.generate(m.model, m.params, [5], tokens=3, **options))
    for m in (run, loaded)
  ]
  assert texts[0] == texts[1]


def test_a_quantized_matrix_stays_one(run, tmp_path):
  linear = run.params['block_0']['ffn']['up']
  linear['kernel'] = weights.QUANTIZERS['int4'](linear['kernel'], 'channel', 0)
  loaded = load.load_model(as_folder(run, tmp_path / 'model'), None)
  found = loaded.params['block_0']['ffn']['up']['kernel']
  assert composed.is_quantized(found)
  jax.tree.map(np.testing.assert_array_equal, found, linear['kernel'])


def test_a_folder_that_holds_another_model(run, tmp_path):
  del run.params['block_0']['ffn']['up']
  run.params['final_norm']['scale'] = run.params['final_norm']['scale'][1:]
  run.params['more'] = run.params['final_norm']['scale']
  path = as_folder(run, tmp_path / 'model')
  with pytest.raises(ValueError, match='does not hold the model') as caught:
    load.load_model(path, None)
  message = str(caught.value)
  assert 'block_0/ffn/up/kernel: missing' in message
  assert 'final_norm/scale: [31] there, (32,) here' in message
  assert 'more: [31] there, nothing here' in message


def test_a_mistyped_name(tmp_path):
  with pytest.raises(FileNotFoundError, match='runs/fp holds no run'):
    load.load_model('runs/fp', None)


def test_another_programs_model_without_a_base(tmp_path):
  (tmp_path / 'config.json').write_text('{"model_type": "llama"}')
  with pytest.raises(ValueError, match='scripts/import_model.py'):
    load.load_model(tmp_path, None)
