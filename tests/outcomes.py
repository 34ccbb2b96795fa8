"""What two runs must have in common to be the same run."""

import pathlib
from typing import Any

from qat import manifest
from qat import metrics


def outcome(workdir: pathlib.Path) -> tuple[int, Any, dict[int, float]]:
  """The last step, its leaves' digests, and the loss of each step, exactly."""
  last = manifest.steps(workdir / 'checkpoints')[-1]
  leaves = manifest.read(workdir / 'checkpoints' / str(last))['leaves']
  losses = {
    row['step']: row['train/loss']
    for row in metrics.read(workdir)
    if 'train/loss' in row
  }
  return last, leaves, losses
