"""Tests of qat.sensitivity_pictures; of its HTML also in report_test.py."""

import dataclasses
import json

import numpy as np
from plotly import graph_objects
import pytest

from qat import sensitivity
from qat import sensitivity_pictures
from tests import analyses

PATHS = [
  f'block_{i}/{name}'
  for i in range(2)
  for name in ('attn/q', 'attn/o', 'ffn/up/0', 'ffn/up/1', 'ffn/gate')
]


def make(paths=PATHS, **changes):
  """Layer i has a Gini coefficient of i / 10."""
  made = analyses.make(paths, np.random.default_rng(0))
  return {
    path: {
      kind: dataclasses.replace(stats, **{'gini': i / 10} | changes)
      for kind, stats in kinds.items()
    }
    for i, (path, kinds) in enumerate(made.items())
  }


def test_plotly_and_json_take_every_chart():
  charts = sensitivity_pictures.charts(make())
  assert [chart.title for chart in charts] == [
    'Inequality of the latent weights',
    'Inequality of the quantized weights',
    'Distribution of the sensitivities',
  ]
  for chart in charts:
    assert chart.caption.endswith('.')
    json.dumps([chart.data, chart.layout], allow_nan=False)
    graph_objects.Figure(chart.data, chart.layout)


@pytest.mark.parametrize('paths', [[], ['head']])
def test_without_blocks_nothing_is_drawn(paths):
  assert sensitivity_pictures.charts(make(paths)) == []
  assert sensitivity_pictures.maps(make(paths)) == ''


def test_experts_share_a_line_of_inequality():
  lines = sensitivity_pictures.charts(make())[0].data
  shown = {line['name']: line['y'] for line in lines}
  assert list(shown) == ['attn/q', 'attn/o', 'ffn/up', 'ffn/gate']
  np.testing.assert_allclose(shown['attn/o'], [0.1, 0.6])
  np.testing.assert_allclose(shown['ffn/up'], [0.25, 0.75])
  colors = [line['line']['color'] for line in lines]
  assert colors[0] == colors[1] != colors[2] == colors[3]


def test_distributions_are_the_last_blocks_of_one_layer_a_branch():
  analysis = make([*PATHS, 'block_2/attn/q', 'block_2/ffn/up/0',
                   'block_2/ffn/up/1'])  # fmt: skip
  lines = sensitivity_pictures.charts(analysis)[2].data
  assert [line['name'] for line in lines] == [
    'attn/q, latent',
    'attn/q, quantized',
    'ffn/up, latent',
    'ffn/up, quantized',
  ]
  stats = analysis['block_2/ffn/up/0']['quantized']
  np.testing.assert_allclose(lines[3]['y'], stats.histogram, rtol=1e-4)
  # 1 is an edge of the bins: on either side, half a bin of 1 / 4 away.
  logs = np.log10(lines[3]['x'])
  np.testing.assert_allclose(sorted(abs(logs))[:2], 1 / 8, atol=1e-4)


def test_maps_without_a_single_score_are_drawn():
  dark = make(map_NK=np.full((2, 3), -np.inf, np.float16))
  assert sensitivity_pictures.maps(dark).count('data:image/png') == 1 + 2 * 8


def test_the_range_of_colours_holds_every_finite_score_but_the_faintest():
  stats = [
    dataclasses.replace(kinds['latent'], map_NK=np.float16([[-np.inf, -2, x]]))
    for x, kinds in enumerate(make().values())
  ]
  low, high = sensitivity_pictures.color_range(stats)
  assert (low, high) == (-2, len(stats) - 1)
  assert sensitivity_pictures.color_range(stats[:1])[1] == 0
  flat = [dataclasses.replace(stats[0], map_NK=np.ones((2, 2)))]
  low, high = sensitivity_pictures.color_range(flat)
  assert low < high


def test_names_are_shown_and_not_obeyed():
  page = sensitivity_pictures.maps(make(['block_0/<b>"\x1b']))
  assert '&lt;b&gt;&quot;\\x1b' in page
  assert sensitivity.KINDS[0] in page and '<b>' not in page
