"""What can be loaded of a run, and what is said when it cannot."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from qat import config as config_lib
from qat import manifest
from qat.data import prepare
from qat.infer import generate
from qat.infer import load
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
  changes = config_lib.changes(saved.config, run.config)
  assert {change.field for change in changes} == {'mesh.data', 'mesh.fsdp'}
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
