"""What a run's files say, read for the report; what is missing is empty."""

from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from qat import display
from qat import metrics
from qat import plots
from qat import sensitivity
from qat import sensitivity_files


@dataclasses.dataclass(frozen=True)
class Run:
  """What the files of a run hold; what is not there is empty.

  Attributes:
    config: config.json.
    series: of metrics.jsonl: key -> steps, values.
    summary: the numbers of summary.json.
    samples: the rows of samples.jsonl.
    sensitivity: the newest analysis.
  """

  config: dict[str, Any]
  series: plots.Series
  summary: dict[str, float]
  samples: list[dict[str, Any]]
  sensitivity: sensitivity.Analysis


def load(workdir: Path) -> Run:
  """Reads the files of a run.

  Args:
    workdir: folder of a run, finished or not.

  Raises:
    FileNotFoundError: the folder, or every file of a run in it, is missing.
    ValueError: a file is damaged; the message names it.
  """
  workdir = Path(workdir)
  names = ('config.json', metrics.FILE, 'summary.json')
  if not any((workdir / name).is_file() for name in names):
    raise FileNotFoundError(
      f'{workdir} has none of {", ".join(names)}; is it the folder of a run?'
    )
  steps = sensitivity_files.steps(workdir)
  return Run(
    config=_read_object(workdir / 'config.json'),
    series=_series(metrics.read(workdir))
    if (workdir / metrics.FILE).is_file()
    else {},
    summary=_read_summary(workdir / 'summary.json'),
    samples=_read_samples(workdir / 'samples.jsonl'),
    sensitivity=sensitivity_files.load(workdir, steps[-1]) if steps else {},
  )


def final_numbers(run: Run) -> dict[str, float]:
  """The summary; the latest numbers of a run that has none, or has gone on."""
  last = max((float(at[-1]) for at, _ in run.series.values()), default=0.0)
  if not run.series or run.summary.get('steps', -1) >= last:
    return run.summary
  latest = {key: float(values[-1]) for key, (_, values) in run.series.items()}
  for name in ('tokens', 'tokens_per_s'):
    if f'train/{name}' in latest:
      latest[name] = latest[f'train/{name}']
  latest['steps'] = last
  return {key: latest[key] for key, _, _ in display.SUMMARY if key in latest}


def _series(rows: Sequence[Mapping[str, Any]]) -> plots.Series:
  columns: dict[str, tuple[list[int], list[float]]] = {}
  for row in rows:
    for key, value in row.items():
      if key not in ('step', 'time') and isinstance(value, float):
        steps, values = columns.setdefault(key, ([], []))
        steps.append(row['step'])
        values.append(value)
  return {
    key: (np.array(steps), np.array(values))
    for key, (steps, values) in columns.items()
  }


def _read_object(path: Path) -> dict[str, Any]:
  if not path.is_file():
    return {}
  try:
    content = json.loads(path.read_bytes())
  except (ValueError, RecursionError) as error:
    raise _damaged(path, str(error)) from error
  if not isinstance(content, dict):
    raise _damaged(path, 'it is not an object')
  return content


def _read_summary(path: Path) -> dict[str, float]:
  try:
    return {
      key: float(value)
      for key, value in _read_object(path).items()
      if isinstance(value, int | float)
    }
  except OverflowError as error:  # JSON's integers have no bound.
    raise _damaged(path, str(error)) from error


def _read_samples(path: Path) -> list[dict[str, Any]]:
  if not path.is_file():
    return []
  rows = metrics.read_rows(path)
  for row in rows:
    if not all(isinstance(row.get(key), str) for key in ('prompt', 'text')):
      why = f'its row of step {row["step"]} lacks the texts "prompt" and "text"'
      raise _damaged(path, why)
  return rows


def _damaged(path: Path, why: str) -> ValueError:
  return ValueError(
    f'{path} is damaged: {why}. Move it away for a report without it.'
  )
