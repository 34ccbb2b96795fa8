"""Tests of qat.sensitivity_study, on runs of three methods."""

import json
import pathlib

import numpy as np
import pytest

from qat import sensitivity
from qat import sensitivity_study
from qat.data import loader
from qat.data import prepare
from qat.nn import capture
from tests import studied
from tests import tiny

METHODS = ('fp', 'bitnet', 'pquant4')
DEFAULTS = dict(
  layer=None,
  dataset=None,
  sequences=None,
  seed=None,
  damping=None,
  show=lambda done, total, words: None,
)


@pytest.fixture(scope='module', autouse=True)
def quickly():
  with tiny.compiled_quickly():
    yield


@pytest.fixture(scope='module')
def dataset(tmp_path_factory):
  return tiny.dataset(tmp_path_factory.mktemp('data'))


@pytest.fixture(scope='module')
def saved(tmp_path_factory, dataset):
  """Method -> the folder of its run, its model and its parameters."""
  folder = tmp_path_factory.mktemp('runs')
  return {
    method: (folder / method, *studied.save(folder / method, method, dataset))
    for method in METHODS
  }


@pytest.fixture(scope='module')
def workdirs(saved):
  return [saved[method][0] for method in METHODS]


@pytest.fixture(scope='module')
def made(workdirs):
  """The study of all three, and what it showed of its progress."""
  shown = []
  study = sensitivity_study.study(
    workdirs, **DEFAULTS | {'show': lambda *args: shown.append(args)}
  )
  return study, shown


def batch(dataset, sequences=4, seed=1, seq_len=16):
  reader = loader.TrainLoader(
    dataset,
    seq_len=seq_len,
    batch_size=sequences,
    seed=seed,
    process_index=0,
    process_count=1,
    workers=0,
    threads=0,
  )
  return next(reader)['tokens']


@pytest.mark.parametrize('method', METHODS)
def test_a_run_is_analysed_on_the_common_batch(made, saved, dataset, method):
  _, model, params = saved[method]
  records = capture.linear_records(
    model, params, batch(dataset), full_precision=True
  )
  expected = sensitivity.analyse(records, 0.01, binarized=True)
  run = made[0].runs[METHODS.index(method)]
  assert (run.label, run.step) == (method, 3)
  assert list(run.analysis) == list(expected)
  for path, kinds in expected.items():
    assert run.analysis[path].keys() == kinds.keys()
    for kind, stats in kinds.items():
      got = run.analysis[path][kind]
      np.testing.assert_allclose(got.gini, stats.gini, rtol=1e-5)
      np.testing.assert_allclose(got.map_NK, stats.map_NK, atol=1e-2)


def test_full_precision_has_latent_weights_only(made):
  fp, bitnet, _ = made[0].runs
  assert len(fp.analysis) == len(bitnet.analysis) == 2 * 7
  for kinds in fp.analysis.values():
    assert kinds.keys() == {'latent', 'binarized'}
  for kinds in bitnet.analysis.values():
    assert kinds.keys() == {'latent', 'quantized', 'binarized'}


def test_the_last_blocks_down_projections_are_chosen(made):
  fp, bitnet, pquant = (run.chosen for run in made[0].runs)
  assert fp == bitnet == ('block_1/ffn/down',)
  assert set(pquant) == {
    'block_1/ffn/wide/down',
    *(f'block_1/ffn/narrow/down/{i}' for i in range(4)),
  }


def test_progress_counts_every_layer_of_every_run(made):
  study, shown = made
  total = sum(len(run.analysis) for run in study.runs)
  assert [done for done, _, _ in shown] == list(range(total + 1))
  assert {of for _, of, _ in shown} == {total}
  assert shown[0][2] == f'fp: {next(iter(study.runs[0].analysis))}'


def test_a_study_needs_calibration_sequences(saved):
  with pytest.raises(ValueError, match='0 calibration .* --sequences'):
    sensitivity_study.study([saved['fp'][0]], **DEFAULTS | {'sequences': 0})


def test_the_calibration_comes_from_the_first_run_or_the_arguments(
  made, saved, dataset
):
  study, _ = made
  assert study.calibration == sensitivity_study.Calibration(
    str(dataset), study.calibration.digest, 4, 16, 1, 0.01
  )
  given = dict(sequences=2, seed=7, damping=0.5, layer='block_0/attn/q')
  workdir, model, params = saved['bitnet']
  other = sensitivity_study.study([workdir], **DEFAULTS | given)
  assert other.runs[0].chosen == ('block_0/attn/q',)
  records = capture.linear_records(model, params, batch(dataset, 2, 7))
  expected = sensitivity.analyse(records, 0.5)
  for path, kinds in expected.items():
    got = other.runs[0].analysis[path]['quantized'].gini
    np.testing.assert_allclose(got, kinds['quantized'].gini, rtol=1e-5)
  before = study.runs[1].analysis['block_0/attn/q']['quantized'].gini
  assert abs(expected['block_0/attn/q']['quantized'].gini - before) > 1e-4


