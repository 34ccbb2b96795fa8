"""Pictures of an analysis of sensitivity: charts and maps.

A map is drawn as in pQuant's figures 2 and 5a: the logarithm of the
sensitivity, max-pooled, and all maps of one picture in the colours of one
scale, so that they can be compared.
"""

import base64
from collections.abc import Iterable
from collections.abc import Mapping
import io
import re

from matplotlib import image
import numpy as np

from qat import display
from qat import plots
from qat import sensitivity

SYMBOLS = ('circle', 'square', 'diamond-open', 'triangle-up', 'cross')


def charts(analysis: sensitivity.Analysis) -> list[plots.Chart]:
  """Gini coefficients of every layer, and the distributions of a few."""
  blocks = {layer(path)[0] for path in analysis} - {None}
  if not blocks:
    return []
  kinds = (
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
  )
  found = [
    plots.Chart(
      title,
      caption,
      _gini_lines(analysis, kind),
      depth_layout(max(blocks)),
    )
    for kind, title, caption in kinds
  ]
  return found + [
    plots.Chart(
      'Distribution of the sensitivities',
      'Shares of the weights by sensitivity, relative to the mean of their '
      'layer: in the last block, one layer of each branch. A narrow peak says '
      'that all weights matter alike; a wide one with a tail to the right, '
      'that few carry the layer. Weights of 0 stand at the left end.',
      _distributions(analysis, max(blocks)),
      distribution_layout(),
    )
  ]


