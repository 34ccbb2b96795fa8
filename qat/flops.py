"""Floating-point operations: what a step needs, and what a device can do."""

from collections.abc import Iterator
import contextlib
import time

import jax
from jax import numpy as jnp
from ml_collections import ConfigDict
import numpy as np

from qat.nn import stacked
from qat.quant import rules as rules_lib


def train_flops_per_token(config: ConfigDict, params: dict) -> float:
  """Multiplications and additions of a training step, for one token.

  A forward pass takes 2 for each weight that takes part in a product, and
  4 * L * d_model * T / 2 for causal attention; a backward pass twice that, and
  so do the tangents of a pass in forward mode; two-point estimates take two
  forward passes a direction, and as many again for quantizers that have
  directions of their own. An expert layer counts the experts that a token
  meets. Recomputation, quantization and noise do not count.

  Args:
    config: a run's config.
    params: the (abstract) parameter tree.
  """
  weights = config.model.vocab_size * config.model.d_model  # The head.
  for kernel in rules_lib.kernels(stacked.unstacked(params)).values():
    met = config.model.experts_per_token if len(kernel.shape) == 3 else 1
    weights += met * int(np.prod(kernel.shape[-2:]))
  c = config.model
  forward = 2 * weights + 2 * c.n_layers * c.d_model * config.data.seq_len
  q = config.zo.directions
  kinds = 2 if config.zo.quantizer_eps else 1
  passes = {'backprop': 3, 'spsa': 2 * q * kinds, 'forward': 3 * q}
  return passes[config.optim.estimator] * forward


def measured_peak(size: int = 1024, seconds: float = 0.3) -> float:
  """FLOP/s of bfloat16 products on one device: the best of repeated ones.

  Outside of a mesh: how often it multiplies depends on the clock, and what
  several processes run together must not.

  Args:
    size: of the square matrices; a GPU or TPU gets four times that.
    seconds: how long to measure.
  """
  if jax.default_backend() != 'cpu':
    size *= 4
  x = jnp.ones((size, size), jnp.bfloat16)
  multiply = jax.jit(
    lambda x: jax.lax.dot(x, x, preferred_element_type=jnp.float32)
  )
  multiply(x).block_until_ready()
  best, end = float('inf'), time.monotonic() + seconds
  while time.monotonic() < end:
    start = time.perf_counter()
    for _ in range(4):
      y = multiply(x)
    y.block_until_ready()
    best = min(best, (time.perf_counter() - start) / 4)
  return 2 * size**3 / best


class Meter:
  """Speed of training and time left, with pauses left out.

  Args:
    config: a run's config.
    params: the (abstract) parameters.
    peak: FLOP/s of all devices.
    first: the step that training goes on from.
  """

  def __init__(self, config: ConfigDict, params: dict, peak: float, first: int):
    self.tokens_per_step = config.data.batch_size * config.data.seq_len
    self._flops_per_token = train_flops_per_token(config, params)
    self._peak, self._total = peak, config.train.steps
    self._last, self._since = first, time.monotonic()

  @contextlib.contextmanager
  def pause(self) -> Iterator[None]:
    """Leaves the time of the body out."""
    begin = time.monotonic()
    yield
    self._since += time.monotonic() - begin

  def read(self, step: int) -> dict[str, float]:
    """The log's speeds since the last call, at `step`."""
    now = time.monotonic()
    seconds_per_step = (now - self._since) / max(1, step - self._last)
    self._last, self._since = step, now
    tokens_per_s = self.tokens_per_step / seconds_per_step
    flops_per_s = tokens_per_s * self._flops_per_token
    return {
      'train/tokens': step * self.tokens_per_step,
      'train/tokens_per_s': tokens_per_s,
      'train/eta_s': (self._total - step) * seconds_per_step,
      'train/flops_per_s': flops_per_s,
      'train/flops_share': flops_per_s / self._peak,
    }
