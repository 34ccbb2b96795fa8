"""One self-contained page about a run, made from the files of its folder.

  python -m qat.report WORKDIR

The page needs no network: plotly's JavaScript stands in it, and its content
policy forbids every request. Names, prompts and samples are untrusted: what
reaches the page is escaped, and only the two scripts of the template, known
to the policy by their digests, can run.
"""

import base64
from collections.abc import Mapping
from collections.abc import Sequence
import hashlib
import json
import math
from pathlib import Path
import re
import string
import sys
from typing import Any

import numpy as np
from plotly import offline

from qat import charts
from qat import display
from qat import history
from qat import metrics
from qat import plots
from qat import sensitivity_pictures

FILE = 'report.html'
SAMPLES = 40  # At most; the latest.
SAMPLE_LENGTH = 4000  # Characters of a sample, at most.


def write(workdir: Path) -> Path:
  """Writes report.html from the files in `workdir`.

  Args:
    workdir: folder of a run, finished or not.

  Returns:
    The path of the page.

  Raises:
    FileNotFoundError: the folder, or every file of a run in it, is missing.
    ValueError: a file is damaged; the message names it.
  """
  content = page(history.load(workdir))
  path = Path(workdir) / FILE
  with metrics.replacing(path) as file:
    file.write(content.encode())
  return path


def page(run: history.Run) -> str:
  """The whole page about `run`; without the sections it has no data for."""
  numbers = history.final_numbers(run)
  sections = (
    ('Learning', '', charts.learning(run.series, numbers), ''),
    (
      'Low-bit health',
      'What happens to the codes behind the loss.',
      charts.health(run.series),
      '',
    ),
    (
      'Sensitivity',
      'How much the output of a layer depends on each single weight. The paper '
      'of pQuant finds that few matter much in full precision and that all '
      'matter alike after plain 1-bit training. A method that gives some '
      'weights more bits works when those become the sensitive ones.',
      sensitivity_pictures.charts(run.sensitivity),
      sensitivity_pictures.maps(run.sensitivity),
    ),
    ('Samples', '', [], _samples(run.samples)),
    ('Details', '', [], _details(run)),
  )
  figures: dict[str, Any] = {}
  content, links = [], []
  for title, intro, drawn, more in sections:
    if not drawn and not more:
      continue
    anchor = title.split()[0].lower()
    links.append(f'<a href="#{anchor}">{title}</a>')
    content.append(f'<h2 id="{anchor}">{title}</h2>')
    content.append(f'<p class="intro">{intro}</p>' if intro else '')
    content.append('<div class="grid">' if drawn else '')
    for i, chart in enumerate(drawn):
      # Two a row; the last one, when it is alone in its row, as wide as both.
      size = 'full' if i == len(drawn) - 1 and i % 2 == 0 else 'half'
      name = f'chart-{len(figures)}'
      figures[name] = {'data': chart.data, 'layout': chart.layout}
      content.append(card(chart, name, size))
    content.append('</div>' if drawn else '')
    content.append(more)
  name = str(_setting(run.config, 'name') or 'A run')
  return fill(
    name,
    f'<header>{_header(run, name, numbers)}<nav>{"".join(links)}</nav></header>'
    f'<main>{"".join(content)}</main>'
    '<footer>Made by qat.report from the files of the run.</footer>',
    figures,
  )


def main(arguments: Sequence[str]) -> int:
  """The command line; returns the exit status."""
  if len(arguments) != 1:
    print('usage: python -m qat.report WORKDIR', file=sys.stderr)
    return 2
  try:
    print(display.printable(str(write(Path(arguments[0])))))
  except (OSError, ValueError) as error:
    print(display.printable(str(error)), file=sys.stderr)
    return 1
  return 0


def card(chart: plots.Chart, name: str, size: str) -> str:
  """A chart's place on a page: 'half' or 'full' as wide; `fill` draws it."""
  return (
    f'<section class="card {size}"><h3>{chart.title}</h3>'
    f'<p class="caption">{chart.caption}</p>'
    f'<div class="chart" id="{name}"></div></section>'
  )


def fill(name: str, body: str, figures: Mapping[str, Any]) -> str:
  """A whole page: the template with a title, a body and plotly's figures."""
  template = Path(__file__).with_name('report.html').read_text('utf-8')
  plotly = offline.get_plotlyjs().replace('\r\n', '\n')
  draw = re.search(r'<script>(.*?)</script>', template, re.DOTALL)[1]
  digests = ' '.join(
    f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'"
    for s in (plotly, draw)
  )
  data = json.dumps(figures, allow_nan=False, separators=(',', ':'))
  return string.Template(template).substitute(
    policy=f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
    f'script-src {digests}',
    title=display.as_html(name),
    body=body,
    # JSON has "<" in strings only, where it may be written so; it ends no tag.
    charts=data.replace('<', r'\u003c'),
    plotly=f'<script>{plotly}</script>',
  )