def depth_layout(last_block: int) -> dict:
  """The layout of a chart of Gini coefficients over the blocks."""
  return plots.layout(
    xaxis={'title': {'text': 'block'}, 'dtick': 1 + last_block // 10},
    yaxis={'rangemode': 'tozero'},
    height=340,
  )


def layer(path: str) -> tuple[int | None, str, str]:
  """A path's block, its branch and its name; experts share a name.

  'block_1/ffn/narrow/up/3' -> (1, 'ffn/narrow', 'ffn/narrow/up').
  """
  block, rest = plots.split(path)
  name = re.sub(r'/\d+$', '', rest)
  return block, name.rpartition('/')[0], name


def _gini_lines(analysis: sensitivity.Analysis, kind: str) -> list[dict]:
  """A line a layer over the blocks: a colour a branch, a symbol a layer."""
  groups: dict[str, dict[int, list[float]]] = {}
  branches: dict[str, list[str]] = {}
  for path, kinds in analysis.items():
    block, branch, name = layer(path)
    if block is None:
      continue
    if name not in groups:
      groups[name] = {}
      branches.setdefault(branch, []).append(name)
    groups[name].setdefault(block, []).append(kinds[kind].gini)
  data = []
  for color, names in enumerate(branches.values()):
    for symbol, name in enumerate(names):
      blocks = sorted(groups[name])
      trace = plots.line(
        name,
        np.array(blocks),
        np.array([np.mean(groups[name][block]) for block in blocks]),
        color=plots.PALETTE[color % len(plots.PALETTE)],
        width=1.2,
        mode='lines+markers',
      )
      shape = SYMBOLS[symbol % len(SYMBOLS)]
      data.append(trace | {'marker': {'size': 8, 'symbol': shape}})
  return data


def _distributions(analysis: sensitivity.Analysis, block: int) -> list[dict]:
  """The histograms of a block: of each branch, those of its last layer."""
  chosen = {}
  for path in analysis:
    of, branch, name = layer(path)
    if of == block and _speaks_for_all(path):
      chosen[branch] = name, analysis[path]
  return [
    distribution(
      f'{name}, {kind}',
      kinds[kind].histogram,
      color=plots.PALETTE[i % len(plots.PALETTE)],
      dash=dash,
    )
    for i, (name, kinds) in enumerate(chosen.values())
    for kind, dash in (('latent', 'solid'), ('quantized', 'dot'))
  ]


def distribution(
  name: str, histogram: np.ndarray, *, color: str, dash: str
) -> dict:
  """A line of a chart of `distribution_layout`."""
  middles = 10 ** ((sensitivity.EDGES[1:] + sensitivity.EDGES[:-1]) / 2)
  return plots.line(name, middles, histogram, color=color, dash=dash)


def distribution_layout() -> dict:
  """Shares of the weights over the sensitivity relative to the mean."""
  return plots.layout(
    xaxis={
      'title': {'text': 'sensitivity / mean'},
      'type': 'log',
      'exponentformat': 'power',
      'dtick': 1,
    },
    yaxis={'rangemode': 'tozero', 'tickformat': '.0%'},
    height=340,
  )


def _speaks_for_all(path: str) -> bool:
  """Whether a layer is no expert, or the first one."""
  return not re.search(r'/[1-9]\d*$', path)


def maps(analysis: sensitivity.Analysis) -> str:
  """HTML: maps of the first, the middle and the last block's layers."""
  blocks = sorted({layer(path)[0] for path in analysis} - {None})
  chosen = {blocks[i] for i in (0, len(blocks) // 2, -1)} if blocks else set()
  paths = [
    path
    for path in analysis
    if layer(path)[0] in chosen and _speaks_for_all(path)
  ]
  if not paths:
    return ''
  low, high = color_range(
    [analysis[path][kind] for path in paths for kind in sensitivity.KINDS]
  )
  parts = [
    '<h3 class="maps">Maps</h3><p class="intro caption">Sensitivity of single '
    'weights, relative to the mean of their layer: outputs from top to bottom, '
    'inputs from left to right, the largest of each window. Points and lines '
    f'stand out where few weights matter.</p>{color_scale(low, high)}'
  ]
  for block in sorted(chosen, reverse=True):
    cards = [
      map_card(plots.split(path)[1], analysis[path], low, high)
      for path in paths
      if plots.split(path)[0] == block
    ]
    parts.append(
      f'<details{" open" if block == max(chosen) else ""}><summary>Block '
      f'{block}</summary><div class="grid">{"".join(cards)}</div></details>'
    )
  return ''.join(parts)


def map_card(
  title: str, kinds: Mapping[str, sensitivity.Stats], low: float, high: float
) -> str:
  """HTML: the maps of a layer side by side, latent and quantized."""
  pair = ''.join(
    f'<figure><img alt="map of the {kind} weights" '
    f'src="{_picture(stats.map_NK, low, high)}"><figcaption>{kind}<br>'
    f'Gini {stats.gini:.2f}<br>top 1 % holds {100 * stats.top1:.0f} %'
    '</figcaption></figure>'
    for kind, stats in kinds.items()
  )
  return (
    f'<section class="card third"><h3>{display.as_html(title)}</h3>'
    f'<div class="pair">{pair}</div></section>'
  )


def color_scale(low: float, high: float) -> str:
  """HTML: the colours of maps from `low` to `high`, with those two named."""
  ramp = _picture(np.linspace(low, high, 96)[None], low, high)
  ends = [
    display.count(10**end) if end >= 0 else f'{10**end:.2g}'
    for end in (low, high)
  ]
  return (
    f'<p class="scale"><span>× {ends[0]}</span><img alt="colour scale" '
    f'src="{ramp}"><span>× {ends[1]}</span></p>'
  )


def _picture(map_NK: np.ndarray, low: float, high: float) -> str:
  """A map as a PNG in a data address."""
  # 48 shades look like all of them, in a third of the bytes.
  levels = np.clip((map_NK.astype(np.float32) - low) / (high - low), 0, 1)
  levels = np.round(levels * 47) / 47
  file = io.BytesIO()
  image.imsave(file, levels, vmin=0, vmax=1, cmap='magma', format='png')
  return f'data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}'


def color_range(stats: Iterable[sensitivity.Stats]) -> tuple[float, float]:
  """One range of log10(s / mean) that shows several maps; low < high."""
  values = np.concatenate([s.map_NK.ravel() for s in stats]).astype(np.float32)
  values = values[np.isfinite(values)]
  if not values.size:
    return -1.0, 1.0
  # The faintest windows would stretch the scale over noise.
  low, high = np.percentile(values, 1), values.max()
  return float(low), float(max(high, low + 0.1))
