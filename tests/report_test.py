"""Tests of qat.report: pages as a browser reads them."""

import base64
import hashlib
import html
from html import parser
import json
import math
import re
import shutil

import pytest

from qat import metrics
from qat import report
from qat import sensitivity_files
from tests import runs


class Page(parser.HTMLParser):
  """The tags and the text of a page, as a browser would see them."""

  def __init__(self, path):
    super().__init__()
    self.tags = []
    self.scripts = []
    self.data = {}
    self.text = ''
    self._open = None
    self.feed(path.read_text('utf-8'))
    self.close()

  def handle_starttag(self, tag, attributes):
    self.tags.append((tag, dict(attributes)))
    self._open = (tag, dict(attributes)) if tag in ('script', 'style') else None

  def handle_endtag(self, tag):
    self._open = None

  def handle_data(self, data):
    if self._open is None:
      self.text += data
    elif self._open[0] == 'script':
      if self._open[1].get('type') == 'application/json':
        self.data = json.loads(data)
      else:
        self.scripts.append(data)

  @property
  def policy(self):
    return next(
      a['content']
      for tag, a in self.tags
      if a.get('http-equiv') == 'Content-Security-Policy'
    )

  @property
  def sections(self):
    return [a['id'] for tag, a in self.tags if tag == 'h2']


@pytest.fixture(scope='module')
def full(tmp_path_factory):
  workdir = runs.write(tmp_path_factory.mktemp('runs') / 'full')
  return Page(report.write(workdir))


def test_a_full_run_has_every_section(full):
  assert full.sections == [
    'learning',
    'low-bit',
    'sensitivity',
    'samples',
    'details',
  ]
  links = [a['href'] for tag, a in full.tags if tag == 'a']
  assert links == [f'#{name}' for name in full.sections]
  assert 'Maps' in full.text


def test_the_head_shows_the_final_numbers_beside_the_baselines(full):
  for text in ('1.920', '2.71', '4.37', '30.57', '3.70M', '1.28', '21m 52s'):
    assert text in full.text
  assert '29 % less than gzip, 56 % less than unigram' in full.text
  assert 'pquant-tiny' in full.text


def test_every_chart_has_its_place_and_numbers(full):
  places = [a['id'] for _, a in full.tags if a.get('class') == 'chart']
  assert places == list(full.data)
  assert len(places) == 15
  for figure in full.data.values():
    assert figure['data']
    for trace in figure['data']:
      assert any(value is not None for value in trace['x'])


def test_samples_show_their_prompt_once(full):
  assert full.text.count('It is a truth of the house') == 2
  assert 'It is a truthIt is a truth' not in full.text
  assert 'sensible of the kindness\nwith which' in full.text


def loads(page):
  """The addresses a page asks for when it is opened, or could be led to."""
  return [
    value
    for _, attributes in page.tags
    for name, value in attributes.items()
    if name
    in ('src', 'href', 'action', 'data', 'srcset', 'poster', 'xlink:href')
  ]


def test_the_page_loads_nothing(full):
  for address in loads(full):
    assert address.startswith(('#', 'data:image/png;base64,'))
  assert not any(tag in ('link', 'iframe', 'object') for tag, _ in full.tags)
  style = full.policy.split(';')
  assert style[0] == "default-src 'none'"
  assert 'http' not in full.policy and 'unsafe-eval' not in full.policy


def test_the_policy_lets_exactly_the_two_scripts_of_the_template_run(full):
  allowed = re.findall(r"'sha256-([^']+)'", full.policy)
  digests = [
    base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    for script in full.scripts
  ]
  assert len(digests) == 2 and digests == allowed
  directive = next(d for d in full.policy.split('; ') if 'script' in d)
  assert 'unsafe' not in directive


def test_the_pictures_are_pictures(full):
  pictures = [a['src'] for tag, a in full.tags if tag == 'img']
  # A scale, and two maps of each linear of the first, middle and last block.
  assert len(pictures) == 1 + 2 * 3 * len(runs.LINEARS)
  for picture in pictures:
    data = base64.b64decode(picture.partition(',')[2])
    assert data.startswith(b'\x89PNG')


def test_hostile_text_adds_no_tag_no_handler_and_no_address(tmp_path):
  page = Page(report.write(runs.write_hostile(tmp_path / 'run')))
  allowed = {
    'html', 'head', 'meta', 'title', 'style', 'body', 'header', 'main', 'nav',
    'footer', 'h1', 'h2', 'h3', 'p', 'a', 'div', 'dl', 'dt', 'dd', 'span', 'i',
    'b', 'section', 'figure', 'figcaption', 'img', 'br', 'details', 'summary',
    'blockquote', 'pre', 'script',
  }  # fmt: skip
  assert {tag for tag, _ in page.tags} <= allowed
  for _, attributes in page.tags:
    assert attributes.keys() <= {
      'lang', 'charset', 'http-equiv', 'content', 'name', 'class', 'id', 'href',
      'src', 'alt', 'style', 'type', 'open',
    }  # fmt: skip
  for address in loads(page):
    assert address.startswith(('#', 'data:image/png;base64,'))
  assert len(page.scripts) == 2
  # It is shown, though: as text, in the head, the samples and the config.
  for text in runs.EVIL[:-1]:
    assert page.text.count(text) >= 4
  assert r'\x1b]0;pwned\x07\u202e\ud800\x00\u2028' in page.text


