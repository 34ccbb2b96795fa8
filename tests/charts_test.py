"""Tests of qat.charts: plotly itself reads every chart."""

import json

import numpy as np
from plotly import graph_objects
import pytest

from qat import charts

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
    'train/slope': curve(9, 2, 5, 3, 4),
    'train/clipped': curve(0.5, 0, 0, 0, 0),
    'train/param_norm': curve(9, 10, 11, 11.5, 11.5),
    'train/tokens_per_s': curve(90, 100, 100, 100, 100),
    'eval/bits_per_byte': curve(4, 3, 2, 2, 2),
  }
  for i in reversed(range(blocks)):
    for name in ('attn/q', 'ffn/narrow/up'):
      path = f'block_{i}/{name}'
      found[f'health/flips/{path}'] = curve(1e-2, 1e-3, 1e-3, 0, 1e-4)
      found[f'health/scale/{path}'] = curve(2, 2, 3, 3, 4)
      found[f'health/zeros/{path}'] = curve(*[0.3 * (name == 'attn/q')] * 5)
    routing = 'router_entropy', 'load_entropy', 'idle_experts', 'dropped'
    for key in ('alpha', 'beta', *routing):
      found[f'health/{key}/block_{i}'] = curve(*np.full(5, i + 1.0))
    for expert in range(4):
      load = curve(*np.full(5, 0.1 * (expert + 1)))
      found[f'health/expert_load/block_{i}/{expert}'] = load
  return found


def drawn():
  numbers = {
    'baseline/gzip_bits_per_byte': 3.0,
    'baseline/unigram_bits_per_byte': 4.5,
  }
  return {
    chart.title: chart
    for chart in (
      *charts.learning(series(), numbers),
      *charts.health(series()),
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
    'Slope along random directions',
    'Clipped slopes',
    'Parameter norm',
    'Tokens per second',
    'Flips',
    'Scale, relative to its start',
    'Zeros',
    'Load of the experts',
    'Scales of the branches',
    'Entropy of the router',
    'Entropy of the load',
    'Idle experts',
    'Dropped choices',
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


TOGETHER = (
  {'train/lr', 'train/weight_decay'},
  {'health/alpha/block_0', 'health/beta/block_0'},
)


@pytest.mark.parametrize('key', series(blocks=1))
def test_every_series_can_stand_alone_or_with_its_partner(key):
  keys = next((pair for pair in TOGETHER if key in pair), {key})
  alone = {key: series(blocks=1)[key] for key in keys}
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
