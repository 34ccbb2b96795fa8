"""Finished runs side by side, at equal steps and at equal times."""

from collections.abc import Sequence
import pathlib
from typing import NamedTuple

import numpy as np

from qat import metrics

TRAIN, EVAL = 'train/loss', 'eval/loss'


class Curve(NamedTuple):
  """What a run has logged.

  Attributes:
    name: of its folder.
    steps: of the rows with a training loss.
    seconds: of training until then; evaluation and saving are left out.
    losses: of these steps' batches.
    eval_steps: of the evaluations.
    eval_seconds: of training until then.
    eval_losses: nats per token of the validation split.
  """

  name: str
  steps: np.ndarray
  seconds: np.ndarray
  losses: np.ndarray
  eval_steps: np.ndarray
  eval_seconds: np.ndarray
  eval_losses: np.ndarray


class Row(NamedTuple):
  """A run among others.

  Attributes:
    name: of the run.
    steps: it has made.
    seconds: of training.
    at_step: its latest evaluation at the number of steps that all runs have,
      or before.
    at_time: the same for the seconds that all runs have trained.
    final: its last evaluation.
  """

  name: str
  steps: int
  seconds: float
  at_step: float
  at_time: float
  final: float


def read(workdir: pathlib.Path) -> Curve:
  """Reads a run's metrics.jsonl.

  Raises:
    FileNotFoundError: there is none.
    ValueError: it is damaged, or has no training or no evaluation.
  """
  rows = metrics.read(workdir)
  trained = [row for row in rows if TRAIN in row]
  evaluated = [row for row in rows if EVAL in row]
  if not trained or not evaluated:
    raise ValueError(
      f'{workdir} has logged {len(trained)} steps and {len(evaluated)}'
      ' evaluations; a run with both can be compared.'
    )
  steps = np.array([row['step'] for row in trained])
  tokens = np.array([row['train/tokens'] for row in trained])
  speeds = np.array([row['train/tokens_per_s'] for row in trained])
  seconds = np.cumsum(np.diff(tokens, prepend=0.0) / speeds)
  eval_steps = np.array([row['step'] for row in evaluated])
  # From 0: an evaluation may be before the first step, or between two rows.
  at = np.interp(eval_steps, np.r_[0, steps], np.r_[0.0, seconds])
  return Curve(
    pathlib.Path(workdir).absolute().name,
    steps,
    seconds,
    np.array([row[TRAIN] for row in trained]),
    eval_steps,
    at,
    np.array([row[EVAL] for row in evaluated]),
  )


def compare(curves: Sequence[Curve]) -> list[Row]:
  """The runs at the steps and at the seconds that all of them have."""
  steps = min(curve.steps[-1] for curve in curves)
  seconds = min(curve.seconds[-1] for curve in curves)
  return [
    Row(
      curve.name,
      int(curve.steps[-1]),
      float(curve.seconds[-1]),
      _latest(curve.eval_steps, curve.eval_losses, steps),
      _latest(curve.eval_seconds, curve.eval_losses, seconds),
      float(curve.eval_losses[-1]),
    )
    for curve in curves
  ]


def _latest(places: np.ndarray, losses: np.ndarray, end: float) -> float:
  """The last loss at a place that is not beyond the end; NaN without any."""
  reached = losses[places <= end * (1 + 1e-9)]
  return float(reached[-1]) if len(reached) else float('nan')
