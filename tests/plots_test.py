"""Tests of qat.plots."""

import math

import hypothesis
from hypothesis import strategies as st
import numpy as np
import pytest

from qat import plots


def curve(*values):
  return np.arange(10, 10 + 10 * len(values), 10), np.array(values, float)


def test_rows_are_in_the_order_of_the_blocks():
  names = ['head', 'block_10/q', 'block_2/q', 'block_2/o', 'block_0/q']
  table = plots.table({f'x/{name}': curve(1, 2) for name in names}, 'x/')
  assert table.names == [
    'block_0/q', 'block_2/q', 'block_2/o', 'block_10/q', 'head'
  ]  # fmt: skip


def test_many_rows_are_labelled_once_a_block():
  found = {
    f'x/block_{i}/{name}': curve(1, 2) for i in range(24) for name in 'qkvo'
  }
  axis = plots.heat_layout(plots.table(found, 'x/'))['yaxis']
  assert axis['tickvals'][:2] == ['block_0/q', 'block_1/q']
  assert axis['ticktext'] == [f'block {i}' for i in range(24)]


def test_a_table_joins_steps_and_averages_neighbours():
  found = {
    'x/a': (np.arange(300), np.arange(300.0)),
    'x/b': (np.array([0, 299]), np.array([5.0, math.inf])),
  }
  table = plots.table(found, 'x/')
  assert len(table.steps) == plots.COLUMNS
  assert table.steps[-1] == 299
  np.testing.assert_allclose(table.values[0, :2], [1, 4])
  assert table.values[1, 0] == 5
  assert np.all(np.isnan(table.values[1, 1:]))


@hypothesis.given(
  st.lists(st.floats(width=32), min_size=1, max_size=300), st.integers(6, 50)
)
def test_a_thinned_curve_keeps_its_extremes_and_its_ends(values, points):
  values = np.array(values)
  steps = np.arange(len(values)) * 10
  x, y = plots.thin(steps, values, points)
  assert len(x) <= points
  assert np.all(np.diff(x) > 0)
  np.testing.assert_array_equal(values[x // 10], y)
  assert (x[0], x[-1]) == (steps[0], steps[-1])
  finite = values[np.isfinite(values)]
  if finite.size:
    assert {finite.min(), finite.max()} <= set(y)


@hypothesis.given(
  st.lists(
    st.floats(-1e6, 1e6) | st.just(math.nan) | st.just(math.inf), max_size=400
  )
)
def test_smoothing_is_the_mean_of_a_centred_window(values):
  values = np.array(values)
  got = plots.smooth(values)
  widest = max(2, len(values) // 100)
  for i in range(len(values)):
    reach = min(widest, i, len(values) - 1 - i)
    window = values[i - reach : i + reach + 1]
    window = window[np.isfinite(window)]
    mean = window.mean() if window.size else math.nan
    np.testing.assert_allclose(got[i], mean, atol=1e-4, equal_nan=True)


def test_numbers_that_are_not_finite_are_gaps():
  values = np.array([1.0, math.nan, -math.inf, 1 / 3])
  assert plots.plain(values) == [1.0, None, None, 0.33333]


@pytest.mark.parametrize(
  'path, parts',
  [
    ('block_3/attn/q', (3, 'attn/q')),
    ('block_12', (12, '')),
    ('head', (None, 'head')),
    ('block_x/q', (None, 'block_x/q')),
    ('block_1x', (None, 'block_1x')),
    ('block_' + '9' * 5000, (None, 'block_' + '9' * 5000)),
  ],
)
def test_a_path_is_split_at_its_block(path, parts):
  assert plots.split(path) == parts


def test_names_are_shown_and_not_obeyed():
  name = 'a<b>&lt;\x1b'
  assert plots.escaped(name) == r'a&lt;b&gt;&amp;lt;\x1b'
  assert plots.short('x' * 41) == 'x' * 40 + '…'
  assert plots.line(name, *curve(1))['name'] == r'a&lt;b&gt;&amp;lt;\x1b'
