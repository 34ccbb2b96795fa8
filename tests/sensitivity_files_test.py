"""Tests of qat.sensitivity_files."""

import json

import jax
import numpy as np
import pytest

from qat import sensitivity
from qat import sensitivity_files
from tests import analyses

DAMAGED = '1.json or the .npz beside it'


def make(*paths):
  return analyses.make(paths, np.random.default_rng(0))


def tree(analysis):
  return {
    path: {kind: vars(stats) for kind, stats in kinds.items()}
    for path, kinds in analysis.items()
  }


@pytest.fixture
def saved(tmp_path):
  """The folder of an analysis of step 1."""
  sensitivity_files.save(tmp_path, 1, make('block_0/attn/q'))
  return tmp_path / 'sensitivity'


def test_what_is_saved_is_loaded(tmp_path):
  expert = 'block_0/ffn/narrow/up/3'
  analysis = make('block_0/attn/q', expert)
  sensitivity_files.save(tmp_path, 100, analysis)
  sensitivity_files.save(tmp_path, 20, {expert: analysis[expert]})
  assert sensitivity_files.steps(tmp_path) == [20, 100]
  assert {p.name for p in (tmp_path / 'sensitivity').iterdir()} == {
    '20.json', '20.npz', '100.json', '100.npz'
  }  # fmt: skip
  loaded = sensitivity_files.load(tmp_path, 100)
  jax.tree.map(np.testing.assert_array_equal, tree(loaded), tree(analysis))
  assert sensitivity_files.load(tmp_path, 20).keys() == {expert}


def test_no_analysis_has_no_steps(tmp_path):
  assert sensitivity_files.steps(tmp_path) == []
  with pytest.raises(
    FileNotFoundError, match=r'No sensitivity of step 3.*\[\]'
  ):
    sensitivity_files.load(tmp_path, 3)


@pytest.mark.parametrize('suffix', ['json', 'npz'])
def test_a_file_that_was_cut_short_is_named(saved, suffix):
  path = saved / f'1.{suffix}'
  whole = path.read_bytes()
  for size in range(0, len(whole), max(1, len(whole) // 40)):
    path.write_bytes(whole[:size])
    with pytest.raises(ValueError, match=DAMAGED):
      sensitivity_files.load(saved.parent, 1)


@pytest.mark.parametrize(
  ('key', 'value'),
  [
    ('gini', 10**400),
    ('mean', None),
    ('histogram', [1.0]),
    ('histogram', [10**400] * 48),
  ],
)
def test_numbers_that_are_none_are_damage(saved, key, value):
  path = saved / '1.json'
  content = json.loads(path.read_text())
  content['linears']['block_0/attn/q']['latent'][key] = value
  path.write_text(json.dumps(content))
  with pytest.raises(ValueError, match=DAMAGED):
    sensitivity_files.load(saved.parent, 1)


def test_maps_that_are_gone_are_damage(saved):
  (saved / '1.npz').unlink()
  with pytest.raises(ValueError, match=DAMAGED):
    sensitivity_files.load(saved.parent, 1)


def test_a_pickle_is_not_opened(saved, tmp_path):
  class Canary:
    def __reduce__(self):
      return (tmp_path.joinpath('canary').touch, ())

  np.savez(
    saved / '1.npz',
    **{
      f'{kind}/block_0/attn/q': np.array([Canary()], dtype=object)
      for kind in sensitivity.KINDS
    },
  )
  with pytest.raises(ValueError, match='damaged'):
    sensitivity_files.load(tmp_path, 1)
  assert not (tmp_path / 'canary').exists()
