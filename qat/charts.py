"""The charts of the report, as plain plotly figures: series in, dicts out.

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

from qat import metrics
from qat import sensitivity

POINTS = 800  # Of a curve, at most; its extremes are kept.
COLUMNS = 100  # Steps of a heat map, at most; neighbours are averaged.
LABELS = 48  # Rows of a heat map that each have a name; more: one a block.

ACCENT, FAINT = '#14a08f', 'rgba(128,128,128,.32)'
PALETTE = ('#6366f1', '#14a08f', '#e08a00', '#db2777', '#0284c7', '#78716c')
SYMBOLS = ('circle', 'square', 'diamond-open', 'triangle-up', 'cross')
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


def learning(series: Series, numbers: Mapping[str, float]) -> list[Chart]:
  """Losses, bits per byte, the schedule, gradients and speed.

  Args:
    series: of metrics.jsonl.
    numbers: final ones; baselines among them are drawn as lines.
  """
  charts = []
  if 'train/loss' in series:
    charts.append(
      Chart(
        'Training loss',
        'Nats per token of the batches as they come (faint), and the average. '
        'Falling smoothly is good; a spike that does not come back is not.',
        _noisy(*series['train/loss']),
        layout(),
      )
    )
  if 'eval/bits_per_byte' in series:
    steps, values = thin(*series['eval/bits_per_byte'])
    data = [line('this run', steps, values, mode='lines+markers')]
    for name, color in (('gzip', PALETTE[2]), ('unigram', PALETTE[5])):
      key = f'baseline/{name}_bits_per_byte'
      if key in numbers:
        ends = np.array([steps[0], steps[-1]])
        level = np.full(2, numbers[key])
        data.append(line(name, ends, level, color=color, dash='dot'))
    charts.append(
      Chart(
        'Validation bits per byte',
        'What the model needs to encode text it has not seen; lower is better. '
        'Unigram knows only how frequent each byte is.',
        data,
        layout(),
      )
    )
  charts += _schedule(series)
  for key, title, caption, axis in (
    (
      'train/grad_norm',
      'Gradient norm',
      'Before clipping, on a logarithmic axis. Level or slowly changing is '
      'good; sudden peaks announce spikes of the loss.',
      {'type': 'log', 'dtick': 'D2'},
    ),
    (
      'train/tokens_per_s',
      'Tokens per second',
      'Training throughput. Level is good; sagging says that something other '
      'than the step, such as the loader, takes the time.',
      {'rangemode': 'tozero'},
    ),
  ):
    if key in series:
      data = _noisy(*series[key])
      charts.append(Chart(title, caption, data, layout(yaxis=axis)))
  return charts


def _noisy(steps: np.ndarray, values: np.ndarray) -> list[dict[str, Any]]:
  return [
    line('as measured', *thin(steps, values), color=FAINT, width=1),
    line('average', *thin(steps, smooth(values))),
  ]


def _schedule(series: Series) -> list[Chart]:
  names = {'train/lr': 'learning rate', 'train/weight_decay': 'weight decay'}
  keys = [key for key in names if key in series]
  data = [
    line(names[key], *thin(*series[key]), color=PALETTE[i])
    | {'yaxis': ('y', 'y2')[i]}
    for i, key in enumerate(keys)
  ]
  figure = layout(yaxis={'rangemode': 'tozero'})
  if len(keys) == 2:  # One above the other, on one axis of steps.
    figure['yaxis2'] = figure['yaxis'] | {'domain': [0, 0.34]}
    figure['yaxis'] = figure['yaxis'] | {'domain': [0.48, 1]}
    figure['xaxis']['anchor'] = 'y2'
  caption = (
    'What the optimizer was told to do. A bend here explains a bend in the '
    'loss.'
  )
  return [Chart('Schedule', caption, data, figure)] if data else []


def health(series: Series) -> list[Chart]:
  """Codes that flip, scales that drift, branches and experts."""
  charts = []
  flips = table(series, 'health/flips/')
  if flips:
    logs = np.log10(np.where(flips.values > 0, flips.values, np.nan))
    charts.append(
      Chart(
        'Flips',
        'Share of the weights whose code changed in one step, by layer. Busy '
        'at a high learning rate and quiet towards the end is good; a gap is '
        'a layer where nothing flipped.',
        [heat(flips, logs, flips.values, '.2%', **_percent_ticks(logs))],
        heat_layout(flips),
      )
    )
  scale = table(series, 'health/scale/')
  if scale:
    first = scale.values[:, :1]
    drift = scale.values / np.where(first == 0, np.nan, first)
    charts.append(
      Chart(
        'Scale, relative to its start',
        'Distance between the low-bit values of a layer. Slow drift is normal; '
        'a layer that leaves its neighbours is worth a look.',
        [heat(scale, drift, drift, '.3f', **_around_one(drift, 0.05))],
        heat_layout(scale),
      )
    )
  zeros = table(
    {key: pair for key, pair in series.items() if np.any(pair[1] > 0)},
    'health/zeros/',
  )
  if zeros:
    charts.append(
      Chart(
        'Zeros',
        'Share of the weights whose code is 0, in the layers that have any. A '
        'third is usual for ternary weights; close to all is a dying layer.',
        [
          heat(
            zeros,
            zeros.values,
            zeros.values,
            '.1%',
            zmin=0,
            zmax=max(0.01, _largest(zeros.values)),
          )
        ],
        heat_layout(zeros),
      )
    )
  load = table(series, 'health/expert_load/')
  if load:
    groups = [name.rpartition('/')[0] for name in load.names]
    experts = np.array([groups.count(group) for group in groups])
    relative = load.values * experts[:, None]
    charts.append(
      Chart(
        'Load of the experts',
        'Share of the tokens an expert gets, times the number of experts: 1 is '
        'an even share, and 0 an expert that learns nothing.',
        [
          heat(load, relative, load.values, '.1%', **_around_one(relative, 0.5))
        ],
        heat_layout(load),
      )
    )
  charts += _branches(series)
  entropy = table(series, 'health/router_entropy/')
  if entropy:
    charts.append(
      Chart(
        'Entropy of the router',
        'Nats per token, from the first block (violet) to the last (amber). It '
        'starts near the logarithm of the number of experts, undecided, and '
        'should fall slowly; at once means that routing froze.',
        by_depth(entropy),
        layout(showlegend=1 < len(entropy.names) <= 8, height=420),
      )
    )
  return charts


def _branches(series: Series) -> list[Chart]:
  found = [table(series, f'health/{key}/') for key in ('alpha', 'beta')]
  rows = [each for each in found if each]
  figure = layout(
    showlegend=any(1 < len(each.names) <= 8 for each in rows),
    height=420,
    yaxis={'title': {'text': 'alpha' if found[0] else 'beta'}},
  )
  data = by_depth(rows[0]) if rows else []
  if len(rows) == 2:  # One above the other, on one axis of steps.
    figure['yaxis'] |= {'domain': [0.54, 1]}
    figure['yaxis2'] = figure['yaxis'] | {
      'title': {'text': 'beta'},
      'domain': [0, 0.46],
    }
    figure['xaxis']['anchor'] = 'y2'
    data += [
      trace | {'yaxis': 'y2', 'showlegend': False}
      for trace in by_depth(rows[1])
    ]
  caption = (
    'Alpha scales the narrow branch and beta the wide one, from the first '
    'block (violet) to the last (amber). Alpha above beta lets the branch with '
    'more bits carry what matters; beta at 0 would be an unused branch.'
  )
  return (
    [Chart('Scales of the branches', caption, data, figure)] if data else []
  )


def inequality(analysis: sensitivity.Analysis) -> list[Chart]:
  """The Gini coefficient of every layer, latent and quantized."""
  charts = []
  for kind, title, caption in (
    (
      'latent',
      'Inequality of the latent weights',
      'Gini coefficient of the sensitivities: 0 when all weights matter alike, '
      'near 1 when few do. Higher in a precise branch than in a 1-bit one is '
      'the division of labour that mixed precision is after.',
    ),
    (
      'quantized',
      'Inequality of the quantized weights',
      'The same of the weights that the forward pass uses. All binary weights '
      'have one size, so only their inputs make them unequal here.',
    ),
  ):
    groups: dict[str, dict[int, list[float]]] = {}
    for path, kinds in analysis.items():
      block, rest = split(path)
      if block is not None:
        rest = re.sub(r'/\d+$', '', rest)  # Experts share a line.
        by_block = groups.setdefault(rest, {})
        by_block.setdefault(block, []).append(kinds[kind].gini)
    data = []
    branches = {name.rpartition('/')[0]: [] for name in groups}
    for name, blocks in groups.items():
      branch = name.rpartition('/')[0]
      trace = line(
        name,
        np.array(sorted(blocks)),
        np.array([np.mean(blocks[block]) for block in sorted(blocks)]),
        color=PALETTE[list(branches).index(branch) % len(PALETTE)],
        width=1.2,
        mode='lines+markers',
      )
      place = len(branches[branch]) % len(SYMBOLS)
      trace['marker'] = {'size': 8, 'symbol': SYMBOLS[place]}
      branches[branch].append(name)
      data.append(trace)
    if data:
      last = max(max(blocks) for blocks in groups.values())
      figure = layout(
        xaxis={'title': {'text': 'block'}, 'dtick': 1 + last // 10},
        yaxis={'rangemode': 'tozero'},
        height=340,
      )
      charts.append(Chart(title, caption, data, figure))
  return charts


def escaped(text: str) -> str:
  """`text` for plotly to show as it is, without control characters."""
  # Plotly knows the entities of these three only.
  return html.escape(metrics.printable(text), quote=False)


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


def _percent_ticks(logs: np.ndarray) -> dict[str, Any]:
  """A colour bar of powers of ten, named as percentages."""
  finite = logs[np.isfinite(logs)]
  low, high = (finite.min(), finite.max()) if finite.size else (-1, 0)
  powers = [*range(int(np.floor(low)), int(np.ceil(high)) + 1)]
  names = [f'{100 * 10.0**power:g} %' for power in powers]
  return {'colorbar': {'tickvals': powers, 'ticktext': names}}


def _around_one(values: np.ndarray, at_least: float) -> dict[str, Any]:
  reach = max(at_least, _largest(np.abs(values - 1)))
  return {
    'zmin': 1 - reach,
    'zmax': 1 + reach,
    'colorscale': 'RdBu',
    'colorbar': {'tickformat': '.2f'},
  }


def _largest(values: np.ndarray) -> float:
  return float(np.max(values[np.isfinite(values)], initial=0))


def _ratio(total: np.ndarray, count: np.ndarray) -> np.ndarray:
  return np.where(count > 0, total / np.maximum(count, 1), np.nan)
