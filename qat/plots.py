"""The parts of the report's charts, as plain plotly figures.

The page supplies the colours of its theme and the fonts. Plotly reads tags and
entities in its texts, so every name passes through `escaped` first.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import html
import re
from typing import Any

import numpy as np
from plotly import colors

from qat import display

POINTS = 800  # Of a curve, at most; its extremes are kept.
COLUMNS = 100  # Steps of a heat map, at most; neighbours are averaged.
LABELS = 48  # Rows of a heat map that each have a name; more: one a block.

ACCENT, FAINT = '#14a08f', 'rgba(128,128,128,.32)'
PALETTE = ('#6366f1', '#14a08f', '#e08a00', '#db2777', '#0284c7', '#78716c')
# Of the first, the middle and the last block; readable on white and on black.
DEPTH = ((0, '#6366f1'), (0.5, '#14a08f'), (1, '#f0a020'))

Series = Mapping[str, tuple[np.ndarray, np.ndarray]]  # key -> steps, values


@dataclasses.dataclass(frozen=True)
class Chart:
  """A plotly figure with the words around it.

  Attributes:
    title: what is drawn.
    caption: how to read it, and what is good.
    data: plotly's traces.
    layout: plotly's layout.
  """

  title: str
  caption: str
  data: list[dict[str, Any]]
  layout: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Table:
  """Series of one kind at common steps.

  Attributes:
    names: of the rows, blocks in order.
    steps: of the columns.
    values: [rows, columns]; NaN where there is none.
  """

  names: list[str]
  steps: np.ndarray
  values: np.ndarray


def escaped(text: str) -> str:
  """`text` for plotly to show as it is, without control characters."""
  # Plotly knows the entities of these three only.
  return html.escape(display.printable(text), quote=False)


def short(text: str) -> str:
  """As `escaped`, of a start that leaves room for the chart."""
  return escaped(text if len(text) <= 40 else f'{text[:40]}…')


def split(path: str) -> tuple[int | None, str]:
  """The number of a path's block and the rest; None outside the blocks."""
  match = re.fullmatch(r'block_(\d{1,6})(?:/(.*))?', path, re.DOTALL)
  return (int(match[1]), match[2] or '') if match else (None, path)


