"""The sensitivities of several finished runs on one calibration batch.

A run logs its own sensitivities while it trains, on the inputs that its config
names. To compare runs, all of them have to read the same tokens, be damped
alike, and include the run of full precision, which logs none: so the study
computes everything anew, from the newest checkpoints.
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
import dataclasses
from pathlib import Path
import re
from typing import Any

import jax
from ml_collections import ConfigDict
import numpy as np

from qat import carried
from qat import config as config_lib
from qat import sensitivity
from qat import sensitivity_files
from qat.data import dataset as dataset_lib
from qat.data import loader as loader_lib
from qat.infer import load
from qat.nn import capture
from qat.nn import transformer

# A feed-forward layer's way back: of a gated one, and of each branch.
DOWN = r'block_{}/ffn/(.*/)?down'


@dataclasses.dataclass(frozen=True)
class Calibration:
  """The inputs that all runs of a study read.

  Attributes:
    dataset: folder of the data set; its training split is read.
    digest: of that data set.
    sequences: how many.
    seq_len: tokens of a sequence.
    seed: of the shuffle of the split; the sequences are its first.
    damping: share of the mean diagonal that is added before the inversion.
  """

  dataset: str
  digest: str
  sequences: int
  seq_len: int
  seed: int
  damping: float


@dataclasses.dataclass(frozen=True)
class Analysed:
  """A run of a study.

  Attributes:
    label: what the study calls the run.
    workdir: its folder.
    step: of the checkpoint.
    analysis: of every linear layer, also of its weights if they were binary.
    chosen: paths of the layers that the study is about.
  """

  label: str
  workdir: str
  step: int
  analysis: sensitivity.Analysis
  chosen: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Study:
  """Runs on one calibration batch."""

  calibration: Calibration
  runs: tuple[Analysed, ...]


def study(
  workdirs: Sequence[Path],
  *,
  layer: str | None,
  dataset: str | None,
  sequences: int | None,
  seed: int | None,
  damping: float | None,
  show: Callable[[int, int, str], None],
) -> Study:
  """Analyses every linear layer of several runs; changes nothing in them.

  Args:
    workdirs: folders of the runs, each once.
    layer: regex of the whole paths of the layers to choose, such as
      'block_0/attn/q'; a path without its number stands for all experts. None:
      the down projections of the last block of each run.
    dataset: folder of a data set to calibrate on; None: that of the runs.
    sequences: calibration sequences. None, here and below: as in the config of
      the first run.
    seed: of the calibration batch. None: one more than that run's, which gives
      the batch that the run itself is studied on.
    damping: share of the mean diagonal that is added before the inversion.
    show: is told of the layers done, of how many, and of the current one.

  Raises:
    FileNotFoundError: a run, its checkpoint or its data set is missing.
    ValueError: the runs do not compare, no layer of one is chosen, or a layer
      cannot be analysed; the message names the run.
    CorruptError: all checkpoints of a run are damaged.
  """
  if len({path.resolve() for path in workdirs}) < len(workdirs):
    raise ValueError('A run is given twice.')
  configs = [config_lib.load(workdir) for workdir in workdirs]
  data = _common_dataset(workdirs, configs, dataset)
  own = configs[0].sensitivity
  sequences = own.sequences if sequences is None else sequences
  if sequences < 1:
    raise ValueError(
      f'{sequences} calibration sequences are too few; give --sequences, where'
      f' config.sensitivity.sequences of {workdirs[0]} is 0.'
    )
  calibration = Calibration(
    dataset=str(data.path),
    digest=data.digest,
    sequences=sequences,
    # The longest that every run was trained on.
    seq_len=min(config.data.seq_len for config in configs),
    seed=configs[0].seed + 1 if seed is None else seed,
    damping=own.damping if damping is None else damping,
  )
  tokens_BT = loader_lib.calibration_batch(
    calibration.dataset,
    seq_len=calibration.seq_len,
    sequences=calibration.sequences,
    seed=calibration.seed,
  )
  all_paths = [
    _paths(config, workdir, tokens_BT)
    for config, workdir in zip(configs, workdirs, strict=True)
  ]
  chosen = [
    _choose(layer, paths, config, workdir)
    for paths, config, workdir in zip(all_paths, configs, workdirs, strict=True)
  ]
  total, done = sum(map(len, all_paths)), 0
  analysed = []
  for label, workdir, paths, mine in zip(
    _labels(workdirs), workdirs, all_paths, chosen, strict=True
  ):
    step, analysis = _analyse(
      workdir,
      tokens_BT,
      calibration.damping,
      # Each is called before the next run is begun.
      lambda i, path, done=done, label=label: show(
        done + i, total, f'{label}: {path}'
      ),
    )
    analysed.append(Analysed(label, str(workdir), step, analysis, mine))
    done += len(paths)
  show(total, total, 'done')
  return Study(calibration, tuple(analysed))


def to_json(made: Study) -> dict[str, Any]:
  """The numbers of a study without its maps, for a JSON file."""
  return {
    'calibration': dataclasses.asdict(made.calibration),
    'edges': sensitivity.EDGES.tolist(),
    'runs': [
      {
        'label': run.label,
        'workdir': run.workdir,
        'step': run.step,
        'chosen': list(run.chosen),
        'linears': sensitivity_files.numbers(run.analysis),
      }
      for run in made.runs
    ],
  }


def _common_dataset(
  workdirs: Sequence[Path], configs: Sequence[ConfigDict], other: str | None
) -> dataset_lib.Dataset:
  """The data set to calibrate on, which means the same to every run."""
  opened = [load.open_dataset(config) for config in configs]
  first = opened[0]
  for workdir, mine in zip(workdirs[1:], opened[1:], strict=True):
    if _tokenizer(mine) != _tokenizer(first):
      raise ValueError(
        f'{workdirs[0]} and {workdir} have different tokenizers ({first.path}'
        f' and {mine.path}), so no batch is the same text and the same tokens'
        ' for both. Study runs together that were trained with one tokenizer.'
      )
    if other is None and mine.digest != first.digest:
      raise ValueError(
        f'{workdirs[0]} and {workdir} were trained on different data sets'
        f' ({first.path} and {mine.path}). Name one that all of them read here:'
        f' --dataset={first.path}'
      )
  if other is None:
    return first
  chosen = dataset_lib.open_dataset(other)
  if _tokenizer(chosen) != _tokenizer(first):
    raise ValueError(
      f'{other} has another tokenizer than {workdirs[0]}, so its tokens mean'
      ' something else. Prepare the text with the tokenizer of the run:'
      f' --tokenizer {first.path / dataset_lib.TOKENIZER}'
      ' (scripts/prepare_data.py --help).'
    )
  return chosen


def _tokenizer(dataset: dataset_lib.Dataset) -> str:
  return dataset.manifest['tokenizer_sha256']


def _paths(
  config: ConfigDict, workdir: Path, tokens_BT: np.ndarray
) -> list[str]:
  """The paths of all records of a run, without a computation."""
  config = config.copy_and_resolve_references().unlock()
  config.mesh.data = config.mesh.fsdp = 1
  model = transformer.build(config, jax.default_backend(), 1)
  paths = []

  def trace(params: Any) -> None:
    records = capture.linear_records(
      model, params, tokens_BT, full_precision=True
    )
    paths.extend(record.path for record in records)

  params = carried.with_shapes(
    transformer.abstract_params(model), carried.saved(workdir / 'checkpoints')
  )
  jax.eval_shape(trace, params)
  return paths


def _choose(
  layer: str | None, paths: Sequence[str], config: ConfigDict, workdir: Path
) -> tuple[str, ...]:
  regex = layer or DOWN.format(config.model.n_layers - 1)
  try:
    pattern = re.compile(rf'(?:{regex})(/\d+)?')
  except re.error as error:
    raise ValueError(f'--layer={regex!r} is no regex: {error}.') from error
  chosen = tuple(path for path in paths if pattern.fullmatch(path))
  if not chosen:
    raise ValueError(
      f'No linear layer of {workdir} is {regex!r}. Its layers are'
      f' {", ".join(paths)}. Layers of several runs can be alternatives:'
      " --layer='block_0/ffn/down|block_0/ffn/wide/down'"
    )
  return chosen


def _labels(workdirs: Sequence[Path]) -> list[str]:
  """Names of the folders where those differ, else the whole paths."""
  names = [path.resolve().name for path in workdirs]
  distinct = len(set(names)) == len(names)
  return names if distinct else [str(path) for path in workdirs]


def _analyse(
  workdir: Path,
  tokens_BT: np.ndarray,
  damping: float,
  show: Callable[[int, str], None],
) -> tuple[int, sensitivity.Analysis]:
  """The step of a run's newest checkpoint, and its analysis."""
  run = load.load_run(workdir)

  def shown() -> Iterator[capture.LinearRecord]:
    records = capture.linear_records(
      run.model, run.params, tokens_BT, full_precision=True
    )
    for i, record in enumerate(records):
      show(i, record.path)
      yield record

  try:
    return run.step, sensitivity.analyse(shown(), damping, binarized=True)
  except ValueError as error:
    raise ValueError(f'{workdir}: {error}') from error