def _header(run: history.Run, name: str, numbers: Mapping[str, float]) -> str:
  parts = [f'<h1>{display.as_html(name)}</h1>', _about(run, numbers)]
  ours = numbers.get('eval/bits_per_byte')
  if ours is not None:
    bars = {'this run': ours}
    for other in ('gzip', 'unigram'):
      if f'baseline/{other}_bits_per_byte' in numbers:
        bars[other] = numbers[f'baseline/{other}_bits_per_byte']
    parts.append(
      '<div class="card hero"><div><p class="soft">validation bits per byte</p>'
      f'<p class="big">{ours:.3f}</p><p class="soft">{_verdict(bars)}</p></div>'
      f'<div>{_bars(bars)}</div></div>'
    )
  tiles = [
    f'<div><dt>{label}</dt><dd>{form(numbers[key])}</dd></div>'
    for key, label, form in display.SUMMARY
    if key in numbers and not key.endswith('bits_per_byte')
  ]
  if tiles:
    parts.append(f'<dl class="tiles">{"".join(tiles)}</dl>')
  return ''.join(parts)


def _about(run: history.Run, numbers: Mapping[str, float]) -> str:
  """A line on what was run, and warnings about how it went."""
  facts = [
    form.format(value)
    for path, form in (
      ('model.ffn', '{} feed-forward'),
      ('model.n_layers', '{} layers'),
      ('model.d_model', 'width {}'),
      ('model.n_experts', '{} narrow experts'),
      ('data.dataset', 'on {}'),
    )
    if (value := _setting(run.config, path)) not in (None, 1)
  ]
  parts = [f'<p class="soft">{display.as_html(" · ".join(facts))}</p>']
  total = _setting(run.config, 'train.steps')
  done = numbers.get('steps')
  if isinstance(total, int) and done is not None and done < total:
    parts.append(
      f'<p class="warn">Not complete: {done:,.0f} of {total:,} steps.</p>'
    )
  for key, what in (('train/loss', 'training'), ('eval/loss', 'validation')):
    steps, values = run.series.get(key, (np.zeros(0), np.zeros(0)))
    broken = steps[~np.isfinite(values)]
    if broken.size:
      parts.append(
        f'<p class="warn">The {what} loss was not finite {broken.size:,} '
        f'times, first at step {broken[0]:,}.</p>'
      )
  return ''.join(parts)


def _setting(config: Mapping[str, Any], path: str) -> str | float | None:
  """A value of the config; None where an older run has no such field."""
  value: Any = config
  for part in path.split('.'):
    value = value.get(part) if isinstance(value, dict) else None
  return value if isinstance(value, str | int | float) else None


def _verdict(bars: Mapping[str, float]) -> str:
  ours = bars['this run']
  parts = []
  for other in ('gzip', 'unigram'):
    if bars.get(other, 0) > 0 and math.isfinite(ours):
      less = 100 * (1 - ours / bars[other])
      word = 'less' if less >= 0 else 'more'
      parts.append(f'{abs(less):.0f} % {word} than {other}')
  return ', '.join(parts) or 'lower is better'


def _bars(bars: Mapping[str, float]) -> str:
  finite = [value for value in bars.values() if math.isfinite(value)]
  longest = max(finite, default=0)
  rows = []
  for name, value in bars.items():
    share = value / longest if longest > 0 and math.isfinite(value) else 0
    rows.append(
      f'<div class="bar{" ours" if name == "this run" else ""}">'
      f'<span>{name}</span><i style="width:{100 * max(share, 0):.1f}%"></i>'
      f'<b>{value:.2f}</b></div>'
    )
  return ''.join(rows)


def _samples(samples: Sequence[Mapping[str, Any]]) -> str:
  if not samples:
    return ''
  latest = max(row['step'] for row in samples)
  parts = {True: [], False: []}
  for row in samples[-SAMPLES:]:
    prompt = display.as_html(row['prompt'])
    text = row['text'].removeprefix(row['prompt'])[:SAMPLE_LENGTH]
    parts[row['step'] == latest].append(
      f'<div class="sample"><p class="caption">step {row["step"]:,}</p>'
      f'<blockquote><b>{prompt}</b>{display.as_html(text)}</blockquote></div>'
    )
  earlier = ''
  if parts[False]:
    earlier = (
      '<details><summary>Earlier samples</summary>'
      f'{"".join(parts[False])}</details>'
    )
  return f'<div class="card">{"".join(parts[True])}{earlier}</div>'


def _details(run: history.Run) -> str:
  return ''.join(
    f'<details><summary>{title}</summary><pre>'
    f'{display.as_html(json.dumps(content, indent=2, ensure_ascii=False))}'
    '</pre></details>'
    for title, content in (
      ('All final numbers', run.summary),
      ('Resolved configuration', run.config),
    )
    if content
  )


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
