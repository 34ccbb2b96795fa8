"""What every benchmark tells beside its figures, and how it shows them."""

import argparse
from collections.abc import Collection
from collections.abc import Mapping
from collections.abc import Sequence
import os
import pathlib
import platform
import subprocess
from typing import Any
from typing import NamedTuple

import jax
from matplotlib import figure
from rich import table as rich_table

from qat import display
from qat import plots

_BASELINE = '#b4b4b4'


def machine() -> str:
  """The name of the device that this process computes on."""
  device = jax.devices()[0]
  if device.platform != 'cpu':
    return device.device_kind
  cores = len(os.sched_getaffinity(0))
  for line in pathlib.Path('/proc/cpuinfo').read_text().splitlines():
    if line.startswith('model name'):
      return f'{line.split(":")[1].strip()}, {cores} cores'
  return platform.processor()


def commit() -> str:
  """The commit of the source, or 'unknown' where it is not in git."""
  found = subprocess.run(
    ['git', 'describe', '--always', '--dirty'],
    capture_output=True,
    text=True,
    cwd=pathlib.Path(__file__).parent,
    check=False,
  )
  return found.stdout.strip() or 'unknown'


def show(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
  """Prints rows of the same keys as a table.

  Args:
    rows: figures by name; at least one.

  Returns:
    The rows with what they were measured on, as JSON has it.
  """
  table = rich_table.Table(title=f'{machine()}, jax {jax.__version__}')
  for name in rows[0]:
    table.add_column(name, justify='right', no_wrap=True)
  for row in rows:
    table.add_row(*map(_cell, row.values()))
  display.console().print(table)
  return {'machine': machine(), 'commit': commit(), 'rows': list(rows)}


def _cell(value: Any) -> str:
  if isinstance(value, (int, float)) and value >= 1000:
    return display.count(value)
  return f'{value:.3g}' if isinstance(value, float) else str(value)


def add_outputs(command: argparse.ArgumentParser) -> None:
  """Adds `--json` and `--plot`."""

  def picture(text: str) -> str:
    path = pathlib.Path(text)
    if path.suffix != '.png' or not path.parent.is_dir():
      raise argparse.ArgumentTypeError(
        f'{text}: a .png file in a folder that is there'
      )
    return text

  command.add_argument('--json', help='also write the result to this file')
  command.add_argument('--plot', type=picture, help='also draw it: FILE.png')


class Bar(NamedTuple):
  """A line of a picture.

  Attributes:
    label: what was measured.
    value: milliseconds, or tokens in a second.
    limit: what it were if reading the weights took all the time; None where
      the rate of memory is not known.
    baseline: whether it is there to be compared with.
  """

  label: str
  value: float
  limit: float | None
  baseline: bool


def plot_products(path: str, rows: Sequence[dict[str, Any]]) -> None:
  """Draws what `pallas_kernels.measure.packed_products` measured.

  Args:
    path: of the picture, a PNG file.
    rows: what was measured; at least one.
  """
  shapes: dict[str, list[Bar]] = {}
  for row in rows:
    shape = f'{row["shape"]}, {_memory(row["memory bytes/s"])}'
    bars = shapes.setdefault(shape, [])
    name = f'{row["format"]}, {row["rows"]} row{"s"[: row["rows"] > 1]}'
    time, limit = row['seconds'], row['bytes'] / row['memory bytes/s']
    bars.append(Bar(name, 1e3 * time, 1e3 * limit, False))
  for row in rows:
    for name, factor in (('float32', 32), ('bfloat16', 16)):
      if row['format'] == '1bit' and row[name] is not None:
        time = row[name] * row['seconds']
        limit = factor * row['bytes'] / row['memory bytes/s']
        shape = f'{row["shape"]}, {_memory(row["memory bytes/s"])}'
        shapes[shape].append(
          Bar(f'XLA, {name}, 1 row', 1e3 * time, 1e3 * limit, True)
        )
  _plot(path, 'Products with packed weights', shapes, True)


def plot_models(
  path: str,
  title: str,
  rows: Sequence[dict[str, Any]],
  speed: str,
  tokens: int,
  baselines: Collection[str | None],
) -> None:
  """Draws what `qat.infer.measure.speeds` measured.

  Args:
    path: of the picture, a PNG file.
    title: of the picture.
    rows: what was measured; at least one.
    speed: what of it, 'decode/s' or 'prefill/s'.
    tokens: of all texts, for which the parameters are read once.
    baselines: models that are there to be compared with.
  """
  bars = []
  for row in rows:
    rate = row['memory/s']
    limit = None if rate is None else tokens * rate / row['bytes']
    name = row['model']
    bars.append(Bar(name, row[speed], limit, name in baselines))
  _plot(path, title, {_memory(rows[0]['memory/s']): bars}, False)


def _memory(rate: float | None) -> str:
  return f'memory gave {rate / 1e9:.3g} GB/s' if rate else ''


def _plot(
  path: str, title: str, groups: Mapping[str, Sequence[Bar]], times: bool
) -> None:
  """Draws bars beside limits: times on a logarithmic axis, or speeds."""
  counts = [len(bars) for bars in groups.values()]
  picture = figure.Figure(
    figsize=(9, 1.3 + sum(0.5 + 0.32 * n for n in counts)),
    layout='constrained',
  )
  axes = picture.subplots(
    len(groups), 1, sharex=True, squeeze=False, height_ratios=counts
  )[:, 0]
  drawn = [bar for bars in groups.values() for bar in bars]
  longest = max(bar.value for bar in drawn)
  limits = [bar.limit for bar in drawn if bar.limit is not None]
  for (name, bars), axis in zip(groups.items(), axes, strict=True):
    _draw(axis, name, bars, times)
  if times:
    axes[-1].set_xscale('log')
    axes[-1].xaxis.set_major_formatter('{x:g}')
    axes[-1].set_xlim(min([*limits, *(b.value for b in drawn)]) / 2)
  else:  # Limits far beyond the bars are left to the numbers.
    near = [limit for limit in limits if limit < 4 * longest]
    axes[-1].set_xlim(0, 1.05 * max([longest, *near]))
  axes[-1].set_xlabel('ms, logarithmic' if times else 'tokens/s')
  picture.suptitle(f'{title}\n{machine()}, jax {jax.__version__}', fontsize=11)
  handles = {
    handle.get_label(): handle
    for axis in axes
    for handle in axis.get_legend_handles_labels()[0]
  }
  picture.legend(handles=handles.values(), loc='outside lower center', ncols=3)
  picture.savefig(path, dpi=150)


def _draw(axis, name: str, bars: Sequence[Bar], times: bool) -> None:
  """The bars of a group, from the top, and their numbers on the right."""
  for kind, color in ((False, plots.ACCENT), (True, _BASELINE)):
    chosen = [(i, b.value) for i, b in enumerate(bars) if b.baseline is kind]
    if chosen:
      axis.barh(
        *zip(*chosen, strict=True),
        color=color,
        label='to compare with' if kind else 'packed',
      )
  limits = [(b.limit, i) for i, b in enumerate(bars) if b.limit is not None]
  if limits:
    axis.scatter(
      *zip(*limits, strict=True),
      marker='|',
      s=260,
      color='black',
      label='the limit: all weights, at the rate of memory',
    )
  axis.set_yticks(range(len(bars)), [bar.label for bar in bars])
  axis.invert_yaxis()
  axis.set_title(name, loc='left', fontsize=10)
  axis.grid(axis='x', alpha=0.3)
  axis.set_axisbelow(True)
  for i, bar in enumerate(bars):
    text = _cell(bar.value) + (' ms' if times else '/s')
    if bar.limit is not None:
      share = bar.limit / bar.value if times else bar.value / bar.limit
      text += f', {share:.2g} of the limit'
    axis.text(
      *(1.01, i, text), transform=axis.get_yaxis_transform(), va='center'
    )
