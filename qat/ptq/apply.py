"""Quantization of a finished model: the walk over its blocks.

A config of `configs/ptq` names an algorithm, and the steps follow from it:

1. smoothquant, dbellquant: scales of the inputs that norms give, from the clean
   model, folded into the norms' gains and the matrices.
2. tacq: a copy quantized by GPTQ, gradients of the clean model, and from both
   the weights to keep.
3. omniquant: grids and transformations of all blocks, trained block by block;
   the transformations are folded. The result may keep its matrices in float
   beside what their grids follow from (`config.latent`), to be trained on.
4. all: block by block, group by group of layers that read one input, a matrix
   is quantized on the inputs that the part of the model that is quantized
   already gives it; rtn, splitquant and omniquant need no inputs.

What is on the device, beside the parameters if these are handed in there: one
block in float32, and what is computed from it and a batch of calibration
sequences. `programs` tells how much memory that is. The hidden states of all
sequences are on the host, as are Gram matrices between two uses, and what is
finished lies in a `partial.Store`, on disk. TaCQ also holds a number in float32
for every weight on the host, its gradient and then its score.
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import time
from typing import Any
from typing import NamedTuple

import jax
from jax import numpy as jnp
from ml_collections import ConfigDict
import numpy as np

from qat.ptq import calibrate
from qat.ptq import cores
from qat.ptq import examples as examples_lib
from qat.ptq import job as job_lib
from qat.ptq import omniquant
from qat.ptq import omniquant_train
from qat.ptq import partial
from qat.ptq import plan as plan_lib
from qat.ptq import prepare
from qat.quant import packing


@dataclasses.dataclass(frozen=True)
class Record:
  """How one matrix was quantized.

  Attributes:
    path: of the layer, 'block_0/attn/q'.
    inputs: K.
    outputs: N.
    stored_bits: of what a file keeps of it, all together.
    weight_error: |W - Q|^2 / |W|^2.
    output_error: |X W - X Q|^2 / |X W|^2 on the calibration inputs; None where
      none were taken.
    seconds: for quantizing it; of the first of a shape also for compiling.
  """

  path: str
  inputs: int
  outputs: int
  stored_bits: int
  weight_error: float
  output_error: float | None
  seconds: float

  @property
  def bits(self) -> float:
    """Bits of a weight, counted from what a file stores."""
    return self.stored_bits / (self.inputs * self.outputs)


@dataclasses.dataclass(frozen=True)
class Result:
  """A quantized model.

  Attributes:
    config: of the model, with rules that say how inputs are quantized; and
      weights, where these are latent.
    leaves: a function that yields the parameters by path, in the order of the
      tree, 'block_0/attn/q/kernel'; that of a quantized layer is a
      `composed.Quantized` of NumPy arrays, read from the store; or, if it is
      latent, a float array, and what its grid follows from is beside it.
    records: one for each quantized matrix, in the order of the tree.
    seconds: step -> how long it took in this process.
    notes: step -> what a method tells about it, JSON-able.
  """

  config: ConfigDict
  leaves: Callable[[], Iterator[tuple[str, Any]]]
  records: list[Record]
  seconds: dict[str, float]
  notes: dict[str, Any]


def quantize(
  config: ConfigDict,
  params: Mapping[str, Any],
  ptq: ConfigDict,
  examples: examples_lib.Examples | None,
  store: partial.Store,
  show: job_lib.Show = lambda done, total, words: None,
) -> Result:
  """Quantizes a model.

  Args:
    config: of the model; full precision, not scanned.
    params: its parameters, float arrays of JAX or NumPy.
    ptq: a config of `configs/ptq`.
    examples: what it is calibrated on; None where `plan.needs_examples` says
      that it needs none.
    store: where finished parts stand. What it has is not computed again, and
      the result is the same in every bit.
    show: told often of (steps done, all steps, a few words).

  Raises:
    ValueError: the config does not fit the model, or a value is not finite.
  """
  job = job_lib.Job(config, params, ptq, examples, store, show)
  seconds, notes, keep = {}, {}, None

  def timed(name: str, step: Callable[[], Any]) -> Any:
    start = time.monotonic()
    found = step()
    seconds[name] = time.monotonic() - start
    return found

  if job.plan.scales:
    notes['scales'] = timed('scales', lambda: prepare.find_scales(job))
  if job.plan.corrupt:
    timed('corrupted copy', lambda: _walk(job, 'corrupt', job.plan.corrupt))
    keep, notes['kept weights'] = timed(
      'gradients', lambda: prepare.choose_kept(job)
    )
  if job.plan.epochs is not None:
    notes['losses'] = timed('training', lambda: omniquant_train.learn(job))
  records = timed(
    'quantization', lambda: _walk(job, 'quantized', job.plan.core, keep)
  )
  return Result(job.plan.result, lambda: _leaves(job), records, seconds, notes)


def _walk(
  job: job_lib.Job,
  stage: str,
  core: cores.Core,
  keep: prepare.Keep | None = None,
) -> list[Record]:
  """Quantizes block after block; the store then has all of the stage."""
  records, calibration = [], None
  missing = [b for b in job.plan.layers if not job.store.has(f'{stage}-{b}')]
  if missing and job.plan.statistics:
    calibration = job.calibration(job.plan.config)
  for block in job.blocks:
    names, part = job.plan.layers.get(block, ()), f'{stage}-{block}'
    if block in missing:
      done = _quantize_block(job, stage, core, keep, block, calibration)
      job.store.save_packed(part, *done)
    elif names:
      job.step(f'{stage}, {block}', len(names))
    if calibration and block == missing[-1]:
      calibration = None
    leaves, notes = job.store.load_packed(part) if names else ({}, [])
    records += [Record(**note) for note in notes]
    # Blocks that an earlier process has quantized are passed, too, so that the
    # hidden states after them are what they were there.
    if calibration:
      calibration.advance(_quantized(job, block, leaves))
  return records


def _quantized(
  job: job_lib.Job, block: str, leaves: Mapping[str, Any]
) -> dict[str, Any]:
  """A block's parameters with the values of its quantized matrices."""
  params, bias = job.block(block), job.plan.core.bias
  for path, leaf in leaves.items():
    name = path.removeprefix(f'{block}/')
    params = calibrate.with_kernel(params, name, leaf.dequantize(), bias)
  return params


