"""What some methods find out about the whole model before it is quantized."""

from collections.abc import Callable
from typing import Any

import jax
from jax import numpy as jnp
import numpy as np

from qat.ptq import calibrate
from qat.ptq import gradients
from qat.ptq import job as job_lib
from qat.ptq import tacq

# Path of a matrix -> bool `[K, N]`, which of its weights are kept.
Keep = Callable[[str], jax.Array]


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
    onward = block != job.blocks[-1]
    statistics = calibration.statistics(
      params, firsts, block, gram=False, onward=onward
    )
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
  return found, notes


def choose_kept(job: job_lib.Job) -> tuple[Keep, dict[str, Any]]:
  """TaCQ's choice of weights to keep, for which a corrupted copy is stored.

  Returns:
    A function that tells of a matrix which of its weights are kept, and what
    was found: the threshold, how many weights of how many are above it, and
    the clean model's mean loss on the examples, in nats.
  """
  # Sums of gradients, and then in their place the scores.
  scores, losses = gradients.absolute_gradients(
    job.config,
    job.params,
    job.examples,
    job.plan.layers,
    batch_size=job.ptq.calibration.gradient_batch,
    store=job.store,
    show=job.step,
  )
  for block, names in job.plan.layers.items():
    params = job.block(block)
    corrupted, _ = job.store.load_packed(f'corrupt-{block}')
    for name in names:
      path = f'{block}/{name}'
      scores[path] = np.asarray(
        tacq.scores(
          calibrate.kernel(params, name),
          scores[path],
          corrupted[path].dequantize(),
        )
      )
  threshold = tacq.threshold(list(scores.values()), job.plan.options.share)
  kept = sum(int(np.sum(each_KN > threshold)) for each_KN in scores.values())
  notes = {
    'threshold': threshold if np.isfinite(threshold) else None,
    'kept': kept,
    'weights': sum(each_KN.size for each_KN in scores.values()),
    'loss': float(np.mean(losses)),
  }
  return lambda path: jnp.asarray(scores[path] > threshold), notes