def test_hostile_names_reach_plotly_as_text(tmp_path):
  # Plotly reads tags in its texts; entities it turns back into characters.
  page = Page(report.write(runs.write_hostile(tmp_path / 'run')))
  labels = [
    # Of its tags, only those of the templates for the hover are ours.
    re.sub(r'<br>step %{x}<br>|%{y}|<extra></extra>', '', text)
    for figure in page.data.values()
    for text in strings(figure)
  ]
  for label in labels:
    assert not set(label) & set('<>\x1b\x07')
  assert any(runs.EVIL[1] in html.unescape(label) for label in labels)


def strings(tree):
  if isinstance(tree, str):
    yield tree
  elif isinstance(tree, dict | list):
    for part in tree.values() if isinstance(tree, dict) else tree:
      yield from strings(part)


FILES = ('config.json', 'metrics.jsonl', 'summary.json')


@pytest.mark.parametrize('name', FILES)
def test_one_file_is_enough(name, tmp_path):
  runs.write(tmp_path / 'full', steps=40)
  run = tmp_path / 'run'
  run.mkdir()
  shutil.copy(tmp_path / 'full' / name, run)
  page = Page(report.write(run))
  sections = {
    'config.json': ['details'],
    'metrics.jsonl': ['learning', 'low-bit'],
    'summary.json': ['details'],
  }
  assert page.sections == sections[name]
  assert ('1.9' in page.text) == (name != 'config.json')


@pytest.mark.parametrize(
  'name, section',
  [
    ('samples.jsonl', 'samples'),
    ('sensitivity', 'sensitivity'),
    ('metrics.jsonl', 'learning'),
  ],
)
def test_a_section_without_data_is_left_out(name, section, tmp_path):
  run = runs.write(tmp_path / 'run', steps=40)
  path = run / name
  shutil.rmtree(path) if path.is_dir() else path.unlink()
  sections = Page(report.write(run)).sections
  assert section not in sections and 'details' in sections


def test_a_full_precision_run_has_no_health(tmp_path):
  run = tmp_path / 'run'
  with_loss = {'step': 1, 'time': 1.0, 'train/loss': 7.0}
  run.mkdir()
  (run / 'metrics.jsonl').write_text(json.dumps(with_loss) + '\n')
  page = Page(report.write(run))
  assert page.sections == ['learning']
  assert list(page.data) == ['chart-0']


def test_a_run_under_way_shows_its_latest_numbers(tmp_path):
  run = runs.write(tmp_path / 'run', steps=40)
  (run / 'summary.json').unlink()
  page = Page(report.write(run))
  assert 'Not complete: 40 of 400 steps.' in page.text
  latest = [
    row['eval/bits_per_byte']
    for row in metrics.read(run)
    if 'eval/bits_per_byte' in row
  ][-1]
  assert f'{latest:.3f}' in page.text
  assert 'lower is better' in page.text


def test_a_finished_run_is_not_called_incomplete(full):
  assert 'Not complete' not in full.text
  assert 'not finite' not in full.text


def test_divergence_is_said_at_the_top(tmp_path):
  with metrics.Logger(
    tmp_path, total_steps=9, first_step=0, primary=True
  ) as log:
    log.scalars(1, {'train/loss': 7.0, 'eval/bits_per_byte': 5.0})
    log.scalars(2, {'train/loss': math.nan, 'eval/bits_per_byte': math.inf})
    log.scalars(3, {'train/loss': math.inf})
  page = Page(report.write(tmp_path))
  assert (
    'The training loss was not finite 2 times, first at step 2' in page.text
  )
  assert page.data['chart-0']['data'][0]['y'] == [7.0, None, None]


def test_a_long_run_stays_a_small_page(tmp_path):
  rows = [
    json.dumps({'step': s, 'time': 1.0, 'train/loss': 1 / s, 'train/lr': 1.0})
    for s in range(1, 100_001)
  ]
  (tmp_path / 'metrics.jsonl').write_text('\n'.join(rows) + '\n')
  page = Page(report.write(tmp_path))
  assert len(json.dumps(page.data)) < 150_000
  assert page.data['chart-0']['data'][0]['x'][-1] == 100_000


def test_the_newest_analysis_is_shown(tmp_path):
  run = runs.write(tmp_path / 'run', steps=40, blocks=1)
  made = sensitivity_files.load(run, 40)
  stats = made['block_0/attn/q']['latent']
  made['block_0/attn/q']['latent'] = type(stats)(
    **vars(stats) | {'gini': 0.123}
  )
  sensitivity_files.save(run, 100, made)
  assert 'Gini 0.12' in Page(report.write(run)).text


def test_the_page_is_the_same_each_time(tmp_path):
  run = runs.write(tmp_path / 'run', steps=40)
  first = report.write(run).read_bytes()
  assert report.write(run).read_bytes() == first
  assert not list(run.glob('*.tmp'))


def test_damage_is_named_and_the_old_page_stays(tmp_path, capsys):
  run = runs.write(tmp_path / 'run', steps=40, blocks=1)
  before = report.write(run).read_bytes()
  (run / 'summary.json').write_text('[1]')
  with pytest.raises(ValueError, match='summary.json is damaged'):
    report.write(run)
  assert report.main([str(run)]) == 1
  assert 'summary.json is damaged' in capsys.readouterr().err
  assert (run / 'report.html').read_bytes() == before


def test_the_command_line(tmp_path, capsys):
  run = runs.write(tmp_path / 'run', steps=40, blocks=1)
  assert report.main([str(run)]) == 0
  assert capsys.readouterr().out == f'{run}/report.html\n'
  assert report.main([]) == 2
  assert 'usage' in capsys.readouterr().err
  for folder in (tmp_path / 'none', tmp_path):
    assert report.main([str(folder)]) == 1
    message = capsys.readouterr().err
    assert 'has none of config.json' in message and str(folder) in message
