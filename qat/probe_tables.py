"""What compilers told, as tables in the terminal."""

from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

from rich import box
from rich import console as rich_console
from rich import table as rich_table

from qat import display
from qat import hlo

Result = dict[str, Any]  # As `probe.ask` returns it.


def steps(
  console: rich_console.Console, name: str, results: Sequence[Result]
) -> None:
  """Training or decode steps: a column for each target.

  Args:
    console: where to.
    name: the title.
    results: from `step_probe`.
  """
  good = [result for result in results if result['error'] is None]
  table = rich_table.Table(title=name)
  table.add_column('on each device')
  for result in good:
    table.add_column(result['target'], justify='right')

  def size(key: str):
    return lambda r: f'{r[key] / 1e9:.2f} GB'

  def share(key: str):
    return lambda r: f'{r["peak_bytes"] / r[key]:.3f}'

  def row(label: str, text: Callable[[Result], str]):
    table.add_row(label, *map(text, good))

  row('devices of the mesh', lambda r: ' x '.join(map(str, r['mesh'].values())))
  row('compile time', lambda r: f'{r["compile_seconds"]:.0f} s')
  row('tokens of a step', lambda r: f'{r["tokens_per_device"]:,}')
  row('arguments', size('argument_bytes'))
  row('outputs', size('output_bytes'))
  row('  in the place of arguments', size('reused_bytes'))
  row('temporaries', size('temporary_bytes'))
  row('peak', size('peak_bytes'))
  row('  of its memory', size('memory_bytes'))
  row(
    '', lambda r: 'fits' if r['peak_bytes'] < r['memory_bytes'] else 'NO ROOM'
  )
  for key, label in (
    ('forward', 'of a forward pass alone'),
    ('backprop', 'of backpropagation with AdamW'),
  ):
    if good and all(f'{key}_peak_bytes' in r for r in good):
      row(f'peak {label}', size(f'{key}_peak_bytes'))
      row("  this step's share of it", share(f'{key}_peak_bytes'))
  row('FLOPs that a step needs', lambda r: display.count(r['needed_flops']))
  row('FLOPs, loops counted once', lambda r: _count(r['compiler_flops']))
  for kind in hlo.KINDS:
    if any(kind in r['collectives'] for r in good):
      row(kind, lambda r, kind=kind: _exchange(r['collectives'].get(kind)))
  if good:
    console.print(table)
  failures(console, results)


def walks(
  console: rich_console.Console, name: str, results: Sequence[Result]
) -> None:
  """Programs of a quantization after training: a table for each target."""
  for result in results:
    if result['error'] is not None:
      continue
    limit, most = result['limit_bytes'], result['most_bytes']
    table = rich_table.Table(title=f'{name} on {result["target"]}, GB')
    for column in ('', 'program', 'its temporaries', 'beside it', 'together'):
      table.add_column(column, justify='right' if column else 'left')
    for row in result['programs']:
      both = row['peak_bytes'] + row['beside_bytes']
      parts = (row['peak_bytes'], row['temporary_bytes'], row['beside_bytes'])
      cells = [f'{size / 1e9:.2f}' for size in (*parts, both)]
      table.add_row(row['name'], *cells)
    console.print(table)
    console.print(
      f'A block in float32 takes {result["block_bytes"] / 1e9:.2f} GB, the'
      ' hidden states of all calibration sequences'
      f' {result["states_bytes"] / 1e9:.2f} GB: the limit is'
      f' {limit / 1e9:.2f} GB, the most at once {most / 1e9:.2f} GB,'
      f' {"within" if most <= limit else "ABOVE"} it.'
    )
  failures(console, results)


def kernels(console: rich_console.Console, results: Sequence[Result]) -> None:
  """Kernels of one target: a row for each case, named M x K x N.

  Args:
    console: where to.
    results: from `kernel_probe`, each with its 'case'.
  """
  table = rich_table.Table(
    title=f'Kernels on {results[0]["target"]}', box=box.SIMPLE_HEAD
  )
  table.add_column('case', no_wrap=True)
  of_gpu = any('registers' in result for result in results)
  last = 'registers' if of_gpu else 'bundles of a step'
  for column in ('memory', 'FLOPs', last):
    table.add_column(column, justify='right', no_wrap=column != last)
  for result in results:
    if result['error'] is not None:
      table.add_row(result['case'], 'FAILED')
      continue
    if of_gpu:
      told = str(result['registers'])
      if result['spilled_bytes']:
        told += f', {result["spilled_bytes"]} bytes spilled'
    else:
      told = ' + '.join(map(_bundles, result['schedules'].values()))
    size = sum(
      result[f'{key}_bytes'] for key in ('argument', 'output', 'temporary')
    )
    flops = display.count(result['needed_flops'])
    table.add_row(result['case'], f'{size / 1e6:.2f} MB', flops, told)
  console.print(table)
  failures(console, results)


def failures(console: rich_console.Console, results: Sequence[Result]) -> None:
  """Why there are no figures, where there are none."""
  for result in results:
    if result['error'] is not None:
      of = f' {result["case"]}' if 'case' in result else ''
      line = f'{result["target"]}{of}: {result["error"]}'
      console.print(line, markup=False)


def _bundles(schedule: dict[str, Any]) -> str:
  """'452 (33, 136)': of every step, and of what only some steps do."""
  some = ', '.join(map(str, schedule['conditions']))
  return f'{schedule["step"]} ({some})' if some else str(schedule['step'])


def _count(number: float | None) -> str:
  return 'not told' if number is None else display.count(number)


def _exchange(found: dict[str, int] | None) -> str:
  if found is None:
    return '-'
  some = ' or more' if found['unknown'] else ''
  return f'{found["bytes"] / 1e6:,.1f} MB{some} in {found["count"]}'
