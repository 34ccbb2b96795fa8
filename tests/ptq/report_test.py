"""Totals, the table and the page of a quantization."""

import io
import json
import re

import pytest
from rich import console as rich_console

from qat.ptq import apply
from qat.ptq import report
from tests import clean


def result(**changes):
  records = [
    apply.Record(
      path=f'block_{i}/{name}',
      inputs=8,
      outputs=4,
      stored_bits=96 + 32 * i,
      weight_error=0.02,
      output_error=0.01 * (i + 1),
      seconds=0.5,
    )
    for i in range(2)
    for name in ('attn/q', 'ffn/down')
  ]
  fields = dict(
    config=clean.config(),
    leaves=lambda: iter(()),
    records=records,
    seconds={'scales': 1.0, 'quantization': 2.5},
    notes={'scales': {'block_0/attn/norm': [{'dtnp': float('nan')}]}},
  )
  return apply.Result(**fields | changes)


def make(**changes):
  evaluation = {
    when: {'eval/loss': 1.5, 'eval/perplexity': p, 'eval/bits_per_byte': 2.0}
    for when, p in (('before', 20.0), ('after', 25.0))
  }
  fields = dict(
    model='models/<b>x</b>',
    examples='6 x 16 tokens of <data>',
    evaluation=evaluation,
    sizes={'model_bytes': 4096, 'host_peak_bytes': 10**9},
    whole=True,
  )
  ptq = clean.ptq('gptq')
  quantized = fields.pop('result', None) or changes.pop('result', result())
  return report.make(quantized, ptq, **fields | changes)


def test_bits_are_of_all_that_is_stored_over_all_weights():
  totals = make()['totals']
  assert totals['weights'] == 4 * 32
  assert totals['bits_per_weight'] == (96 + 96 + 128 + 128) / 128
  assert totals['stored_bytes'] == 56
  assert totals['seconds'] == 3.5
  assert 'seconds' not in make(whole=False)['totals']
  assert totals['output_error'] == pytest.approx(0.015)


def test_it_is_json_and_has_every_layer():
  made = report.finite(make())
  again = json.loads(json.dumps(made, allow_nan=False))
  assert [layer['path'] for layer in again['layers']] == [
    r.path for r in result().records
  ]
  assert again['layers'][0]['bits'] == 3
  assert again['config']['method']['bits'] == 4
  assert again['notes']['scales']['block_0/attn/norm'] == [{'dtnp': None}]


def shown(made):
  out = io.StringIO()
  report.table(rich_console.Console(file=out, width=100), made)
  return out.getvalue()


def test_the_table_has_before_and_after():
  text = shown(make())
  (row,) = re.findall(r'perplexity +(\S+) +(\S+)', text)
  assert row == ('20.000', '25.000')
  (row,) = re.findall(r'bits per weight +(\S+)', text)
  assert row == '3.500'
  text = shown(make(evaluation={}))
  assert 'perplexity' not in text and 'bits per weight' in text


def test_the_page_stands_alone_and_escapes_what_it_is_given():
  page = report.page(make())
  assert "default-src 'none'" in page
  assert '<b>x</b>' not in page and '&lt;data&gt;' in page
  for part in ('block_1/ffn/down', '1.000e-02', '25.000', 'Error of outputs'):
    assert part in page


def test_without_calibration_there_are_no_errors_of_outputs():
  records = [
    apply.Record('block_0/attn/q', 8, 4, 96, 0.02, None, 0.5),
  ]
  made = make(
    result=result(records=records, notes={}), examples=None, evaluation={}
  )
  assert 'output_error' not in made['totals']
  titles = [chart.title for chart in report.charts(made['layers'])]
  assert titles == ['Error of weights', 'Bits per weight', 'Seconds']
  page = report.page(made)
  assert 'No calibration data.' in page and '–' in page


def test_a_chart_has_a_line_for_each_kind_of_layer():
  chart = report.charts(make()['layers'])[0]
  assert [line['name'] for line in chart.data] == ['attn/q', 'ffn/down']
  assert chart.data[0]['x'] == [0, 1]
  assert chart.data[0]['y'] == [0.01, 0.02]


def test_memory_is_of_this_process():
  found = report.memory()
  assert 10**7 < found['host_peak_bytes'] < 10**12
