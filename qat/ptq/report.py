"""What a quantization tells: a dict for report.json, a page, a table."""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import json
import math
import pathlib
import resource
import sys
from typing import Any

import jax
from ml_collections import ConfigDict
import numpy as np
from rich import box
from rich import console as rich_console
from rich import table as rich_table
from rich import text as rich_text

from qat import display
from qat import plots
from qat import report
from qat.ptq import apply

# Key of the totals or of an evaluation: what people call it, how it reads.
EVALUATED: tuple[tuple[str, str, Callable[[float], str]], ...] = (
  ('eval/bits_per_byte', 'bits per byte', '{:.4f}'.format),
  ('eval/perplexity', 'perplexity', '{:.3f}'.format),
  ('eval/loss', 'loss, nats', '{:.4f}'.format),
)
TOTALS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
  ('bits_per_weight', 'bits per weight', '{:.3f}'.format),
  ('weights', 'quantized weights', display.count),
  ('stored_bytes', 'stored bytes of them', display.count),
  ('model_bytes', 'bytes of the model', display.count),
  ('weight_error', 'error of weights', '{:.3%}'.format),
  ('output_error', 'error of outputs', '{:.3%}'.format),
  ('seconds', 'time', display.duration),
  ('host_peak_bytes', 'peak memory, host', display.count),
  ('device_peak_bytes', 'peak memory, device', display.count),
)
_STYLE = """<style>
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .875rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: 4px 8px; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
th { font-weight: 600; }
th[scope=row] { text-align: left; font-weight: 400; }
</style>"""


def memory() -> dict[str, int]:
  """Peak memory of this process so far, by the keys of `TOTALS`."""
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  # In KiB but for macOS.
  found = {'host_peak_bytes': peak * (1 if sys.platform == 'darwin' else 1024)}
  statistics = jax.local_devices()[0].memory_stats()
  if statistics and 'peak_bytes_in_use' in statistics:
    found['device_peak_bytes'] = statistics['peak_bytes_in_use']
  return found


def make(
  result: apply.Result,
  ptq: ConfigDict,
  *,
  model: str,
  examples: str | None,
  evaluation: Mapping[str, Mapping[str, float]],
  sizes: Mapping[str, int],
  whole: bool,
) -> dict[str, Any]:
  """All numbers of a quantization, for report.json.

  Args:
    result: of the quantization.
    ptq: its config.
    model: what was quantized.
    examples: what it was calibrated on, for people; None: nothing.
    evaluation: 'before' and 'after' -> numbers of `evaluate`; may be empty.
    sizes: `memory()`, and 'model_bytes' of the files.
    whole: whether this process has done all of it; else its time is of a part,
      and no total.
  """
  records = result.records
  weights = sum(r.inputs * r.outputs for r in records)
  stored = sum(r.stored_bits for r in records) // 8
  totals = {
    'bits_per_weight': 8 * stored / weights,
    'weights': weights,
    'stored_bytes': stored,
    'weight_error': float(np.mean([r.weight_error for r in records])),
    **sizes,
  }
  if whole:
    totals['seconds'] = sum(result.seconds.values())
  outputs = [r.output_error for r in records if r.output_error is not None]
  if outputs:
    totals['output_error'] = float(np.mean(outputs))
  return {
    'model': model,
    'algorithm': ptq.algorithm,
    'config': ptq.to_dict(),
    'calibration': examples,
    'totals': totals,
    'evaluation': {when: dict(found) for when, found in evaluation.items()},
    'seconds': result.seconds,
    'notes': result.notes,
    'layers': [
      dataclasses.asdict(r) | {'bits': r.bits} for r in result.records
    ],
  }


def table(console: rich_console.Console, made: Mapping[str, Any]) -> None:
  """Prints the totals, and the evaluations before and after."""
  shown = rich_table.Table(
    title=rich_text.Text(display.printable(_title(made))),
    title_style='bold',
    title_justify='left',
    box=box.SIMPLE_HEAD,
    pad_edge=False,
  )
  columns = list(made['evaluation'])
  for name in ('', *(columns or ['value'])):
    shown.add_column(name, justify='right' if name else 'left')
  for key, label, form in EVALUATED:
    if columns:
      shown.add_row(label, *_cells(made['evaluation'], key, form))
  if columns:
    shown.add_section()
  blank = [''] * max(0, len(columns) - 1)
  for key, label, form in TOTALS:
    if key in made['totals']:
      shown.add_row(label, *blank, form(made['totals'][key]))
  console.print(shown)


def page(made: Mapping[str, Any]) -> str:
  """The numbers as a page that needs no network."""
  figures, cards = {}, []
  for i, chart in enumerate(charts(made['layers'])):
    figures[f'chart-{i}'] = {'data': chart.data, 'layout': chart.layout}
    cards.append(report.card(chart, f'chart-{i}', 'half'))
  links = ''.join(
    f'<a href="#{name.lower()}">{name}</a>'
    for name in ('Charts', 'Layers', 'Details')
  )
  calibration = made['calibration'] or 'No calibration data.'
  return report.fill(
    _title(made),
    f'{_STYLE}<header><h1>{display.as_html(_title(made))}</h1>'
    f'<p class="soft">{display.as_html(calibration)}</p>{_evaluations(made)}'
    f'{_tiles(made["totals"])}<nav>{links}</nav></header><main>'
    '<h2 id="charts">Charts</h2>'
    '<p class="intro">Errors are relative squares: of the weights, and of what '
    'a layer gives for the calibration inputs. A method that calibrates makes '
    'the second small at the cost of the first.</p>'
    f'<div class="grid">{"".join(cards)}</div>'
    f'<h2 id="layers">Layers</h2>{_layers(made["layers"])}'
    f'<h2 id="details">Details</h2>{_details(made)}</main>'
    '<footer>Made by scripts/quantize.py.</footer>',
    figures,
  )


