"""The charts of a run's curves and of its low-bit health."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from qat import plots


def learning(
  series: plots.Series, numbers: Mapping[str, float]
) -> list[plots.Chart]:
  """Losses, bits per byte, the schedule, norms and speed.

  Args:
    series: of metrics.jsonl.
    numbers: final ones; baselines among them are drawn as lines.
  """
  charts = []
  if 'train/loss' in series:
    charts.append(
      plots.Chart(
        'Training loss',
        'Nats per token of the batches as they come (faint), and the average. '
        'Falling smoothly is good; a spike that does not come back is not.',
        _noisy(*series['train/loss']),
        plots.layout(),
      )
    )
  if 'eval/bits_per_byte' in series:
    steps, values = plots.thin(*series['eval/bits_per_byte'])
    data = [plots.line('this run', steps, values, mode='lines+markers')]
    for name, color in (
      ('gzip', plots.PALETTE[2]),
      ('unigram', plots.PALETTE[5]),
    ):
      key = f'baseline/{name}_bits_per_byte'
      if key in numbers:
        ends = np.array([steps[0], steps[-1]])
        level = np.full(2, numbers[key])
        data.append(plots.line(name, ends, level, color=color, dash='dot'))
    charts.append(
      plots.Chart(
        'Validation bits per byte',
        'What the model needs to encode text it has not seen; lower is better. '
        'Unigram knows only how frequent each token is.',
        data,
        plots.layout(),
      )
    )
  charts += [*_task(series), *_schedule(series)]
  for key, title, caption, axis in (
    (
      'train/grad_norm',
      'Gradient norm',
      'Before clipping, on a logarithmic axis. Level or slowly changing is '
      'good; sudden peaks announce spikes of the loss.',
      {'type': 'log', 'dtick': 'D2'},
    ),
    (
      'train/slope',
      'Slope along random directions',
      'Clipped; with several directions the root of the mean square. It goes '
      'up and down from step to step by as much as it is; its average should '
      'fall, or stay, with the loss. On a logarithmic axis.',
      {'type': 'log', 'dtick': 'D2'},
    ),
    (
      'train/clipped',
      'Clipped slopes',
      'Share of the directions whose slope was clipped (config.zo.clip). More '
      'than a few say that config.zo.eps is too large, or that single batches '
      'are very unlike.',
      {'rangemode': 'tozero'},
    ),
    (
      'train/param_norm',
      'Parameter norm',
      'Of all that is trained together. Growth that slows down is usual; '
      'weight decay holds it back. A jump is a step that was too large.',
      {},
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
      charts.append(plots.Chart(title, caption, data, plots.layout(yaxis=axis)))
  return charts


def _noisy(steps: np.ndarray, values: np.ndarray) -> list[dict[str, Any]]:
  return [
    plots.line(
      'as measured', *plots.thin(steps, values), color=plots.FAINT, width=1
    ),
    plots.line('average', *plots.thin(steps, plots.smooth(values))),
  ]


def _task(series: plots.Series) -> list[plots.Chart]:
  if not {'task/dev/acc', 'task/dev/acc_stderr', 'task/dev/loss'} <= {*series}:
    return []
  steps, shares = series['task/dev/acc']
  errors = series['task/dev/acc_stderr'][1]
  data = [
    plots.line('accuracy', *plots.thin(steps, shares), mode='lines+markers')
  ]
  for name, sign in (('+ std. error', 1), ('- std. error', -1)):
    at = plots.thin(steps, shares + sign * errors)
    data.append(plots.line(name, *at, color=plots.FAINT, dash='dot', width=1))
  loss = plots.line(
    'loss, nats', *plots.thin(*series['task/dev/loss']), color=plots.PALETTE[0]
  )
  return [
    plots.Chart(
      'Task',
      'On the dev documents: the share of right choices, and the loss of the '
      'right continuations. A loss that rises while that of the training falls '
      'says that documents are learnt by heart.',
      [*data, loss | {'yaxis': 'y2'}],
      plots.stacked(plots.layout()),
    )
  ]


def _schedule(series: plots.Series) -> list[plots.Chart]:
  if not {'train/lr', 'train/weight_decay'} <= series.keys():
    return []
  decay = plots.line(
    'weight decay',
    *plots.thin(*series['train/weight_decay']),
    color=plots.PALETTE[1],
  )
  data = [
    plots.line(
      'learning rate', *plots.thin(*series['train/lr']), color=plots.PALETTE[0]
    ),
    decay | {'yaxis': 'y2'},
  ]
  return [
    plots.Chart(
      'Schedule',
      'What the optimizer was told to do. A bend here explains a bend in the '
      'loss.',
      data,
      plots.stacked(plots.layout(yaxis={'rangemode': 'tozero'})),
    )
  ]


def health(series: plots.Series) -> list[plots.Chart]:
  """Codes that flip, scales that drift, branches and experts."""
  charts = []
  flips = plots.table(series, 'health/flips/')
  if flips:
    logs = np.log10(np.where(flips.values > 0, flips.values, np.nan))
    charts.append(
      plots.Chart(
        'Flips',
        'Share of the weights whose code changed in one step, by layer. Busy '
        'at a high learning rate and quiet towards the end is good; a gap is '
        'a layer where nothing flipped.',
        [plots.heat(flips, logs, flips.values, '.2%', **_percent_ticks(logs))],
        plots.heat_layout(flips),
      )
    )
  scale = plots.table(series, 'health/scale/')
  if scale:
    first = scale.values[:, :1]
    drift = scale.values / np.where(first == 0, np.nan, first)
    charts.append(
      plots.Chart(
        'Scale, relative to its start',
        'Distance between the low-bit values of a layer. Slow drift is normal; '
        'a layer that leaves its neighbours is worth a look.',
        [plots.heat(scale, drift, drift, '.3f', **_around_one(drift, 0.05))],
        plots.heat_layout(scale),
      )
    )
  zeros = plots.table(
    {key: pair for key, pair in series.items() if np.any(pair[1] > 0)},
    'health/zeros/',
  )
  if zeros:
    charts.append(
      plots.Chart(
        'Zeros',
        'Share of the weights whose code is 0, in the layers that have any. A '
        'third is usual for ternary weights; close to all is a dying layer.',
        [
          plots.heat(
            zeros,
            zeros.values,
            zeros.values,
            '.1%',
            zmin=0,
            zmax=max(0.01, _largest(zeros.values)),
          )
        ],
        plots.heat_layout(zeros),
      )
    )
  load = plots.table(series, 'health/expert_load/')
  if load:
    groups = [name.rpartition('/')[0] for name in load.names]
    experts = np.array([groups.count(group) for group in groups])
    relative = load.values * experts[:, None]
    charts.append(
      plots.Chart(
        'Load of the experts',
        'Share of the tokens an expert gets, times the number of experts: 1 is '
        'an even share, and 0 an expert that learns nothing.',
        [
          plots.heat(
            load, relative, load.values, '.1%', **_around_one(relative, 0.5)
          )
        ],
        plots.heat_layout(load),
      )
    )
  charts += _branches(series)
  return charts + _routing(series)


# By the start of the key: title and caption.
_ROUTING = {
  'health/router_entropy/': (
    'Entropy of the router',
    'Nats per token, from the first block (violet) to the last (amber). It '
    'starts near the logarithm of the number of experts, undecided, and '
    'should fall slowly; at once means that routing froze.',
  ),
  'health/load_entropy/': (
    'Entropy of the load',
    'Nats of the shares that the experts of a block get: the logarithm of the '
    'number of experts where they are even, 0 where one gets everything.',
  ),
  'health/idle_experts/': (
    'Idle experts',
    'Share of the experts of a block that get less than a tenth of an even '
    'share. They hardly learn, so few of them come back.',
  ),
  'health/dropped/': (
    'Dropped choices',
    'Share of the choices that found their expert full, and got nothing.',
  ),
}


def _routing(series: plots.Series) -> list[plots.Chart]:
  charts = []
  for start, (title, caption) in _ROUTING.items():
    table = plots.table(series, start)
    if table:
      layout = plots.layout(showlegend=1 < len(table.names) <= 8, height=420)
      data = plots.by_depth(table)
      charts.append(plots.Chart(title, caption, data, layout))
  return charts


def _branches(series: plots.Series) -> list[plots.Chart]:
  alpha = plots.table(series, 'health/alpha/')
  beta = plots.table(series, 'health/beta/')
  if not (alpha and beta):
    return []
  figure = plots.stacked(
    plots.layout(showlegend=1 < len(alpha.names) <= 8, height=420)
  )
  figure['yaxis']['title'] = {'text': 'alpha'}
  figure['yaxis2']['title'] = {'text': 'beta'}
  data = plots.by_depth(alpha) + [
    trace | {'yaxis': 'y2', 'showlegend': False}
    for trace in plots.by_depth(beta)
  ]
  return [
    plots.Chart(
      'Scales of the branches',
      'Alpha scales the narrow branch and beta the wide one, from the first '
      'block (violet) to the last (amber). Alpha above beta lets the branch '
      'with more bits carry what matters; beta at 0 would be an unused branch.',
      data,
      figure,
    )
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
