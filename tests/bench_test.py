"""scripts/bench.py train: what it makes of the times of steps."""

import json
import types

import pytest

from qat import flops
from scripts import bench


@pytest.fixture
def clock(monkeypatch):
  """Steps take what they say, by a clock that nothing else moves."""
  now = [0.0]
  monkeypatch.setenv('COLUMNS', '200')  # A narrow table cuts its heads.
  monkeypatch.setattr(bench.time, 'perf_counter', lambda: now[0])
  monkeypatch.setattr(flops, 'measured_peak', lambda seconds: 1e6)

  def variant(name, seconds, devices):
    def step(state, batch):
      assert batch['tokens'].shape == (16, 256)
      now[0] += seconds
      return state + 1, {}

    memory = types.SimpleNamespace(
      temp_size_in_bytes=7e6,
      argument_size_in_bytes=5e6,
      output_size_in_bytes=4e6,
      alias_size_in_bytes=4e6,
    )
    step.memory_analysis = lambda: memory
    return bench.Variant(name, step, 0, 300.0, devices)

  of = {'fp': (2.0, 4), 'bitnet': (1.0, 4)}
  monkeypatch.setattr(bench, '_fast', lambda name, _: variant(name, *of[name]))
  monkeypatch.setattr(bench, '_plain', lambda _: variant('plain', 8.0, 1))


def test_rows_compare_methods_round_by_round(clock, tmp_path, capsys):
  file = tmp_path / 'b.json'
  methods = '--methods=fp,bitnet,plain'
  assert bench.main(['train', methods, '--rounds=2', f'--json={file}']) == 0
  rows = json.loads(file.read_text())['rows']
  tokens = 16 * 256
  assert [rows[name]['speedup'] for name in rows] == [1.0, 2.0, 0.25]
  assert rows['fp']['tokens_per_s'] == tokens / 2
  assert rows['fp']['flops_per_s'] == tokens / 2 * 300
  # Of all devices that a step runs on.
  assert rows['fp']['flops_share'] == tokens / 2 * 300 / 4e6
  assert rows['plain']['flops_share'] == tokens / 8 * 300 / 1e6
  assert rows['bitnet']['peak_bytes'] == 12e6
  shown = capsys.readouterr().out
  assert 'against fp' in shown and '2.00 (2.00 to 2.00)' in shown


@pytest.mark.parametrize(
  ('arguments', 'expected'),
  [
    (['train', '--methods=fp,nope'], 'no method nope'),
    (['train', '--methods=fp', '--base=bitnet'], '--base=bitnet'),
    (['decode', '--llama', '--batch=2'], '--llama takes one text'),
  ],
)
def test_what_cannot_be_measured_is_told(arguments, expected, capsys):
  with pytest.raises(SystemExit):
    bench.main(arguments)
  assert expected in capsys.readouterr().err
