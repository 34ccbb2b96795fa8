"""What some methods find out about the whole model before it is quantized."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from qat.ptq import calibrate
from qat.ptq import gradients
from qat.ptq import job as job_lib
from qat.ptq import tacq

# (path, w_KN, the same of the corrupted copy) -> bool, which weights are kept.
Keep = Callable[[str, jax.Array, Any], jax.Array]


def find_scales(job: job_lib.Job) -> dict[str, Any]:
  """Sets `job.scales`, from the inputs of the clean model.

  Returns:
    What the method tells of each norm, JSON-able.
  """
  if job.store.has('scales'):
    job.step('scales', len(job.blocks))
  else:
    job.store.save('scales', *_new_scales(job))
  job.scales, notes = job.store.load('scales')
  return notes


def _new_scales(
  job: job_lib.Job,
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
  calibration = job.calibration(job.config)
  normed = [group for group in job.plan.groups if group.norm]
  firsts = [group.layers[0] for group in normed]
  found, notes = {}, {}
  for block in job.blocks:
    params = job.block(block)
    statistics = calibration.statistics(params, firsts, block)
    for group, first in zip(normed, firsts, strict=True):
      kernels = [calibrate.kernel(params, name) for name in group.layers]
      scale_K, note = job.plan.scales(statistics[first].absmax_K, kernels)
      scale_K = np.asarray(scale_K, np.float32)
      path = f'{block}/{group.norm}'
      if not np.all(np.isfinite(scale_K)) or np.any(scale_K == 0):
        raise ValueError(
          f'The scales to fold into {path} are not all finite and other than 0.'
          ' Look at the weights of the layers that read it.'
        )
      found[path] = scale_K
      if note is not None:
        notes[path] = note
    job.step(f'scales, {block}')
    if block != job.blocks[-1]:
      calibration.advance(params)
  return found, notes


def choose_kept(job: job_lib.Job) -> tuple[Keep, dict[str, Any]]:
  """TaCQ's choice of weights to keep, for which a corrupted copy is stored.

  Returns:
    A function that tells of a matrix which of its weights are kept, and what
    was found: the threshold, how many weights of how many are above it, and
    the clean model's mean loss on the examples, in nats.
  """
  sums, losses = gradients.absolute_gradients(
    job.config,
    job.params,
    job.examples,
    job.plan.layers,
    batch_size=job.ptq.calibration.gradient_batch,
    store=job.store,
    show=job.step,
  )

  def scores(path: str, w_KN: jax.Array, corrupted: Any) -> jax.Array:
    return tacq.scores(w_KN, sums[path], corrupted.dequantize())

  every = []
  for block, names in job.plan.layers.items():
    params = job.block(block)
    corrupted, _ = job.store.load_packed(f'corrupt-{block}')
    for name in names:
      path, w_KN = f'{block}/{name}', calibrate.kernel(params, name)
      every.append(np.asarray(scores(path, w_KN, corrupted[path])))
  threshold = tacq.threshold(every, job.plan.options.share)
  kept = sum(int(np.sum(scores_KN > threshold)) for scores_KN in every)
  notes = {
    'threshold': threshold if np.isfinite(threshold) else None,
    'kept': kept,
    'weights': sum(scores_KN.size for scores_KN in every),
    'loss': float(np.mean(losses)),
  }

  def keep(path: str, w_KN: jax.Array, corrupted: Any) -> jax.Array:
    return scores(path, w_KN, corrupted) > threshold

  return keep, notes
