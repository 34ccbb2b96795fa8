"""What every benchmark tells beside its figures, and how it shows them."""

from collections.abc import Sequence
import os
import pathlib
import platform
import subprocess
import sys
from typing import Any

import jax
from rich import console as rich_console
from rich import table as rich_table

from qat import display


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


def console() -> rich_console.Console:
  """Wide enough for a table where nobody says how wide it may be."""
  return rich_console.Console(width=None if sys.stdout.isatty() else 110)


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
  console().print(table)
  return {'machine': machine(), 'commit': commit(), 'rows': list(rows)}


def _cell(value: Any) -> str:
  if isinstance(value, (int, float)) and value >= 10_000:
    return display.count(value)
  return f'{value:.3g}' if isinstance(value, float) else str(value)
