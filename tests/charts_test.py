import json
import math

import hypothesis
from hypothesis import strategies as st
import numpy as np
from plotly import graph_objects
import pytest

from qat import charts
from qat import sensitivity

STEPS = np.arange(10, 60, 10)


def curve(*values):
  return STEPS[: len(values)], np.array(values, float)


def series(blocks=2):
  """Five rows of a run, with every key that is drawn."""
  found = {
    'train/loss': curve(7, 5, 4, 3.5, 3.4),
    'train/lr': curve(0, 1, 2, 1, 0),
    'train/weight_decay': curve(0.1, 0.1, 0, 0, 0),
    'train/grad_norm': curve(3, 1, 0.5, 0.4, 0.4),
    'train/tokens_per_s': curve(90, 100, 100, 100, 100),
    'eval/bits_per_byte': curve(4, 3, 2, 2, 2),
  }
  for i in reversed(range(blocks)):
    for name in ('attn/q', 'ffn/narrow/up'):
      path = f'block_{i}/{name}'
      found[f'health/flips/{path}'] = curve(1e-2, 1e-3, 1e-3, 0, 1e-4)
      found[f'health/scale/{path}'] = curve(2, 2, 3, 3, 4)
      found[f'health/zeros/{path}'] = curve(*[0.3 * (name == 'attn/q')] * 5)
    for key in ('alpha', 'beta', 'router_entropy'):
      found[f'health/{key}/block_{i}'] = curve(*np.full(5, i + 1.0))
    for expert in range(4):
      load = curve(*np.full(5, 0.1 * (expert + 1)))
      found[f'health/expert_load/block_{i}/{expert}'] = load
  return found


def analysis(paths):
  return {
    path: {
      kind: sensitivity.Stats(
        gini=0.1 * i,
        top1=0.1,
        mean=1.0,
        histogram=np.zeros(48),
        map_NK=np.zeros((2, 2)),
      )
      for kind in sensitivity.KINDS
    }
    for i, path in enumerate(paths)
  }


def drawn():
  numbers = {
    'baseline/gzip_bits_per_byte': 3.0,
    'baseline/unigram_bits_per_byte': 4.5,
  }
  paths = [
    f'block_{i}/ffn/{n}' for i in range(2) for n in ('up/0', 'up/1', 'q')
  ]
  return {
    chart.title: chart
    for chart in (
      *charts.learning(series(), numbers),
      *charts.health(series()),
      *charts.inequality(analysis(paths)),
    )
  }


def figure(chart):
  """Plotly's own reading: an unknown or impossible property is an error."""
  return graph_objects.Figure(chart.data, chart.layout)


def test_everything_is_drawn():
  assert list(drawn()) == [
    'Training loss',
    'Validation bits per byte',
    'Schedule',
    'Gradient norm',
    'Tokens per second',
    'Flips',
    'Scale, relative to its start',
    'Zeros',
    'Load of the experts',
    'Scales of the branches',
    'Entropy of the router',
    'Inequality of the latent weights',
    'Inequality of the quantized weights',
  ]


@pytest.mark.parametrize('title', drawn())
def test_plotly_and_json_take_every_chart(title):
  chart = drawn()[title]
  assert chart.caption.endswith('.')
  json.dumps([chart.data, chart.layout], allow_nan=False)
  made = figure(chart)
  for trace in made.data:
    assert trace.xaxis in (None, 'x')
    if trace.yaxis == 'y2':
      assert made.layout.yaxis2.domain[1] < made.layout.yaxis.domain[0]


def test_without_data_nothing_is_drawn():
  assert charts.learning({}, {}) == []
  assert charts.health({}) == []
  assert charts.inequality({}) == []


@pytest.mark.parametrize('key', series(blocks=1))
def test_every_series_can_stand_alone(key):
  alone = {key: series(blocks=1)[key]}
  found = charts.learning(alone, {}) + charts.health(alone)
  # A layer whose codes are never 0 has no row among the zeros.
  assert len(found) == (key != 'health/zeros/block_0/ffn/narrow/up')
  for chart in found:
    figure(chart)


