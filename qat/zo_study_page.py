"""One self-contained page on forward passes against backpropagation.

It is of the form of a run's report, and needs no network either.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import math
from typing import Any

import numpy as np

from qat import display
from qat import plots
from qat import report
from qat import zo_curves
from qat import zo_study

_STYLE = """<style>
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .875rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: 5px 8px; text-align: right;
  border-bottom: 1px solid var(--line); }
th[scope=row] { text-align: left; font-weight: 400; overflow-wrap: anywhere; }
</style>"""


def page(
  studies: Mapping[str, zo_study.Study], curves: Sequence[zo_curves.Curve]
) -> str:
  """The page as HTML.

  Args:
    studies: by the name of a model; may be empty.
    curves: of runs; may be empty.
  """
  parts, figures = [], {}
  for title, intro, lines, drawn in (
    (
      'Directions',
      'Slopes of the quantized loss along random directions beside the '
      'straight-through gradient. Their correlation over directions is the '
      'cosine of that gradient and the gradient of the smoothed loss.',
      study_lines(studies),
      [*_agreement_charts(studies), *_cosine_charts(studies)],
    ),
    (
      'Runs',
      'Validation loss, nats per token; of training alone, without the time '
      'of evaluation and saving.',
      run_lines(curves),
      _curve_charts(curves),
    ),
  ):
    if not drawn:
      continue
    parts.append(f'<h2>{title}</h2><p class="intro">{intro}</p>')
    parts.append(_table(*lines))
    parts.append('<div class="grid">')
    for chart in drawn:
      name = f'chart-{len(figures)}'
      figures[name] = {'data': chart.data, 'layout': chart.layout}
      parts.append(report.card(chart, name, 'half'))
    parts.append('</div>')
  return report.fill(
    'Forward passes against backpropagation',
    f'{_STYLE}<header><h1>Forward passes against backpropagation</h1></header>'
    f'<main>{"".join(parts)}</main>'
    '<footer>Made by scripts/zo_study.py.</footer>',
    figures,
  )


Lines = tuple[tuple[str, ...], list[tuple[str, ...]]]


def study_lines(studies: Mapping[str, zo_study.Study]) -> Lines:
  """Heads and rows of the table of directions, as texts."""
  rows = []
  for name, made in studies.items():
    for eps, found in made.agreements.items():
      rows.append(
        (
          f'{name}, eps {eps:g}',
          display.count(made.parameters),
          f'{made.loss:.4f}',
          f'{found.correlation:.3f} ± {found.error:.3f}',
          f'{found.ratio:.3g}',
        )
      )
    for c in made.cosines:
      rows.append(
        (
          f'{name}, {c.directions} direction(s)',
          display.count(made.parameters),
          '',
          f'{c.mean:.2e}, expected {c.expected:.2e}',
          f'{c.mean / c.expected:.3g}',
        )
      )
  heads = ('', 'parameters', 'loss', 'correlation, or cosine', 'ratio')
  return heads, rows


def run_lines(curves: Sequence[zo_curves.Curve]) -> Lines:
  """Heads and rows of the table of runs, as texts."""
  heads = ('run', 'steps', 's a step', 'equal steps', 'equal time', 'final')
  if not curves:
    return heads, []
  return heads, [
    (
      row.name,
      f'{row.steps:,}',
      f'{row.seconds / row.steps:.3g}',
      *(
        '-' if math.isnan(x) else f'{x:.4f}'
        for x in (row.at_step, row.at_time, row.final)
      ),
    )
    for row in zo_curves.compare(curves)
  ]


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  head = ''.join(f'<th>{display.as_html(h)}</th>' for h in heads)
  body = ''.join(
    f'<tr><th scope="row">{display.as_html(first)}</th>'
    + ''.join(f'<td>{display.as_html(cell)}</td>' for cell in rest)
    + '</tr>'
    for first, *rest in rows
  )
  return (
    f'<div class="wide"><table><thead><tr>{head}</tr></thead>'
    f'<tbody>{body}</tbody></table></div>'
  )


def _color(i: int) -> str:
  return plots.PALETTE[i % len(plots.PALETTE)]


def _agreement_charts(
  studies: Mapping[str, zo_study.Study],
) -> list[plots.Chart]:
  """A cloud for each distance: a point is a direction."""
  charts = []
  distances = sorted({eps for made in studies.values() for eps in made.slopes})
  for eps in distances:
    data: list[dict[str, Any]] = []
    for i, (name, made) in enumerate(studies.items()):
      if eps in made.slopes:
        points = made.straight_through, made.slopes[eps]
        data.append(plots.line(name, *points, color=_color(i), mode='markers'))
    ends = np.array(
      [
        f(m.straight_through)
        for m in studies.values()
        for f in (np.min, np.max)
      ]
    )
    data.append(plots.line('equal', ends, ends, color=plots.FAINT, width=1))
    charts.append(
      plots.Chart(
        f'Slopes at eps {eps:g}',
        'Upwards the slope of the quantized loss, to the right that of the '
        'straight-through gradient, of the same direction. On the line they '
        'are equal; a cloud without a tilt says that they have nothing in '
        'common.',
        data,
        plots.layout(
          hovermode='closest',
          xaxis={'title': {'text': 'straight-through'}},
          yaxis={'title': {'text': 'loss'}},
        ),
      )
    )
  return charts


def _cosine_charts(studies: Mapping[str, zo_study.Study]) -> list[plots.Chart]:
  if not studies:
    return []
  data = []
  for i, (name, made) in enumerate(studies.items()):
    q, mean, expected = np.array(
      [(c.directions, c.mean, c.expected) for c in made.cosines]
    ).T
    look = dict(color=_color(i))
    data.append(plots.line(name, q, mean, mode='lines+markers', **look))
    data.append(
      plots.line(f'{name}, expected', q, expected, dash='dot', width=1, **look)
    )
  return [
    plots.Chart(
      'Cosine of estimate and gradient',
      'Of the mean over directions and the straight-through gradient. It grows '
      'with the root of the directions; dotted, what an exact gradient would '
      'have.',
      data,
      plots.layout(
        xaxis={'title': {'text': 'directions'}, 'type': 'log'},
        yaxis={'exponentformat': 'e'},
      ),
    )
  ]


def _curve_charts(curves: Sequence[zo_curves.Curve]) -> list[plots.Chart]:
  if not curves:
    return []
  charts = []
  for title, axis, train_x, eval_x in (
    ('At equal steps', 'step', 'steps', 'eval_steps'),
    ('At equal time', 'seconds of training', 'seconds', 'eval_seconds'),
  ):
    data = []
    for i, curve in enumerate(curves):
      x, y = getattr(curve, train_x), plots.smooth(curve.losses)
      faint = plots.line(
        f'{curve.name}, training', *plots.thin(x, y), color=_color(i), width=1
      )
      x = getattr(curve, eval_x)
      known = plots.line(
        curve.name, x, curve.eval_losses, color=_color(i), mode='lines+markers'
      )
      data += [faint | {'opacity': 0.45}, known]
    charts.append(
      plots.Chart(
        title,
        'Validation loss with marks, and faint the average of the training '
        'loss, in nats per token; lower is better.',
        data,
        plots.layout(xaxis={'title': {'text': axis}}),
      )
    )
  return charts
