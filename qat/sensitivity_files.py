"""An analysis of sensitivity as files of a run.

sensitivity/<step>.json   the numbers of each layer
sensitivity/<step>.npz    the maps
"""

from collections.abc import Mapping
import json
from pathlib import Path
from typing import Any
import zipfile
import zlib

import numpy as np

from qat import metrics
from qat import sensitivity

FOLDER = 'sensitivity'
# What reading a damaged file can raise, by format and place of the damage.
_DAMAGE = (
  AttributeError,
  EOFError,
  FileNotFoundError,
  KeyError,
  NotImplementedError,
  OverflowError,
  RecursionError,
  TypeError,
  ValueError,
  zipfile.BadZipFile,
  zlib.error,
)


def save(workdir: Path, step: int, analysis: sensitivity.Analysis) -> None:
  """Writes sensitivity/<step>.json (numbers) and <step>.npz (maps).

  Args:
    workdir: folder of the run.
    step: optimizer steps the weights have taken.
    analysis: from `sensitivity.analyse`.
  """
  folder = Path(workdir) / FOLDER
  folder.mkdir(exist_ok=True)
  content = {
    'step': step,
    'edges': sensitivity.EDGES.tolist(),
    'linears': numbers(analysis),
  }
  maps = {
    f'{kind}/{path}': stats.map_NK
    for path, kinds in analysis.items()
    for kind, stats in kinds.items()
  }
  # The .json comes last: where it stands, both files are whole.
  with metrics.replacing(folder / f'{step}.npz') as file:
    np.savez_compressed(file, **maps)
  with metrics.replacing(folder / f'{step}.json') as file:
    file.write(json.dumps(content, allow_nan=False).encode())


def steps(workdir: Path) -> list[int]:
  """The steps of a run that have a saved analysis, in order."""
  names = (p.stem for p in (Path(workdir) / FOLDER).glob('*.json'))
  return sorted(int(name) for name in names if name.isdecimal())


def load(workdir: Path, step: int) -> sensitivity.Analysis:
  """What `save` wrote.

  Args:
    workdir: folder of the run.
    step: one of `steps(workdir)`.

  Raises:
    FileNotFoundError: there is no such analysis.
    ValueError: a file is damaged; the message names it.
  """
  path = Path(workdir) / FOLDER / f'{step}.json'
  if not path.is_file():
    raise FileNotFoundError(
      f'No sensitivity of step {step} in {workdir}; there are {steps(workdir)}.'
    )
  try:
    linears = json.loads(path.read_bytes())['linears']
    with (
      path.with_suffix('.npz').open('rb') as file,
      np.load(file, allow_pickle=False) as maps,
    ):
      return {
        name: {
          kind: _from_numbers(kinds[kind], maps[f'{kind}/{name}'])
          for kind in sensitivity.KINDS
        }
        for name, kinds in linears.items()
      }
  except _DAMAGE as error:
    raise ValueError(
      f'{path} or the .npz beside it is damaged: {error}. Delete both to go on '
      'without them.'
    ) from error


def numbers(
  analysis: sensitivity.Analysis,
) -> dict[str, dict[str, dict[str, Any]]]:
  """All of an analysis but its maps, for JSON: path -> kind -> name -> ...."""
  return {
    path: {
      kind: {
        'gini': stats.gini,
        'top1': stats.top1,
        'mean': stats.mean,
        'histogram': stats.histogram.tolist(),
      }
      for kind, stats in kinds.items()
    }
    for path, kinds in analysis.items()
  }


def _from_numbers(
  saved: Mapping[str, Any], map_NK: np.ndarray
) -> sensitivity.Stats:
  histogram = np.asarray(saved['histogram'], np.float32)
  if histogram.shape != (len(sensitivity.EDGES) - 1,):
    raise ValueError(f'a histogram of {histogram.shape} bins')
  if map_NK.ndim != 2 or max(map_NK.shape) > sensitivity.MAP_SIDE:
    raise ValueError(f'a map of shape {map_NK.shape}')
  return sensitivity.Stats(
    gini=float(saved['gini']),
    top1=float(saved['top1']),
    mean=float(saved['mean']),
    histogram=histogram,
    map_NK=map_NK,
  )
