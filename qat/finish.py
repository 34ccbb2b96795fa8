"""What a run says first and last: sizes, sensitivity, samples, a report."""

from collections.abc import Callable
import itertools
import json
import math
import pathlib
from typing import Any

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict
import numpy as np

from qat import carried
from qat import config as config_lib
from qat import display
from qat import metrics
from qat import report
from qat import sensitivity
from qat import sensitivity_files
from qat import step as step_lib
from qat import windows
from qat.data import dataset as dataset_lib
from qat.data import loader as loader_lib
from qat.infer import generate
from qat.nn import capture
from qat.nn import stacked
from qat.nn import transformer
from qat.quant import composed
from qat.quant import packing
from qat.quant import rules as rules_lib

SAMPLES = 'samples.jsonl'
SUMMARY = 'summary.json'


def bits_per_weight(params: Any, rules: rules_lib.Rules) -> float:
  """Mean bits of the linear layers' weights; 16 for what is not quantized.

  The bits of the weights alone, as papers count them: see `rules.Spec.bits`. A
  scale for each of a paper's matrices adds less than 0.001 bits; 16-bit scales
  of groups of 64 would add 0.25. A matrix that was quantized after training
  counts all that a file keeps of it.

  Args:
    params: the parameters; their shapes are enough where nothing is quantized.
    rules: the model's.
  """

  def read(leaf):
    if composed.is_quantized(leaf):  # Of all processes, where there are more.
      return carried.unpacked(jax.tree.map(np.asarray, leaf))
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)

  params = jax.tree.map(read, params, is_leaf=composed.is_quantized)
  bits = weights = 0
  for path, kernel in rules_lib.kernels(stacked.unstacked(params)).items():
    size = math.prod(kernel.shape)
    weights += size
    if composed.is_quantized(kernel):
      bits += packing.stored_bits(kernel)
    else:
      bits += size * rules.find(path).bits
  return bits / weights


def parameter_count(program: step_lib.Program) -> int:
  """Entries of all parameters; of a quantized matrix, those of the matrix."""
  leaves = jax.tree.leaves(
    program.abstract.params, is_leaf=composed.is_quantized
  )
  return sum(math.prod(leaf.shape) for leaf in leaves)


def introduction(program: step_lib.Program, params: Any, peak: float) -> str:
  """A run's first line.

  Args:
    program: the run's program.
    params: the parameters.
    peak: the measured FLOP/s of all devices.
  """
  config = program.config
  tokens = config.data.batch_size * config.data.seq_len
  platform = program.mesh.devices.flat[0].platform
  bits = bits_per_weight(params, program.model.rules)
  return (
    f'{config.name}: {display.count(parameter_count(program))} parameters,'
    f' {bits:.2f} bits a weight in the blocks;'
    f' {display.count(tokens)} tokens a step on {program.mesh.size}'
    f' {platform} device(s) with a measured peak of'
    f' {display.count(peak)}FLOP/s'
  )


def check(config: ConfigDict, dataset: dataset_lib.Dataset) -> None:
  """Tries what is otherwise done only when the training has ended.

  Raises:
    ConfigError: samples are longer than the model takes, or the data set has
      too few windows for the sensitivity.
  """
  most = config.model.max_positions
  for prompt, ids in _prompts(config, dataset):
    if 0 < most < len(ids) + config.sample.tokens:
      raise config_lib.ConfigError(
        f'config.sample.tokens={config.sample.tokens} after the {len(ids)}'
        f' tokens of {prompt!r} (config.sample.prompts) are more than the model'
        f' takes (config.model.max_positions={most}); ask for at most'
        f' {max(0, most - len(ids))}, 0 for no samples.'
      )
  try:
    if config.sensitivity.sequences:
      _calibration(config, dataset)
  except ValueError as error:
    raise config_lib.ConfigError(
      f'config.sensitivity.sequences={config.sensitivity.sequences}: {error}'
    ) from error


def _calibration(
  config: ConfigDict, dataset: dataset_lib.Dataset
) -> np.ndarray:
  """The first batch of another shuffle of the training split.

  It is fixed for a run, and the same for all runs with its seed.
  """
  return loader_lib.calibration_batch(
    dataset.path,
    seq_len=config.data.seq_len,
    sequences=config.sensitivity.sequences,
    seed=config.seed + 1,
  )