def _quantize_block(
  job: job_lib.Job,
  stage: str,
  core: cores.Core,
  keep: prepare.Keep | None,
  block: str,
  calibration: calibrate.Calibration | None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
  """The packed matrices of a block by path, and the fields of their Records."""
  # Without calibration a matrix is taken as it came, maybe in 16 bits.
  folded = job.scales or job.learned
  params = job.block(block) if calibration or folded else job.params[block]
  learned = job.learned.load(block) if job.learned else {}
  groups = _chosen(job.plan, block)
  statistics: dict[str, calibrate.Statistics] = {}
  if calibration and not job.ptq.true_sequential:
    firsts = [names[0] for names in groups]
    statistics = calibration.statistics(params, firsts, block)
  packed, notes = {}, []
  for names in groups:
    if calibration and job.ptq.true_sequential:
      statistics = calibration.statistics(params, names[:1], block)
    mine = statistics.get(names[0])
    found = _quantize_group(
      job, stage, core, keep, block, names, params, mine, learned
    )
    for name, one in found.items():
      path, w_KN = f'{block}/{name}', calibrate.kernel(params, name)
      packed[path] = one.packed
      notes.append(dataclasses.asdict(_record(path, w_KN, one, mine)))
      del w_KN  # Nothing of a group is to stay on the device but its values.
      if calibration:
        params = calibrate.with_kernel(params, name, one.value_KN, core.bias)
  return packed, notes


class _Quantized(NamedTuple):
  """A matrix as it is stored, its values on the device, and the time taken."""

  packed: tuple[packing.Arrays, packing.Meta]
  value_KN: jax.Array
  seconds: float


def _quantize_group(
  job: job_lib.Job,
  stage: str,
  core: cores.Core,
  keep: prepare.Keep | None,
  block: str,
  names: Sequence[str],
  params: Mapping[str, Any],
  statistics: calibrate.Statistics | None,
  learned: Mapping[str, np.ndarray],
) -> dict[str, _Quantized]:
  """Layers of a block that read one input, by name."""
  found, prepared = {}, None
  for name in names:
    path, w_KN = f'{block}/{name}', calibrate.kernel(params, name)
    start = time.monotonic()
    try:
      _check_finite(w_KN, 'weights')
      if learned:
        prepared = omniquant.clip(learned, name)
      elif prepared is None:
        prepared = core.prepare(statistics)
      keep_KN = keep and keep(path)
      leaf = jax.block_until_ready(core.quantize(w_KN, prepared, keep_KN))
      value_KN = leaf.dequantize()
      _check_finite(value_KN, 'quantized weights')
    except ValueError as error:
      raise ValueError(f'{path}: {error}') from error
    seconds = time.monotonic() - start
    found[name] = _Quantized(packing.pack(leaf), value_KN, seconds)
    del w_KN, keep_KN, leaf, value_KN  # Room for the next one.
    job.step(f'{stage}, {path}')
  return found


def _record(
  path: str,
  w_KN: jax.Array,
  found: _Quantized,
  statistics: calibrate.Statistics | None,
) -> Record:
  weight, output = errors(
    w_KN, found.value_KN, statistics and statistics.gram_KK
  )
  return Record(
    path,
    *w_KN.shape,
    stored_bits=packing.bits(found.packed[0]),
    weight_error=float(weight),
    output_error=None if output is None else float(output),
    seconds=found.seconds,
  )


def _chosen(plan: plan_lib.Plan, block: str) -> list[Sequence[str]]:
  """The layers of a block that are quantized, by group."""
  groups = [
    [name for name in group.layers if name in plan.layers[block]]
    for group in plan.groups
  ]
  return [names for names in groups if names]


def _check_finite(w_KN: jax.Array, what: str) -> None:
  if not bool(jnp.all(jnp.isfinite(w_KN))):
    raise ValueError(f'the {what} are not all finite (NaN or infinite).')


def _leaves(job: job_lib.Job) -> Iterator[tuple[str, Any]]:
  """The parameters of the quantized model by path."""
  for top, branch in job.params.items():
    kernels = {}
    if top in job.plan.layers and not job.plan.latent:
      kernels, _ = job.store.load_packed(f'quantized-{top}')
    if (job.scales or job.learned) and top in job.blocks:
      branch = jax.device_get(job.block(top))
    if job.plan.latent and top in job.blocks:
      branch = omniquant_train.with_clips(branch, job.learned.load(top))
    for keys, leaf in jax.tree_util.tree_leaves_with_path({top: branch}):
      path = '/'.join(key.key for key in keys)
      layer, _, last = path.rpartition('/')
      if layer in kernels and last == 'kernel':
        leaf = kernels[layer]
      elif layer in kernels and last == 'bias':
        leaf = job.plan.core.bias(np.asarray(leaf))
      yield path, leaf


@jax.jit
def errors(
  w_KN: jax.Array, q_KN: jax.Array, gram_KK: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
  """Relative squared errors of the weights and of the outputs.

  Args:
    w_KN: a matrix.
    q_KN: the values that it was given.
    gram_KK: of its inputs; None: the errors of outputs are not wanted.
  """

  def ratio(error: jax.Array, whole: jax.Array) -> jax.Array:
    # A matrix of zeros, or one that reads only zeros, has no error.
    return jnp.where(whole == 0, error, error / jnp.where(whole == 0, 1, whole))

  def outputs(a_KN: jax.Array) -> jax.Array:
    return jnp.sum(a_KN * jnp.matmul(gram_KK, a_KN, precision='highest'))

  w_KN = w_KN.astype(jnp.float32)
  error_KN = w_KN - q_KN
  weight = ratio(jnp.sum(error_KN**2), jnp.sum(w_KN**2))
  if gram_KK is None:
    return weight, None
  return weight, ratio(outputs(error_KN), outputs(w_KN))
