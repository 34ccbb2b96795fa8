"""What benchmarks tell beside their figures."""

import argparse
import os

from matplotlib import figure
from matplotlib import image
import numpy as np
import pytest

from qat import benchmarks


def test_rows_become_a_table_and_a_result(capsys):
  rows = [
    {'model': 'a', 'decode/s': 12.3456, 'bytes': 51_234, 'of memory': None},
    {'model': 'b', 'decode/s': 7.0, 'bytes': 12, 'of memory': 0.5},
  ]
  found = benchmarks.show(rows)
  assert found == {
    'machine': benchmarks.machine(),
    'commit': benchmarks.commit(),
    'rows': rows,
  }
  printed = capsys.readouterr().out
  for text in (*rows[0], '12.3', '51.2k', 'None', '0.5', benchmarks.machine()):
    assert text in printed


def test_a_cpu_is_named_with_its_cores():
  assert benchmarks.machine().endswith(f'{len(os.sched_getaffinity(0))} cores')


@pytest.fixture
def drawn(monkeypatch):
  """The pictures that are saved, as matplotlib has them."""
  found = []
  save = figure.Figure.savefig

  def savefig(picture, *args, **options):
    found.append(picture)
    save(picture, *args, **options)

  monkeypatch.setattr(figure.Figure, 'savefig', savefig)
  return found


def lines(axis):
  """Of each line: its label, length, limit (None: not drawn), colour, text."""
  bars = sorted((round(p.get_y() + 0.4), p) for p in axis.patches)
  limits = {
    round(y): x for c in axis.collections for x, y in c.get_offsets().data
  }
  return [
    (
      axis.get_yticklabels()[i].get_text(),
      bar.get_width(),
      limits.get(i),
      bar.get_facecolor(),
      axis.texts[i].get_text(),
    )
    for i, bar in bars
  ]


def test_products_are_drawn_beside_memory_and_floats(tmp_path, drawn):
  row = {'shape': 'a', 'rows': 1, 'format': '1bit', 'seconds': 2e-3}
  row |= {'bytes': 1000, 'memory bytes/s': 1e6, 'of memory': 0.5}
  slow = row | {'shape': 'b', 'rows': 4, 'float32': None, 'bfloat16': None}
  rows = [row | {'float32': 24.0, 'bfloat16': 32.0}, slow]
  benchmarks.plot_products(tmp_path / 'a.png', rows)
  first, second = drawn[0].axes
  packed, float32, bfloat16 = lines(first)
  assert packed[0] == '1bit, 1 row'
  assert packed[4] == '2 ms, 0.5 of the limit'
  np.testing.assert_allclose(packed[1:3], [2, 1])
  assert float32[0] == 'XLA, float32, 1 row'
  np.testing.assert_allclose(float32[1:3], [48, 32])
  assert bfloat16[4] == '64 ms, 0.25 of the limit'
  assert packed[3] != float32[3] == bfloat16[3]
  assert [line[0] for line in lines(second)] == ['1bit, 4 rows']
  assert image.imread(tmp_path / 'a.png').ndim == 3


@pytest.mark.parametrize('rate', [1e6, None])
def test_models_are_drawn_in_tokens(rate, tmp_path, drawn):
  rows = [
    {'model': name, 'decode/s': speed, 'bytes': 1000, 'memory/s': rate}
    for name, speed in (('a', 1600.0), ('b', 20_000.0))
  ]
  benchmarks.plot_models(
    *(tmp_path / 'a.png', 'title', rows, 'decode/s', 2, ('b', None))
  )
  (axis,) = drawn[0].axes
  assert axis.get_xlim()[1] > 20_000
  a, b = lines(axis)
  assert a[:2] == ('a', 1600) and b[:2] == ('b', 20_000)
  assert a[3] != b[3]
  if rate:
    assert a[2] == b[2] == 2000
    assert a[4] == '1.60k/s, 0.8 of the limit'
    assert b[4] == '20k/s, 10 of the limit'
  else:
    assert a[2] is b[2] is None
    assert a[4:] == ('1.60k/s',)


def test_limits_far_away_leave_room_for_the_bars(tmp_path, drawn):
  row = {'model': 'a', 'prefill/s': 10.0, 'bytes': 1, 'memory/s': 1.0}
  benchmarks.plot_models(*(tmp_path / 'a.png', '', [row], 'prefill/s', 512, ()))
  assert drawn[0].axes[0].get_xlim()[1] < 11


@pytest.mark.parametrize('name', ['a.jpg', 'nowhere/a.png'])
def test_a_picture_that_cannot_be_written_is_refused_at_once(name, capsys):
  parser = argparse.ArgumentParser()
  benchmarks.add_outputs(parser)
  assert parser.parse_args(['--plot=a.png']).plot == 'a.png'
  with pytest.raises(SystemExit):
    parser.parse_args([f'--plot={name}'])
  assert f'{name}: a .png file' in capsys.readouterr().err