def test_json_has_every_number_and_no_map(made):
  study, _ = made
  content = json.loads(
    json.dumps(sensitivity_study.to_json(study), allow_nan=False)
  )
  assert content['calibration']['seq_len'] == 16
  assert len(content['edges']) == len(sensitivity.EDGES)
  for run, row in zip(study.runs, content['runs'], strict=True):
    assert row['linears'].keys() == run.analysis.keys()
    assert tuple(row['chosen']) == run.chosen
    for path, kinds in run.analysis.items():
      for kind, stats in kinds.items():
        numbers = row['linears'][path][kind]
        assert numbers.keys() == {'gini', 'top1', 'mean', 'histogram'}
        assert numbers['gini'] == stats.gini


@pytest.mark.parametrize(
  ('arguments', 'expected'),
  [
    ({'layer': 'block_7/ffn/down'}, 'fp is .block_7/ffn/down.*block_0/attn/k'),
    ({'layer': 'block_1/ffn/(wide/)?down|x('}, 'is no regex'),
    ({'layer': 'block_1/ffn/wide/down'}, 'No linear layer of .*fp'),
    ({'dataset': 'no/where'}, "No finished data set in 'no/where'"),
    ({'sequences': 10**6}, 'fewer than one batch'),
  ],
)
def test_what_cannot_be_studied_is_named_before_the_work(
  workdirs, monkeypatch, arguments, expected
):
  monkeypatch.setattr(sensitivity, 'analyse', None)
  with pytest.raises((ValueError, OSError), match=expected):
    sensitivity_study.study(workdirs[:1], **DEFAULTS | arguments)


def test_too_little_damping_names_the_run_and_the_way_out(workdirs):
  with pytest.raises(ValueError, match='bitnet: .*--damping'):
    # Four tokens for 32 inputs.
    sensitivity_study.study(
      workdirs[1:2], **DEFAULTS | {'damping': 0.0, 'sequences': 1}
    )


def test_a_run_that_is_given_twice_is_refused(workdirs):
  again = workdirs[0].parent / '.' / workdirs[0].name / '..' / 'fp'
  with pytest.raises(ValueError, match='twice'):
    sensitivity_study.study([workdirs[0], again], **DEFAULTS)


def other_text(folder: pathlib.Path, tokenizer: pathlib.Path) -> pathlib.Path:
  """Another data set with a tokenizer that there is."""
  source = folder / 'other.jsonl'
  source.write_text(
    ''.join(
      json.dumps({'text': f'{i} a calm sea ' * 9}) + '\n' for i in range(60)
    )
  )
  options = tiny.options(
    vocab_size=None, tokenizer=str(tokenizer), tokenizer_bytes=1
  )
  return prepare.prepare([str(source)], folder / 'other', options)


def test_runs_on_different_texts_compare_on_one_of_them(
  workdirs, dataset, tmp_path
):
  other = other_text(tmp_path, dataset / 'tokenizer.json')
  studied.save(tmp_path / 'fp', 'fp', other)
  both = [workdirs[0], tmp_path / 'fp']
  with pytest.raises(ValueError, match='different data sets.*--dataset='):
    sensitivity_study.study(both, **DEFAULTS)
  study = sensitivity_study.study(both, **DEFAULTS | {'dataset': str(dataset)})
  # The folders have one name, so their paths tell the runs apart.
  assert [run.label for run in study.runs] == list(map(str, both))
  first, second = (
    [kinds['latent'].gini for kinds in run.analysis.values()]
    for run in study.runs
  )
  # The same parameters, which read the same batch.
  np.testing.assert_allclose(first, second, rtol=1e-6)


def test_another_tokenizer_is_refused(workdirs, tmp_path):
  different = tiny.dataset(tmp_path, seed=5)
  studied.save(tmp_path / 'alien', 'fp', different)
  both = [workdirs[0], tmp_path / 'alien']
  with pytest.raises(ValueError, match='different tokenizers.*one tokenizer'):
    sensitivity_study.study(both, **DEFAULTS)
  with pytest.raises(ValueError, match='another tokenizer.*--tokenizer'):
    sensitivity_study.study(
      workdirs[:1], **DEFAULTS | {'dataset': str(different)}
    )


def test_the_shortest_sequences_are_read_by_all(workdirs, dataset, tmp_path):
  studied.save(tmp_path / 'short', 'bitnet', dataset, {'data.seq_len': 8})
  study = sensitivity_study.study([workdirs[0], tmp_path / 'short'], **DEFAULTS)
  assert study.calibration.seq_len == 8
