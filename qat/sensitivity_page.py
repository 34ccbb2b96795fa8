"""One self-contained page that sets the sensitivities of runs side by side.

It is of the form of a run's report, and needs no network either.
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import re

import numpy as np

from qat import display
from qat import plots
from qat import report
from qat import sensitivity
from qat import sensitivity_pictures
from qat import sensitivity_study

DASHES = ('solid', 'dot', 'dash', 'dashdot')
KINDS = (*sensitivity.KINDS, 'binarized')

# Squares of normally distributed weights, on inputs that are all alike.
NORMAL = {'gini': 0.637, 'top1': 0.085}  # 2 / pi; by the normal distribution.

_STYLE = """<style>
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .875rem;
  font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { padding: 5px 8px; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
th { font-weight: 600; }
th[scope=row] { text-align: left; font-weight: 400; white-space: normal;
  min-width: 7.5em; overflow-wrap: anywhere; }
tr.mean { color: var(--soft); }
</style>"""


def page(made: sensitivity_study.Study) -> str:
  """The page of a study, as HTML."""
  figures, cards = {}, []
  for i, chart in enumerate(_charts(made.runs)):
    name = f'chart-{i}'
    figures[name] = {'data': chart.data, 'layout': chart.layout}
    cards.append(report.card(chart, name, 'half'))
  links = ''.join(
    f'<a href="#{title.lower()}">{title}</a>'
    for title in ('Numbers', 'Maps', 'Curves', 'Runs')
  )
  return report.fill(
    'Sensitivity study',
    f'{_STYLE}<header><h1>Sensitivity study</h1>{_about(made)}'
    f'<nav>{links}</nav></header><main>'
    f'<h2 id="numbers">Numbers</h2>{_table(made.runs)}'
    f'<h2 id="maps">Maps</h2>{_maps(made.runs)}'
    f'<h2 id="curves">Curves</h2><div class="grid">{"".join(cards)}</div>'
    f'<h2 id="runs">Runs</h2>{_sources(made)}</main>'
    '<footer>Made by scripts/sensitivity.py from the checkpoints of the runs.'
    '</footer>',
    figures,
  )


def rows(
  runs: Sequence[sensitivity_study.Analysed],
) -> Iterator[tuple[str, str, dict[str, tuple[float, float]]]]:
  """The rows of the table of numbers.

  Yields:
    (run, layer, kind -> (Gini coefficient, share of the largest 1 %)) of each
    layer that was chosen, and then the mean over all layers of the run.
  """
  for run in runs:
    for path in run.chosen:
      kinds = run.analysis[path]
      yield run.label, path, {k: (s.gini, s.top1) for k, s in kinds.items()}
    means = {}
    for kind in KINDS:
      pairs = [
        (kinds[kind].gini, kinds[kind].top1)
        for kinds in run.analysis.values()
        if kind in kinds
      ]
      if pairs:
        gini, top1 = np.mean(pairs, axis=0)
        means[kind] = float(gini), float(top1)
    yield run.label, f'mean of all {len(run.analysis)}', means


def _about(made: sensitivity_study.Study) -> str:
  c = made.calibration
  return (
    '<p class="intro">How much the output of a layer depends on each single '
    'weight: the sensitivity of pQuant, equation 2. All runs read the same '
    f'{c.sequences} × {c.seq_len} tokens of {display.as_html(c.dataset)}; '
    f'damping {c.damping:g}.</p>'
  )


def _table(runs: Sequence[sensitivity_study.Analysed]) -> str:
  lines = []
  for label, layer, kinds in rows(runs):
    cells = ''
    for kind in KINDS:
      if kind in kinds:
        gini, top1 = kinds[kind]
        cells += f'<td>{gini:.3f}<br>{100 * top1:.1f} %</td>'
      else:
        cells += '<td>–</td>'
    mean = ' class="mean"' if layer.startswith('mean') else ''
    lines.append(
      f'<tr{mean}><th scope="row">{display.as_html(label)}<br>'
      f'<span class="soft">{display.as_html(layer)}</span></th>{cells}</tr>'
    )
  return (
    '<p class="intro">First the Gini coefficient: 0 where all weights matter '
    'alike and near 1 where few do. Below it the share of all sensitivity that '
    'the most sensitive 1 % of the weights hold. Normally distributed '
    f'weights on inputs that are all alike have {NORMAL["gini"]:.3f} and '
    f'{100 * NORMAL["top1"]:.1f} %. Binary weights have one size: their '
    'numbers come from the inputs alone. Of ternary weights, the share of '
    'zeros counts as inequality. Full precision has no quantized weights. '
    'Binarized is what a layer would have on its inputs if all its weights '
    'were of one size, without any training for it.</p>'
    '<div class="card wide"><table><thead><tr><th></th>'
    f'{"".join(f"<th>{kind}</th>" for kind in KINDS)}</tr></thead>'
    f'<tbody>{"".join(lines)}</tbody></table></div>'
  )


def _maps(runs: Sequence[sensitivity_study.Analysed]) -> str:
  low, high = sensitivity_pictures.color_range(
    [s for r in runs for p in r.chosen for s in _real(r.analysis[p]).values()]
  )
  cards = ''.join(
    sensitivity_pictures.map_card(
      f'{run.label}: {path}', _real(run.analysis[path]), low, high
    )
    for run in runs
    for path in run.chosen
  )
  return (
    '<p class="intro">The logarithm of the sensitivity relative to the mean of '
    'its layer, in the colours of one scale: outputs from top to bottom, '
    'inputs from left to right, the largest of each window. A window is larger '
    'in a larger layer, which makes it brighter; the numbers have no windows. '
    f'</p>{sensitivity_pictures.color_scale(low, high)}'
    f'<div class="grid">{cards}</div>'
  )


def _real(kinds: Mapping[str, sensitivity.Stats]) -> dict:
  """Those of the weights that the model has."""
  return {k: stats for k, stats in kinds.items() if k in sensitivity.KINDS}


def _charts(
  runs: Sequence[sensitivity_study.Analysed],
) -> list[plots.Chart]:
  """Inequality by depth, and distributions; latent, then quantized."""
  names = {
    sensitivity_pictures.layer(path)[2] for run in runs for path in run.chosen
  }
  last = max(
    (sensitivity_pictures.layer(p)[0] or 0 for r in runs for p in r.analysis),
    default=0,
  )
  charts = []
  for title, caption, group in (
    (
      'The same layers in every block',
      'Gini coefficient by depth, a line a run and layer; experts averaged.',
      lambda name: name if name in names else None,
    ),
    (
      'All layers',
      'Gini coefficient by depth, averaged over the layers of a block.',
      lambda name: '',
    ),
  ):
    charts += [
      plots.Chart(
        f'{title}: {kind}',
        caption,
        _by_depth(runs, kind, group),
        sensitivity_pictures.depth_layout(last),
      )
      for kind in KINDS
    ]
  charts += [
    plots.Chart(
      f'Distribution: {kind}',
      'Shares of the weights of the chosen layers by sensitivity, relative to '
      'the mean of the layer. Weights of 0 stand at the left end.',
      _distributions(runs, kind),
      sensitivity_pictures.distribution_layout(),
    )
    for kind in sensitivity.KINDS
  ]
  return [chart for chart in charts if chart.data]


def _by_depth(
  runs: Sequence[sensitivity_study.Analysed],
  kind: str,
  group: Callable[[str], str | None],
) -> list[dict]:
  """A line a run and group of layers; `group` is given their names."""
  data = []
  for run, color in zip(runs, _colors(len(runs)), strict=True):
    lines: dict[str, dict[int, list[float]]] = {}
    for path, kinds in run.analysis.items():
      block, _, name = sensitivity_pictures.layer(path)
      line = group(name)
      if block is not None and line is not None and kind in kinds:
        blocks = lines.setdefault(line, {})
        blocks.setdefault(block, []).append(kinds[kind].gini)
    for (name, blocks), symbol in zip(
      lines.items(), _cycle(sensitivity_pictures.SYMBOLS, lines), strict=True
    ):
      order = sorted(blocks)
      trace = plots.line(
        f'{run.label} {name}'.strip(),
        np.array(order),
        np.array([np.mean(blocks[block]) for block in order]),
        color=color,
        mode='lines+markers',
      )
      data.append(trace | {'marker': {'size': 8, 'symbol': symbol}})
  return data


def _distributions(
  runs: Sequence[sensitivity_study.Analysed], kind: str
) -> list[dict]:
  """A line a run and chosen layer, experts averaged."""
  data = []
  for run, color in zip(runs, _colors(len(runs)), strict=True):
    lines: dict[str, list[np.ndarray]] = {}
    for path in run.chosen:
      if kind in run.analysis[path]:
        histogram = run.analysis[path][kind].histogram
        lines.setdefault(re.sub(r'/\d+$', '', path), []).append(histogram)
    for (path, histograms), dash in zip(
      lines.items(), _cycle(DASHES, lines), strict=True
    ):
      data.append(
        sensitivity_pictures.distribution(
          f'{run.label} {path}',
          np.mean(histograms, axis=0),
          color=color,
          dash=dash,
        )
      )
  return data


def _sources(made: sensitivity_study.Study) -> str:
  runs = ''.join(
    f'<li>{display.as_html(run.label)}: {display.as_html(run.workdir)}, step '
    f'{run.step:,}</li>'
    for run in made.runs
  )
  c = made.calibration
  return (
    f'<ul>{runs}</ul><p class="caption">Calibration: data set '
    f'{display.as_html(c.dataset)}, digest {c.digest[:16]}; the first '
    f'{c.sequences} training sequences of {c.seq_len} tokens in the order of '
    f'seed {c.seed}; damping {c.damping:g} of the mean diagonal.</p>'
  )


def _colors(count: int) -> list[str]:
  return [plots.PALETTE[i % len(plots.PALETTE)] for i in range(count)]


def _cycle(choices: Sequence[str], lines: Mapping) -> list[str]:
  return [choices[i % len(choices)] for i in range(len(lines))]
