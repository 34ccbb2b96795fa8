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
import dataclasses
import hashlib
import html
import io
import json
import math
from pathlib import Path
import re
import string
import sys
from typing import Any

from matplotlib import image
import numpy as np
from plotly import offline

from qat import charts
from qat import metrics
from qat import sensitivity

FILE = 'report.html'
SAMPLES = 40  # At most; the latest.
SAMPLE_LENGTH = 4000  # Characters of a sample, at most.


@dataclasses.dataclass(frozen=True)
class Run:
  """What the files of a run hold; what is not there is empty.

  Attributes:
    config: config.json.
    series: of metrics.jsonl: key -> steps, values.
    summary: the numbers of summary.json.
    samples: the rows of samples.jsonl.
    sensitivity: the newest analysis.
  """

  config: dict[str, Any]
  series: charts.Series
  summary: dict[str, float]
  samples: list[dict[str, Any]]
  sensitivity: sensitivity.Analysis


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
  content = page(load(workdir))
  path = Path(workdir) / FILE
  with metrics.replacing(path) as file:
    file.write(content.encode())
  return path


def load(workdir: Path) -> Run:
  """Reads the files of a run; raises as `write` does."""
  workdir = Path(workdir)
  names = ('config.json', metrics.FILE, 'summary.json')
  if not any((workdir / name).is_file() for name in names):
    raise FileNotFoundError(
      f'{workdir} has none of {", ".join(names)}; is it the folder of a run?'
    )
  steps = sensitivity.steps(workdir)
  return Run(
    config=_read_object(workdir / 'config.json'),
    series=_series(metrics.read(workdir))
    if (workdir / metrics.FILE).is_file()
    else {},
    summary={
      key: float(value)
      for key, value in _read_object(workdir / 'summary.json').items()
      if isinstance(value, int | float) or value in ('nan', 'inf', '-inf')
    },
    samples=_read_samples(workdir / 'samples.jsonl'),
    sensitivity=sensitivity.load(workdir, steps[-1]) if steps else {},
  )


def page(run: Run) -> str:
  """The whole page about `run`; without the sections it has no data for."""
  numbers = final_numbers(run)
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
      'How much the output of a layer depends on each single weight. In a full-'
      'precision model few weights matter much; plain 1-bit training makes all '
      'matter alike. A method that gives some weights more bits works when '
      'those become the sensitive ones.',
      charts.inequality(run.sensitivity),
      _maps(run.sensitivity),
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
      size = _size(i, len(drawn))
      name = f'chart-{len(figures)}'
      figures[name] = {'data': chart.data, 'layout': chart.layout}
      content.append(
        f'<section class="card {size}"><h3>{chart.title}</h3>'
        f'<p class="caption">{chart.caption}</p>'
        f'<div class="chart" id="{name}"></div></section>'
      )
    content.append('</div>' if drawn else '')
    content.append(more)
  name = _name(run)
  return _fill(
    name,
    f'<header>{_header(run, name, numbers)}<nav>{"".join(links)}</nav></header>'
    f'<main>{"".join(content)}</main>'
    '<footer>Made by qat.report from the files of the run.</footer>',
    figures,
  )


def final_numbers(run: Run) -> dict[str, float]:
  """The summary; of a run that has none yet, the latest of its numbers."""
  if run.summary or not run.series:
    return run.summary
  latest = {key: float(values[-1]) for key, (_, values) in run.series.items()}
  for name in ('tokens', 'tokens_per_s'):
    if f'train/{name}' in latest:
      latest[name] = latest[f'train/{name}']
  latest['steps'] = max(float(steps[-1]) for steps, _ in run.series.values())
  return {key: latest[key] for key, _, _ in metrics.SUMMARY if key in latest}


def main(arguments: Sequence[str]) -> int:
  """The command line; returns the exit status."""
  if len(arguments) != 1:
    print('usage: python -m qat.report WORKDIR', file=sys.stderr)
    return 2
  try:
    print(metrics.printable(str(write(Path(arguments[0])))))
  except (OSError, ValueError) as error:
    print(metrics.printable(str(error)), file=sys.stderr)
    return 1
  return 0


def _text(text: str) -> str:
  """`text` as HTML, in an element or an attribute, that shows it as it is."""
  return html.escape(metrics.printable(text))


def _size(place: int, cards: int) -> str:
  """Two cards a row, and three in the last one where their number is odd."""
  if cards == 1:
    return 'full'
  return 'third' if cards % 2 and place >= cards - 3 else 'half'


def _fill(name: str, body: str, figures: Mapping[str, Any]) -> str:
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
    title=_text(name),
    body=body,
    # JSON has "<" in strings only, where it may be written so; it ends no tag.
    charts=data.replace('<', r'\u003c'),
    plotly=f'<script>{plotly}</script>',
  )


def _name(run: Run) -> str:
  return str(run.config.get('name', 'A run'))


def _header(run: Run, name: str, numbers: Mapping[str, float]) -> str:
  known = {key: (label, form) for key, label, form in metrics.SUMMARY}
  parts = [f'<h1>{_text(name)}</h1>', _about(run, numbers)]
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
    f'<div><dt>{known[key][0]}</dt><dd>{known[key][1](value)}</dd></div>'
    for key, value in sorted(
      ((k, v) for k, v in numbers.items() if k in known),
      key=lambda item: list(known).index(item[0]),
    )
    if not key.endswith('bits_per_byte')
  ]
  if tiles:
    parts.append(f'<dl class="tiles">{"".join(tiles)}</dl>')
  return ''.join(parts)