def test_baselines_are_level_lines():
  data = drawn()['Validation bits per byte'].data
  lines = {trace['name']: trace['y'] for trace in data}
  assert lines['gzip'] == [3.0, 3.0]
  assert lines['unigram'] == [4.5, 4.5]


def test_flips_are_logarithmic_and_none_is_a_gap():
  (heat,) = drawn()['Flips'].data
  assert heat['z'][0] == [-2, -3, -3, None, -4]
  assert heat['customdata'][0] == [0.01, 0.001, 0.001, 0, 0.0001]
  assert heat['colorbar']['ticktext'] == ['0.01 %', '0.1 %', '1 %']


def test_a_run_whose_codes_never_flip_is_drawn_as_a_gap():
  (chart,) = charts.health({'health/flips/block_0/q': curve(0, 0)})
  assert chart.data[0]['z'] == [[None, None]]
  figure(chart)


def test_scales_are_relative_to_their_start():
  (heat,) = drawn()['Scale, relative to its start'].data
  assert heat['z'][0] == [1, 1, 1.5, 1.5, 2]
  assert (heat['zmin'], heat['zmax']) == (0, 2)


def test_only_layers_with_zeros_are_among_the_zeros():
  (heat,) = drawn()['Zeros'].data
  assert heat['y'] == ['block_0/attn/q', 'block_1/attn/q']


def test_the_load_is_relative_to_an_even_one():
  (heat,) = drawn()['Load of the experts'].data
  np.testing.assert_allclose(
    [row[0] for row in heat['z'][:4]], [0.4, 0.8, 1.2, 1.6]
  )
  labels = drawn()['Load of the experts'].layout['yaxis']['ticktext']
  assert labels[:2] == ['0 expert 0', '0 expert 1']


def test_experts_share_a_line_of_inequality():
  up, q = drawn()['Inequality of the latent weights'].data
  assert (up['name'], q['name']) == ('ffn/up', 'ffn/q')
  np.testing.assert_allclose(up['y'], [0.05, 0.35])
  np.testing.assert_allclose(q['y'], [0.2, 0.5])


def test_rows_are_in_the_order_of_the_blocks():
  names = ['head', 'block_10/q', 'block_2/q', 'block_2/o', 'block_0/q']
  table = charts.table({f'x/{name}': curve(1, 2) for name in names}, 'x/')
  assert table.names == [
    'block_0/q', 'block_2/q', 'block_2/o', 'block_10/q', 'head'
  ]  # fmt: skip


def test_many_rows_are_labelled_once_a_block():
  found = {
    f'x/block_{i}/{name}': curve(1, 2) for i in range(24) for name in 'qkvo'
  }
  axis = charts.heat_layout(charts.table(found, 'x/'))['yaxis']
  assert axis['tickvals'][:2] == ['block_0/q', 'block_1/q']
  assert axis['ticktext'] == [f'block {i}' for i in range(24)]


def test_a_table_joins_steps_and_averages_neighbours():
  found = {
    'x/a': (np.arange(300), np.arange(300.0)),
    'x/b': (np.array([0, 299]), np.array([5.0, math.inf])),
  }
  table = charts.table(found, 'x/')
  assert len(table.steps) == charts.COLUMNS
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
  x, y = charts.thin(steps, values, points)
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
  got = charts.smooth(values)
  widest = max(2, len(values) // 100)
  for i in range(len(values)):
    reach = min(widest, i, len(values) - 1 - i)
    window = values[i - reach : i + reach + 1]
    window = window[np.isfinite(window)]
    mean = window.mean() if window.size else math.nan
    np.testing.assert_allclose(got[i], mean, atol=1e-4, equal_nan=True)


def test_numbers_that_are_not_finite_are_gaps():
  values = np.array([1.0, math.nan, -math.inf, 1 / 3])
  assert charts.plain(values) == [1.0, None, None, 0.33333]


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
  assert charts.split(path) == parts


def test_names_are_shown_and_not_obeyed():
  name = 'a<b>&lt;\x1b'
  assert charts.escaped(name) == r'a&lt;b&gt;&amp;lt;\x1b'
  assert charts.short('x' * 41) == 'x' * 40 + '…'
  assert charts.line(name, *curve(1))['name'] == r'a&lt;b&gt;&amp;lt;\x1b'