def _prompts(
  config: ConfigDict, dataset: dataset_lib.Dataset
) -> list[tuple[str, list[int]]]:
  """Each prompt to sample from, with its tokens, begun as texts begin."""
  if not config.sample.tokens:
    return []
  start = windows.begin(config, dataset.tokenizer, dataset.eot_id)
  return [
    (prompt, [*start, *ids] or [dataset.eot_id])
    for prompt in config.sample.prompts
    for ids in [dataset.tokenizer.encode(prompt, add_special_tokens=False).ids]
  ]


def study(
  program: step_lib.Program,
  params: Any,
  dataset: dataset_lib.Dataset,
  workdir: pathlib.Path,
  log: metrics.Logger,
  step: int,
  hurry: Callable[[], object] = lambda: False,
) -> bool:
  """Measures and writes the sensitivity of every quantized layer, if asked for.

  `hurry` is asked before each layer; true ends the study without a result.

  Returns:
    Whether it was done.
  """
  config = program.config
  if not config.sensitivity.sequences:
    return True
  tokens_BT = _calibration(config, dataset)
  if program.mesh.size > 1:  # Every device then studies the whole.
    whole = NamedSharding(program.mesh, P())
    params = jax.jit(lambda p: p, out_shardings=whole)(params)
    tokens_BT = jax.device_put(tokens_BT, whole)
  records = capture.linear_records(program.model, params, tokens_BT)
  analysis = sensitivity.analyse(
    itertools.takewhile(lambda _: not hurry(), records),
    config.sensitivity.damping,
  )
  if hurry():
    return False
  if not analysis:
    return True
  if jax.process_index() == 0:
    sensitivity_files.save(workdir, step, analysis)
  log.scalars(step, sensitivity.scalars(analysis))
  return True


def _samples(
  program: step_lib.Program, params: Any, dataset: dataset_lib.Dataset
) -> list[dict[str, Any]]:
  """A continuation of each of the config's prompts, begun as texts begin."""
  c = program.config.sample
  model, params = transformer.unscanned(program.model, params)
  samples = []
  for prompt, begun in _prompts(program.config, dataset):
    new = generate.generate(
      model,
      params,
      begun,
      tokens=c.tokens,
      temperature=c.temperature,
      top_k=c.top_k,
      top_p=c.top_p,
      seed=program.config.seed,
      stop=dataset.eot_id,
    )
    ids = dataset.tokenizer.encode(prompt, add_special_tokens=False).ids
    text = dataset.tokenizer.decode([*ids, *new])
    step = program.config.train.steps
    samples.append({'step': step, 'prompt': prompt, 'text': text})
  return samples


def finish(
  program: step_lib.Program,
  params: Any,
  dataset: dataset_lib.Dataset,
  workdir: pathlib.Path,
  log: metrics.Logger,
  evaluated: dict[str, float],
  seconds: float,
) -> None:
  """Writes sensitivity, samples, summary and report; prints the summary.

  Args:
    program: the run's program.
    params: the final parameters.
    dataset: the open data set.
    workdir: folder of the run.
    log: the open log.
    evaluated: the last evaluation.
    seconds: since the start of the run, over all its processes.
  """
  config = program.config
  study(program, params, dataset, workdir, log, config.train.steps)
  samples = _samples(program, params, dataset) if config.sample.tokens else []
  if jax.process_index() != 0:
    return
  for sample in samples:
    log.say(f'> {sample["text"]}')
  tokens_per_step = config.data.batch_size * config.data.seq_len
  speeds = [
    row['train/tokens_per_s']
    for row in metrics.read(workdir)
    if 'train/tokens_per_s' in row
  ]
  valid = dataset.manifest['splits']['valid']
  summary = {
    **evaluated,
    'baseline/gzip_bits_per_byte': valid['gzip_bits_per_byte'],
    'baseline/unigram_bits_per_byte': valid['unigram_bits_per_byte'],
    'parameters': parameter_count(program),
    'bits_per_weight': bits_per_weight(params, program.model.rules),
    'steps': config.train.steps,
    'tokens': config.train.steps * tokens_per_step,
    'tokens_per_s': float(np.median(speeds)),
    'seconds': round(seconds, 1),
  }
  with metrics.replacing(workdir / SAMPLES) as file:
    file.write(''.join(json.dumps(s) + '\n' for s in samples).encode())
  with metrics.replacing(workdir / SUMMARY) as file:
    file.write((json.dumps(summary, indent=2) + '\n').encode())
  path = report.write(workdir)
  display.summary_table(log.console, config.name, summary)
  log.say(f'Report: {path}')
