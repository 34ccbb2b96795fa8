"""Tests of qat.sensitivity_page and of the command that writes it."""

import dataclasses
import json
import re

import numpy as np
from plotly import graph_objects
import pytest

from qat import sensitivity
from qat import sensitivity_page
from qat import sensitivity_study
from scripts import sensitivity as command
from tests import analyses
from tests import studied
from tests import tiny

EXPERTS = [f'block_{i}/ffn/narrow/down/{e}' for i in range(2) for e in range(2)]
WIDE = [f'block_{i}/ffn/wide/down' for i in range(2)]
PLAIN = [f'block_{i}/ffn/down' for i in range(2)]
QUERY = [f'block_{i}/attn/q' for i in range(2)]


def analysed(label, paths, chosen, kinds=sensitivity_page.KINDS):
  rng = np.random.default_rng(len(label))
  real, alike = analyses.make(paths, rng), analyses.make(paths, rng)
  analysis = {
    path: {
      kind: {**found, 'binarized': alike[path]['quantized']}[kind]
      for kind in kinds
    }
    for path, found in real.items()
  }
  return sensitivity_study.Analysed(
    label, f'runs/{label}', 400, analysis, tuple(chosen)
  )


def make(name='fp'):
  calibration = sensitivity_study.Calibration(
    'data/set', 'abcdef' * 10, 32, 256, 1, 0.01
  )
  runs = (
    analysed(name, PLAIN + QUERY, PLAIN[1:], ('latent', 'binarized')),
    analysed('bitnet', PLAIN + QUERY, PLAIN[1:]),
    analysed('pquant', WIDE + EXPERTS, [WIDE[1], *EXPERTS[2:]]),
  )
  return sensitivity_study.Study(calibration, runs)


def figures(page):
  """The charts of a page by title."""
  titles = re.findall(r'<h3>([^<]*)</h3><p class="caption">', page)
  data = re.search(
    r'<script type="application/json" id="charts">(.*?)</script>', page, re.S
  )[1]
  return dict(zip(titles, json.loads(data).values(), strict=True))


def test_every_chart_has_its_place_and_plotly_takes_it():
  page = sensitivity_page.page(make())
  found = figures(page)
  assert list(found) == [
    *(f'The same layers in every block: {k}' for k in sensitivity_page.KINDS),
    *(f'All layers: {kind}' for kind in sensitivity_page.KINDS),
    *(f'Distribution: {kind}' for kind in sensitivity.KINDS),
  ]
  for i, figure in enumerate(found.values()):
    assert f'<div class="chart" id="chart-{i}">' in page
    graph_objects.Figure(figure['data'], figure['layout'])
  ids = re.findall(r'\bid="([^"]*)"', page)
  assert len(ids) == len(set(ids))
  assert set(re.findall(r'href="#([^"]*)"', page)) <= set(ids)


def test_lines_are_one_a_run_and_layer_with_experts_averaged():
  made = make()
  found = figures(sensitivity_page.page(made))
  lines = found['The same layers in every block: latent']['data']
  assert [line['name'] for line in lines] == [
    'fp ffn/down',
    'bitnet ffn/down',
    'pquant ffn/wide/down',
    'pquant ffn/narrow/down',
  ]
  pquant = made.runs[2].analysis
  mean = [
    np.mean([pquant[p]['latent'].gini for p in EXPERTS[2 * i : 2 * i + 2]])
    for i in range(2)
  ]
  assert lines[3]['x'] == [0, 1]
  np.testing.assert_allclose(lines[3]['y'], mean, rtol=1e-4)
  assert lines[2]['line']['color'] == lines[3]['line']['color']
  assert lines[1]['line']['color'] != lines[2]['line']['color']
  assert lines[2]['marker']['symbol'] != lines[3]['marker']['symbol']

  lines = found['All layers: latent']['data']
  assert [line['name'] for line in lines] == ['fp', 'bitnet', 'pquant']
  fp = made.runs[0].analysis
  mean = (fp[PLAIN[1]]['latent'].gini + fp[QUERY[1]]['latent'].gini) / 2
  np.testing.assert_allclose(lines[0]['y'][1], mean, rtol=1e-4)


def test_full_precision_has_no_line_of_quantized_weights():
  found = figures(sensitivity_page.page(make()))
  for title, figure in found.items():
    has = any(line['name'].startswith('fp') for line in figure['data'])
    assert has == (not title.endswith('quantized'))


def test_distributions_are_of_the_chosen_layers():
  made = make()
  lines = figures(sensitivity_page.page(made))['Distribution: quantized'][
    'data'
  ]
  assert [line['name'] for line in lines] == [
    'bitnet block_1/ffn/down',
    'pquant block_1/ffn/wide/down',
    'pquant block_1/ffn/narrow/down',
  ]
  pquant = made.runs[2].analysis
  mean = np.mean([pquant[p]['quantized'].histogram for p in EXPERTS[2:]], 0)
  np.testing.assert_allclose(lines[2]['y'], mean, rtol=1e-4, atol=1e-7)


def test_a_study_of_full_precision_alone_has_no_empty_chart():
  made = make()
  page = sensitivity_page.page(dataclasses.replace(made, runs=made.runs[:1]))
  titles = list(figures(page))
  assert len(titles) == 5
  assert not any(title.endswith('quantized') for title in titles)


