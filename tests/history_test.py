"""Tests of qat.history."""

import dataclasses
import json
import math

import numpy as np
import pytest

from qat import history
from tests import runs


def test_every_file_of_a_run_is_read(tmp_path):
  run = history.load(runs.write(tmp_path, steps=40, blocks=1))
  assert run.config == runs.CONFIG
  assert run.summary == runs.SUMMARY
  assert run.samples == runs.SAMPLES
  assert run.sensitivity.keys() == {f'block_0/{n}' for n in runs.LINEARS}
  steps, values = run.series['train/lr']
  np.testing.assert_array_equal(steps, np.arange(1, 41))
  assert values[-1] == 0 and values.dtype == float
  np.testing.assert_array_equal(run.series['eval/loss'][0], np.arange(2, 41, 2))
  assert history.final_numbers(run) == runs.SUMMARY


def test_a_run_under_way_has_its_latest_numbers(tmp_path):
  rows = [
    {'step': 5, 'eval/loss': 3.0, 'train/tokens': 50},
    {'step': 6, 'train/loss': 'nan', 'train/tokens': 60},
  ]
  lines = [json.dumps(row) + '\n' for row in rows]
  (tmp_path / 'metrics.jsonl').write_text(''.join(lines))
  run = history.load(tmp_path)
  assert (run.config, run.summary, run.samples) == ({}, {}, [])
  assert run.sensitivity == {}
  assert math.isnan(run.series['train/loss'][1][0])
  assert history.final_numbers(run) == {
    'steps': 6, 'eval/loss': 3, 'tokens': 60
  }  # fmt: skip


def test_a_run_that_has_gone_on_is_not_where_it_ended_before(tmp_path):
  run = history.load(runs.write(tmp_path, steps=40, blocks=1))
  before = run.summary | {'steps': 20, 'eval/loss': 9.0}
  found = history.final_numbers(dataclasses.replace(run, summary=before))
  assert found['steps'] == 40 and found['eval/loss'] < 9


def test_a_folder_of_something_else_is_refused(tmp_path):
  (tmp_path / 'samples.jsonl').write_text('')
  with pytest.raises(FileNotFoundError, match='has none of config.json'):
    history.load(tmp_path)


def test_of_the_summary_only_numbers_count(tmp_path):
  summary = '{"a": 1, "b": NaN, "c": "3", "d": null, "e": [1], "f": 1e999}'
  (tmp_path / 'summary.json').write_text(summary)
  numbers = history.load(tmp_path).summary
  assert math.isnan(numbers.pop('b'))
  assert numbers == {'a': 1, 'f': math.inf}


@pytest.mark.parametrize(
  ('name', 'content', 'message'),
  [
    ('config.json', b'{"name": ', 'config.json is damaged: .*Move it away'),
    ('config.json', b'[' * 100_000, 'config.json is damaged: .*Move it away'),
    ('config.json', b'\xff', 'config.json is damaged: .*Move it away'),
    ('summary.json', b'[1]', 'summary.json is damaged: it is not an object'),
    (
      'summary.json',
      b'{"steps": 1' + b'0' * 400 + b'}',
      'summary.json is damaged: int too large.*Move it away',
    ),
    ('metrics.jsonl', b'{}\n{"step": 1}\n', 'metrics.jsonl:1 is damaged'),
    ('samples.jsonl', b'{"step": 1}\n', 'samples.jsonl is damaged: .*"prompt"'),
    ('sensitivity/40.json', b'{}', '40.json or the .npz beside it is damaged'),
    ('sensitivity/40.npz', b'PK', '40.json or the .npz beside it is damaged'),
  ],
)
def test_damage_is_named(tmp_path, name, content, message):
  run = runs.write(tmp_path, steps=40, blocks=1)
  (run / name).write_bytes(content)
  with pytest.raises(ValueError, match=message):
    history.load(run)