def charts(layers: Sequence[Mapping[str, Any]]) -> list[plots.Chart]:
  """A line for each kind of layer over the blocks; empty charts are left out.

  Args:
    layers: those of `make`.
  """
  drawn = []
  for key, title, caption, axis in (
    (
      'output_error',
      'Error of outputs',
      'On the calibration inputs. What rises with depth is made up for less '
      'and less; a single peak is a layer to keep in more bits.',
      {'type': 'log', 'exponentformat': 'power'},
    ),
    (
      'weight_error',
      'Error of weights',
      'Of a matrix as such.',
      {'type': 'log', 'exponentformat': 'power'},
    ),
    (
      'bits',
      'Bits per weight',
      'Of what is stored: codes, scales, and weights that are kept.',
      {'rangemode': 'tozero'},
    ),
    (
      'seconds',
      'Seconds',
      'For each matrix; the first of a shape includes compiling.',
      {'rangemode': 'tozero'},
    ),
  ):
    data = _lines(layers, key)
    if data:
      layout = plots.layout(
        xaxis={'title': {'text': 'block'}}, yaxis=axis, height=340
      )
      drawn.append(plots.Chart(title, caption, data, layout))
  return drawn


def _lines(layers: Sequence[Mapping[str, Any]], key: str) -> list[dict]:
  lines: dict[str, list[tuple[int, float]]] = {}
  for layer in layers:
    block, name = plots.split(layer['path'])
    if layer[key] is not None:
      lines.setdefault(name, []).append((block, layer[key]))
  return [
    plots.line(
      name,
      *np.array(points, np.float64).T,
      color=plots.PALETTE[i % len(plots.PALETTE)],
      dash='solid' if i < len(plots.PALETTE) else 'dot',
      mode='lines+markers',
    )
    for i, (name, points) in enumerate(lines.items())
  ]


def _title(made: Mapping[str, Any]) -> str:
  bits = made['totals']['bits_per_weight']
  name = pathlib.Path(made['model']).name
  return f'{name}: {made["algorithm"]}, {bits:.2f} bits'


def _cells(
  evaluation: Mapping[str, Mapping[str, float]],
  key: str,
  form: Callable[[float], str],
) -> list[str]:
  return [form(found[key]) for found in evaluation.values()]


def _evaluations(made: Mapping[str, Any]) -> str:
  found = made['evaluation']
  if not found:
    return ''
  rows = ''.join(
    f'<tr><th scope="row">{label}</th>'
    + ''.join(f'<td>{cell}</td>' for cell in _cells(found, key, form))
    + '</tr>'
    for key, label, form in EVALUATED
  )
  names = ''.join(f'<th>{name}</th>' for name in found)
  return (
    '<div class="card wide"><table><thead><tr><th></th>'
    f'{names}</tr></thead><tbody>{rows}</tbody></table></div>'
  )


def _tiles(totals: Mapping[str, float]) -> str:
  tiles = ''.join(
    f'<div><dt>{label}</dt><dd>{form(totals[key])}</dd></div>'
    for key, label, form in TOTALS
    if key in totals
  )
  return f'<dl class="tiles">{tiles}</dl>'


def _layers(layers: Sequence[Mapping[str, Any]]) -> str:
  rows = []
  for layer in layers:
    output = layer['output_error']
    cells = (
      f'{layer["inputs"]} × {layer["outputs"]}',
      f'{layer["bits"]:.3f}',
      f'{layer["weight_error"]:.3e}',
      '–' if output is None else f'{output:.3e}',
      f'{layer["seconds"]:.2f}',
    )
    rows.append(
      f'<tr><th scope="row">{display.as_html(layer["path"])}</th>'
      + ''.join(f'<td>{cell}</td>' for cell in cells)
      + '</tr>'
    )
  heads = ('inputs × outputs', 'bits', 'weights', 'outputs', 'seconds')
  return (
    '<div class="card wide"><table><thead><tr><th></th>'
    + ''.join(f'<th>{head}</th>' for head in heads)
    + f'</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
  )


def _details(made: Mapping[str, Any]) -> str:
  return ''.join(
    f'<details><summary>{title}</summary><pre>'
    f'{display.as_html(json.dumps(made[key], indent=2))}'
    '</pre></details>'
    for title, key in (
      ('Settings', 'config'),
      ('Seconds by step', 'seconds'),
      ('What the method tells', 'notes'),
    )
    if made[key]
  )


def finite(value: Any) -> Any:
  """The same with null for numbers that JSON cannot hold."""
  if isinstance(value, Mapping):
    return {key: finite(v) for key, v in value.items()}
  if isinstance(value, list | tuple):
    return [finite(v) for v in value]
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value