def thin(
  steps: np.ndarray, values: np.ndarray, points: int = POINTS
) -> tuple[np.ndarray, np.ndarray]:
  """At most `points` of a curve: the extremes of each stretch, and the ends.

  A value that is not finite stays, as a gap, where its whole stretch is so.
  """
  if len(steps) <= points:
    return steps, values
  kept = {0, len(steps) - 1}
  for part in np.array_split(np.arange(len(steps)), points // 2 - 1):
    finite = part[np.isfinite(values[part])]
    if finite.size:
      kept.add(finite[values[finite].argmin()])
      kept.add(finite[values[finite].argmax()])
    else:
      kept.add(part[0])
  order = sorted(kept)
  return steps[order], values[order]


def smooth(values: np.ndarray) -> np.ndarray:
  """The mean over a centred window, a fiftieth of the curve; skips gaps.

  Towards the ends the window shrinks, so that a steep curve keeps its ends.
  """
  places = np.arange(len(values))
  reach = np.minimum(places, places[::-1]).clip(max=max(2, len(values) // 100))
  finite = np.isfinite(values)
  total = np.cumsum(np.r_[0, np.where(finite, values, 0)])
  count = np.cumsum(np.r_[0, finite])
  first, end = places - reach, places + reach + 1
  return _ratio(total[end] - total[first], count[end] - count[first])


def table(series: Series, prefix: str) -> Table | None:
  """The series under `prefix` as rows; None when there is none."""
  found = {
    key.removeprefix(prefix): value
    for key, value in series.items()
    if key.startswith(prefix)
  }
  if not found:
    return None
  # Stable: within a block, the order of the log. Outside of blocks: last.
  names = sorted(
    found, key=lambda name: (split(name)[0] is None, split(name)[0] or 0)
  )
  steps = np.unique(np.concatenate([at for at, _ in found.values()]))
  values = np.full((len(names), len(steps)), np.nan)
  for row, name in zip(values, names, strict=True):
    at, numbers = found[name]
    row[np.searchsorted(steps, at)] = numbers
  groups = np.array_split(np.arange(len(steps)), min(len(steps), COLUMNS))
  finite = np.isfinite(values)
  values = np.where(finite, values, 0)
  columns = [_ratio(values[:, g].sum(1), finite[:, g].sum(1)) for g in groups]
  return Table(names, steps[[g[-1] for g in groups]], np.stack(columns, 1))


def line(
  name: str,
  x: np.ndarray,
  y: np.ndarray,
  *,
  color: str = ACCENT,
  width: float = 2,
  dash: str = 'solid',
  mode: str = 'lines',
) -> dict[str, Any]:
  """A curve; values that are not finite are gaps."""
  return {
    'type': 'scatter',
    'mode': mode,
    'name': short(name),
    'x': plain(x),
    'y': plain(y),
    'line': {'color': color, 'width': width, 'dash': dash},
    'marker': {'size': 5},
  }


def heat(
  rows: Table,
  values: np.ndarray,
  shown: np.ndarray,
  form: str,
  *,
  colorbar: Mapping[str, Any] | None = None,
  **options: Any,
) -> dict[str, Any]:
  """A heat map of `values`, with what is `shown`, formatted, on hover."""
  return {
    'type': 'heatmap',
    'x': plain(rows.steps),
    'y': [escaped(name) for name in rows.names],
    'z': [plain(row) for row in values],
    'customdata': [plain(row) for row in shown],
    'hovertemplate': (
      f'%{{y}}<br>step %{{x}}<br>%{{customdata:{form}}}<extra></extra>'
    ),
    'colorscale': 'Viridis',
    'colorbar': {
      'orientation': 'h',
      'y': 1.0,
      'yanchor': 'bottom',
      'thickness': 8,
      'outlinewidth': 0,
      'tickformat': form,
      'nticks': 5,
      **(colorbar or {}),
    },
    **options,
  }


def layout(
  *,
  xaxis: Mapping[str, Any] | None = None,
  yaxis: Mapping[str, Any] | None = None,
  **options: Any,
) -> dict[str, Any]:
  """What the charts share: steps to the right, the legend below."""
  return {
    'height': 280,
    'margin': {'l': 8, 'r': 8, 't': 8, 'b': 40},
    'hovermode': 'x unified',
    'legend': {'orientation': 'h', 'x': 0, 'y': 1.02, 'yanchor': 'bottom'},
    'xaxis': {
      'title': {'text': 'step'},
      'zeroline': False,
      'nticks': 6,
      **(xaxis or {}),
    },
    'yaxis': {
      'automargin': True,
      'zeroline': False,
      'nticks': 6,
      **(yaxis or {}),
    },
    **options,
  }


def stacked(figure: Mapping[str, Any]) -> dict[str, Any]:
  """A layout of two y axes, one above the other, over one of steps."""
  return {
    **figure,
    'xaxis': figure['xaxis'] | {'anchor': 'y2'},
    'yaxis': figure['yaxis'] | {'domain': [0.56, 1]},
    'yaxis2': figure['yaxis'] | {'domain': [0, 0.44]},
  }


def heat_layout(rows: Table) -> dict[str, Any]:
  """The layout of a heat map: first row on top, short names at the left."""
  places, labels = [], []
  previous = None
  for name in rows.names:
    block, rest = split(name)
    rest = f'expert {rest}' if rest.isdigit() else rest
    if len(rows.names) <= LABELS or block is None:
      text = rest if block is None else f'{block} {rest}'
    elif block != previous:
      text = f'block {block}'
    else:
      continue
    previous = block
    places.append(escaped(name))
    labels.append(short(text))
  return layout(
    height=110 + min(14 * len(rows.names), 640),
    hovermode='closest',
    margin={'l': 8, 'r': 8, 't': 40, 'b': 40},
    xaxis={'showgrid': False},
    yaxis={
      'type': 'category',
      'autorange': 'reversed',
      'tickvals': places,
      'ticktext': labels,
      'tickfont': {'size': 10},
      'showgrid': False,
    },
  )


def plain(values: Sequence[float] | np.ndarray) -> list[float | None]:
  """Numbers for JSON: five digits; None where they are not finite."""
  return [
    float(f'{value:.5g}') if np.isfinite(value) else None for value in values
  ]


def by_depth(rows: Table) -> list[dict[str, Any]]:
  """A line a row, coloured from the first to the last."""
  places = np.linspace(0, 1, len(rows.names))
  shades = colors.sample_colorscale(
    [list(stop) for stop in DEPTH], list(places)
  )
  return [
    line(name.replace('_', ' '), rows.steps, row, color=shade, width=1.6)
    for name, row, shade in zip(rows.names, rows.values, shades, strict=True)
  ]


def _ratio(total: np.ndarray, count: np.ndarray) -> np.ndarray:
  return np.where(count > 0, total / np.maximum(count, 1), np.nan)