def _about(run: Run, numbers: Mapping[str, float]) -> str:
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
  parts = [f'<p class="soft">{_text(" · ".join(facts))}</p>'] if facts else []
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


def _maps(analysis: sensitivity.Analysis) -> str:
  """Pictures of the first, the middle and the last block's layers."""
  blocks = sorted({charts.split(path)[0] for path in analysis} - {None})
  chosen = {blocks[i] for i in (0, len(blocks) // 2, -1)} if blocks else set()
  paths = [
    path
    for path in analysis
    # Of experts, the first speaks for all.
    if charts.split(path)[0] in chosen and not re.search(r'/[1-9]\d*$', path)
  ]
  if not paths:
    return ''
  low, high = sensitivity.color_range(
    [analysis[path][kind] for path in paths for kind in sensitivity.KINDS]
  )
  ramp = _picture(np.linspace(low, high, 96)[None], low, high)
  ends = [
    metrics.count(10**end) if end >= 0 else f'{10**end:.2g}'
    for end in (low, high)
  ]
  parts = [
    '<h3 class="maps">Maps</h3><p class="intro caption">Sensitivity of single '
    'weights, relative to the mean of their layer: outputs from top to bottom, '
    'inputs from left to right, the largest of each window. Points and lines '
    'stand out where few weights matter.</p>'
    f'<p class="scale"><span>× {ends[0]}</span><img alt="colour scale" '
    f'src="{ramp}"><span>× {ends[1]}</span></p>'
  ]
  for block in sorted(chosen, reverse=True):
    cards = []
    for path in paths:
      if charts.split(path)[0] != block:
        continue
      pair = ''
      for kind in sensitivity.KINDS:
        stats = analysis[path][kind]
        pair += (
          f'<figure><img alt="map of the {kind} weights" '
          f'src="{_picture(stats.map_NK, low, high)}"><figcaption>{kind}<br>'
          f'Gini {stats.gini:.2f}<br>top 1 % holds {100 * stats.top1:.0f} %'
          '</figcaption></figure>'
        )
      cards.append(
        f'<section class="card third"><h3>{_text(charts.split(path)[1])}</h3>'
        f'<div class="pair">{pair}</div></section>'
      )
    parts.append(
      f'<details{" open" if block == max(chosen) else ""}><summary>Block '
      f'{block}</summary><div class="grid">{"".join(cards)}</div></details>'
    )
  return ''.join(parts)


def _picture(map_NK: np.ndarray, low: float, high: float) -> str:
  """A map as a PNG in a data address."""
  # 48 shades look like all of them, in a third of the bytes.
  levels = np.clip((map_NK.astype(np.float32) - low) / (high - low), 0, 1)
  levels = np.round(levels * 47) / 47
  file = io.BytesIO()
  image.imsave(file, levels, vmin=0, vmax=1, cmap='magma', format='png')
  return f'data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}'


def _samples(samples: Sequence[Mapping[str, Any]]) -> str:
  if not samples:
    return ''
  latest = max(row['step'] for row in samples)
  parts = {True: [], False: []}
  for row in samples[-SAMPLES:]:
    text = row['text'].removeprefix(row['prompt'])[:SAMPLE_LENGTH]
    parts[row['step'] == latest].append(
      f'<div class="sample"><p class="caption">step {row["step"]:,}</p>'
      f'<blockquote><b>{_text(row["prompt"])}</b>{_text(text)}'
      '</blockquote></div>'
    )
  earlier = ''
  if parts[False]:
    earlier = (
      '<details><summary>Earlier samples</summary>'
      f'{"".join(parts[False])}</details>'
    )
  return f'<div class="card">{"".join(parts[True])}{earlier}</div>'


def _details(run: Run) -> str:
  return ''.join(
    f'<details><summary>{title}</summary><pre>'
    f'{_text(json.dumps(content, indent=2, ensure_ascii=False))}'
    '</pre></details>'
    for title, content in (
      ('All final numbers', run.summary),
      ('Resolved configuration', run.config),
    )
    if content
  )


def _series(rows: Sequence[Mapping[str, Any]]) -> charts.Series:
  columns: dict[str, tuple[list[int], list[float]]] = {}
  for row in rows:
    for key, value in row.items():
      if key not in ('step', 'time') and isinstance(value, float):
        steps, values = columns.setdefault(key, ([], []))
        steps.append(row['step'])
        values.append(value)
  return {
    key: (np.array(steps), np.array(values))
    for key, (steps, values) in columns.items()
  }


def _read_object(path: Path) -> dict[str, Any]:
  if not path.is_file():
    return {}
  try:
    content = json.loads(path.read_bytes())
    if not isinstance(content, dict):
      raise ValueError('it is not an object')
  except (ValueError, RecursionError) as error:
    raise ValueError(
      f'{path} is damaged: {error}. Move it away for a report without it.'
    ) from error
  return content


def _read_samples(path: Path) -> list[dict[str, Any]]:
  if not path.is_file():
    return []
  rows = metrics.read_rows(path)
  for row in rows:
    if not all(isinstance(row.get(key), str) for key in ('prompt', 'text')):
      raise ValueError(
        f'{path} is damaged: its row of step {row["step"]} lacks the texts '
        '"prompt" and "text". Move it away for a report without it.'
      )
  return rows


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
