"""Runs side by side: their clocks, and what is equal."""

import json

import numpy as np
import pytest

from qat import zo_curves


def write(folder, *, steps, speed, evaluated, tokens=100):
  """A run whose steps take tokens / speed seconds each."""
  folder.mkdir()
  rows = []
  for step in range(0, steps + 1):
    row = {'step': step, 'time': 1e9 + 7 * step}
    if step and step % 2 == 0:
      rows.append(
        row
        | {
          'train/loss': 5.0 - step / 10,
          'train/tokens': step * tokens,
          'train/tokens_per_s': speed,
        }
      )
    if step in evaluated:
      rows.append(row | {'eval/loss': 4.0 - step / 10})
  text = ''.join(json.dumps(row) + '\n' for row in rows)
  (folder / 'metrics.jsonl').write_text(text)
  return folder


def test_seconds_are_those_of_training(tmp_path):
  curve = zo_curves.read(
    write(tmp_path / 'slow', steps=6, speed=50.0, evaluated=(0, 3, 6))
  )
  assert curve.name == 'slow'
  np.testing.assert_array_equal(curve.steps, [2, 4, 6])
  np.testing.assert_allclose(curve.seconds, [4, 8, 12])
  np.testing.assert_allclose(curve.losses, [4.8, 4.6, 4.4])
  np.testing.assert_array_equal(curve.eval_steps, [0, 3, 6])
  np.testing.assert_allclose(curve.eval_seconds, [0, 6, 12])
  np.testing.assert_allclose(curve.eval_losses, [4.0, 3.7, 3.4])


def test_runs_are_compared_where_all_of_them_are(tmp_path):
  slow = write(tmp_path / 'a', steps=8, speed=50.0, evaluated=(0, 2, 4, 6, 8))
  fast = write(tmp_path / 'b', steps=10, speed=200.0, evaluated=(1, 4, 9, 10))
  rows = zo_curves.compare([zo_curves.read(slow), zo_curves.read(fast)])
  # Equal steps: 8. Equal time: 5 s, the whole of b and 2.5 steps of a.
  a, b = rows
  assert (a.name, a.steps, a.seconds) == ('a', 8, pytest.approx(16))
  assert (b.steps, b.seconds) == (10, pytest.approx(5))
  assert (a.at_step, a.at_time, a.final) == pytest.approx((3.2, 3.8, 3.2))
  assert (b.at_step, b.at_time, b.final) == pytest.approx((3.6, 3.0, 3.0))


def test_what_was_not_reached_is_no_number(tmp_path):
  late = write(tmp_path / 'late', steps=8, speed=1.0, evaluated=(8,))
  fast = write(tmp_path / 'fast', steps=2, speed=100.0, evaluated=(2,))
  rows = zo_curves.compare([zo_curves.read(late), zo_curves.read(fast)])
  assert np.isnan(rows[0].at_step) and np.isnan(rows[0].at_time)
  assert rows[1].at_step == rows[1].final


def test_a_run_without_losses_is_told(tmp_path):
  folder = write(tmp_path / 'run', steps=4, speed=1.0, evaluated=())
  with pytest.raises(ValueError, match='2 steps and 0 evaluations'):
    zo_curves.read(folder)
  with pytest.raises(FileNotFoundError, match='metrics.jsonl'):
    zo_curves.read(tmp_path)