def test_rows_are_the_chosen_layers_and_the_mean():
  made = make()
  rows = list(sensitivity_page.rows(made.runs))
  assert [(label, layer) for label, layer, _ in rows] == [
    ('fp', PLAIN[1]),
    ('fp', 'mean of all 4'),
    ('bitnet', PLAIN[1]),
    ('bitnet', 'mean of all 4'),
    ('pquant', WIDE[1]),
    ('pquant', EXPERTS[2]),
    ('pquant', EXPERTS[3]),
    ('pquant', 'mean of all 6'),
  ]
  assert rows[0][2].keys() == rows[1][2].keys() == {'latent', 'binarized'}
  stats = made.runs[1].analysis
  assert rows[2][2]['quantized'] == (
    stats[PLAIN[1]]['quantized'].gini,
    stats[PLAIN[1]]['quantized'].top1,
  )
  gini = np.mean([kinds['latent'].gini for kinds in stats.values()])
  np.testing.assert_allclose(rows[3][2]['latent'][0], gini)


def test_the_numbers_and_a_map_of_each_chosen_layer_are_on_the_page():
  made = make()
  page = sensitivity_page.page(made).split('<script>')[0]
  for _, _, kinds in sensitivity_page.rows(made.runs):
    for gini, top1 in kinds.values():
      assert f'<td>{gini:.3f}<br>{100 * top1:.1f} %</td>' in page
  # Two of each quantized layer, one of full precision, one scale for all.
  assert page.count('src="data:image/png;base64,') == 1 + 1 + 2 * 4
  assert page.count('class="scale"') == 1


def test_the_reference_of_normal_weights_is_what_they_have():
  w_KN = np.random.default_rng(0).normal(size=(1000, 1000))
  s_KN = sensitivity.scores(w_KN, np.ones(1000))
  np.testing.assert_allclose(
    sensitivity.gini(s_KN), sensitivity_page.NORMAL['gini'], atol=1e-3
  )
  np.testing.assert_allclose(
    sensitivity.top_share(s_KN), sensitivity_page.NORMAL['top1'], atol=1e-3
  )


def test_the_page_loads_nothing_and_obeys_no_name():
  page = sensitivity_page.page(make('<img src=x onerror=alert(1)>"\x1b'))
  assert '<img src=x' not in page
  assert '&lt;img src=x onerror=alert(1)&gt;&quot;\\x1b' in page
  start = page.split('<script>')[0]
  assert "default-src 'none'" in start
  assert not re.search(r'(src|href)="(?!data:image/png|#)', start)


# -------------------------------------------------------------- the command


@pytest.fixture(scope='module')
def workdirs(tmp_path_factory):
  folder = tmp_path_factory.mktemp('runs')
  dataset = tiny.dataset(folder)
  fields = {'model.n_layers': 1}
  for method in ('fp', 'bitnet'):
    studied.save(folder / method, method, dataset, fields)
  return [str(folder / method) for method in ('fp', 'bitnet')]


def test_the_command_writes_a_page_and_numbers(
  workdirs, tmp_path, capsys, monkeypatch
):
  monkeypatch.setenv('COLUMNS', '120')
  out, numbers = tmp_path / 'study.html', tmp_path / 'study.json'
  arguments = [*workdirs, f'--out={out}', f'--json={numbers}', '--damping=0.1']
  with tiny.compiled_quickly():
    assert command.main(arguments) == 0
  content = json.loads(numbers.read_text())
  assert content['calibration']['damping'] == 0.1
  found = content['runs'][1]['linears']['block_0/ffn/down']
  printed = capsys.readouterr()
  for kind in sensitivity_page.KINDS:
    assert f'{found[kind]["gini"]:.3f}' in printed.out
    assert f'<td>{found[kind]["gini"]:.3f}<br>' in out.read_text('utf-8')
  assert 'block_0/ffn/down' in printed.out
  assert '100%, done' in printed.err


@pytest.mark.parametrize(
  ('arguments', 'expected'),
  [
    (['--out=no/where/study.html'], 'there is no folder no/where'),
    (['--out=x.html', '--layer=nothing'], "is 'nothing'"),
  ],
)
def test_the_command_tells_what_is_wrong_in_a_line(
  workdirs, tmp_path, capsys, monkeypatch, arguments, expected
):
  monkeypatch.chdir(tmp_path)
  assert command.main([*workdirs, *arguments]) == 2
  printed = capsys.readouterr()
  assert not printed.out and not list(tmp_path.iterdir())
  line = printed.err.splitlines()[-1]
  assert line.startswith('Error: ') and expected in printed.err


def test_a_folder_without_a_run_is_told(tmp_path, capsys):
  missing = str(tmp_path / 'x')
  assert command.main([missing, f'--out={tmp_path / "s.html"}']) == 2
  assert 'holds no run' in capsys.readouterr().err


def test_help_has_examples(capsys):
  with pytest.raises(SystemExit) as end:
    command.main(['--help'])
  assert end.value.code == 0
  assert 'python scripts/sensitivity.py runs/fp' in capsys.readouterr().out
