"""The page of a study, and the command that makes it."""

import json
import math

import numpy as np
import pytest

from qat import zo_curves
from qat import zo_study
from qat import zo_study_page
from qat.data import dataset as dataset_lib
from qat.infer import load
from qat.nn import transformer
from scripts import zo_study as script
from tests import tiny
from tests import zo_curves_test

EVIL = '<script>alert(1)</script>'


def made():
  rng = np.random.default_rng(0)
  through = rng.normal(size=8)
  slopes = {1e-3: through + 0.1, 1e-2: 0.5 * through}
  return zo_study.Study(
    parameters=1_234_567,
    loss=3.21,
    gradient_norm=2.0,
    straight_through=through,
    slopes=slopes,
    agreements={e: zo_study.agreement(s, through) for e, s in slopes.items()},
    cosines=[
      zo_study.Cosines(1, 1e-3, 2e-4, 8, 9e-4),
      zo_study.Cosines(8, -3e-3, math.nan, 1, 2.5e-3),
    ],
  )


@pytest.fixture
def workdirs(tmp_path):
  write = zo_curves_test.write
  return [
    write(tmp_path / 'zo', steps=8, speed=200.0, evaluated=(0, 4, 8)),
    write(tmp_path / 'ste', steps=8, speed=50.0, evaluated=(0, 4, 8)),
  ]


def test_a_page_has_the_numbers_and_no_markup_of_others(workdirs):
  curves = [zo_curves.read(workdir) for workdir in workdirs]
  page = zo_study_page.page({EVIL: made()}, curves)
  assert EVIL not in page
  for part in ('1.23M', '3.2100', '1.000 ± 0.000', '-3.00e-03', '3.2000'):
    assert part in page, part
  charts = ('Slopes at eps 0.001', 'Slopes at eps 0.01', 'Cosine of estimate')
  for title in (*charts, 'At equal steps', 'At equal time'):
    assert title in page


def test_a_page_has_only_what_was_asked_for(workdirs):
  alone = zo_study_page.page({}, [zo_curves.read(workdirs[0])])
  assert 'At equal steps' in alone and 'Slopes' not in alone
  models = zo_study_page.page({'m': made()}, [])
  assert 'Slopes at eps' in models and 'At equal time' not in models


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  """A tiny model in the place of what `load.load_model` loads; its data."""
  folder = tmp_path_factory.mktemp('data')
  config = tiny.config('fp', {**tiny.EXACT, 'model.vocab_size': 288})
  return tiny.dataset(folder), config


def test_the_command_measures_models_and_runs(
  saved, workdirs, tmp_path, capsys, monkeypatch
):
  dataset, config = saved
  monkeypatch.setenv('COLUMNS', '200')
  monkeypatch.setattr(
    load, 'load_model', lambda name, _: fresh(config, dataset)
  )
  out, numbers = tmp_path / 'zo.html', tmp_path / 'zo.json'
  arguments = ['--out', out, '--json', numbers, '--dataset', dataset]
  arguments += ['--models', 'models/m', '--runs', *workdirs]
  arguments += ['--eps', 1e-2, '--directions', 4, '--groups', 1, 4]
  arguments += ['--sequences', 2, '--length', 12, '--perturbed', '.*kernel']
  with tiny.compiled_quickly():
    assert script.main([*map(str, arguments)]) == 0
  content = json.loads(numbers.read_text())
  study = content['models']['models/m']
  assert len(study['slopes']['0.01']) == len(study['straight_through']) == 4
  assert [c['estimates'] for c in study['cosines']] == [4, 1]
  assert study['cosines'][1]['spread'] is None
  assert [row['name'] for row in content['runs']] == ['zo', 'ste']
  assert content['options']['length'] == 12
  shown = capsys.readouterr().out
  assert 'equal time' in shown and 'models/m, 4 direction(s)' in shown
  assert 'models/m' in out.read_text()


def fresh(config, dataset_path):
  dataset = dataset_lib.open_dataset(dataset_path)
  model = transformer.build(config, 'cpu', 1)
  return load.Loaded(
    config,
    tiny.mesh(config),
    model,
    tiny.params(model),
    dataset.tokenizer,
    dataset.eot_id,
    dataset.eot_id,
    dataset,
    {'format': 'run'},
  )


@pytest.mark.parametrize(
  ('arguments', 'expected'),
  [
    ([], 'give --models, --runs'),
    (['--models', 'x'], '--models needs --dataset'),
    (['--runs', 'x', '--groups', '99'], r'groups [99] of 64'),
    (['--runs', 'no/run'], 'No metrics.jsonl'),
    (['--runs', 'x', '--json', 'no/where.json'], 'there is no folder no'),
  ],
)
def test_wrong_arguments_are_told(arguments, expected, tmp_path, capsys):
  out = tmp_path / 'zo.html'
  assert script.main(['--out', str(out), *arguments]) == 2
  assert expected in capsys.readouterr().err
  assert not out.exists()
