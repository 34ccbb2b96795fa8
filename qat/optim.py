"""Schedules of learning rate and weight decay; the chain of AdamW or SGD."""

from collections.abc import Callable
import functools
import re

import jax
from jax import numpy as jnp
from ml_collections import ConfigDict
import optax

from qat.nn import stacked

Schedule = Callable[[jax.Array], jax.Array]


def learning_rate(config: ConfigDict, steps: int) -> Schedule:
  """The learning rate of a step, from a config's `optim` section.

  With t the step, T the number of steps and w the warm-up:

    two_phase  peak * min(t / w, (T - t) / (T - w)), where peak falls by
               second_peak_ratio at switch_fraction * T (pQuant 2602.22592
               appendix C and figure 9; "The Era of 1-bit LLMs: Training Tips")
    cosine     from peak to final_lr_ratio * peak over T - w
    wsd        constant, then linear to final_lr_ratio * peak over the last
               decay_fraction * T
    constant   peak after the warm-up

  Args:
    config: the `optim` section.
    steps: T, optimizer steps of the whole run.
  """
  peak, warmup = config.peak_lr, config.warmup_steps
  final = config.final_lr_ratio * peak
  switch = round(config.switch_fraction * steps)

  def rate(step: jax.Array) -> jax.Array:
    t = jnp.asarray(step, jnp.float32)
    if config.schedule == 'two_phase':
      line = peak * jnp.where(t < switch, 1.0, config.second_peak_ratio)
      down = line * (steps - t) / (steps - warmup)
      up = line * t / max(warmup, 1)
    elif config.schedule == 'cosine':
      progress = jnp.clip((t - warmup) / (steps - warmup), 0, 1)
      down = final + (peak - final) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
      up = peak * t / max(warmup, 1)
    elif config.schedule == 'wsd':
      decay = config.decay_fraction * steps
      left = jnp.clip((steps - t) / decay, 0, 1)
      down = final + (peak - final) * left
      up = peak * t / max(warmup, 1)
    else:
      down = jnp.full_like(t, peak)
      up = peak * t / max(warmup, 1)
    return jnp.where(t < warmup, jnp.minimum(up, down), down)

  return rate


def weight_decay(config: ConfigDict, steps: int) -> Schedule:
  """The weight decay of a step; two values under 'two_phase', else one."""
  switch = round(config.switch_fraction * steps)

  def decay(step: jax.Array) -> jax.Array:
    first = jnp.asarray(config.weight_decay, jnp.float32)
    if config.schedule != 'two_phase':
      return first
    return jnp.where(
      jnp.asarray(step) < switch, first, config.second_weight_decay
    )

  return decay


def quantization(config: ConfigDict) -> Schedule | None:
  """Lambda, the share of quantization of a step, from `quant.anneal`.

  With t the step, 0 until `start_step`, then over `steps`, with p from 0 to 1:

    linear  p
    cosine  (1 - cos(pi p)) / 2

  Args:
    config: the `quant.anneal` section.

  Returns:
    The schedule, or None for shape='none': quantized from the first step on.
  """
  if config.shape == 'none':
    return None

  def share(step: jax.Array) -> jax.Array:
    since = jnp.asarray(step, jnp.float32) - config.start_step
    if not config.steps:
      return jnp.where(since < 0, 0.0, 1.0)
    p = jnp.clip(since / config.steps, 0, 1)
    return p if config.shape == 'linear' else 0.5 * (1 - jnp.cos(jnp.pi * p))

  return share


def check_quantization(config: ConfigDict, steps: int) -> None:
  """Raises a ValueError for a section that `quantization` has no schedule of.

  Args:
    config: the `quant.anneal` section.
    steps: optimizer steps of the whole run.
  """
  shapes = ('none', 'linear', 'cosine')
  if config.shape not in shapes:
    raise ValueError(
      f'quant.anneal.shape={config.shape!r}; choose one of {", ".join(shapes)}.'
    )
  if config.shape != 'none' and config.start_step + config.steps >= steps:
    raise ValueError(
      f'quant.anneal.start_step={config.start_step} and quant.anneal.steps='
      f'{config.steps} leave none of train.steps={steps} to train fully'
      ' quantized, which is how the model is evaluated.'
    )


def is_scale(config: ConfigDict, path: str) -> bool:
  """Whether `optim.scales` covers the parameter at a path."""
  return bool(re.fullmatch(config.scales, stacked.one_layer(path)))


def is_decayed(config: ConfigDict, path: str) -> bool:
  """Whether the parameter at a path decays."""
  pattern = f'{config.no_decay}|{config.scales}'
  return not re.fullmatch(pattern, stacked.one_layer(path))


def make(config: ConfigDict, steps: int) -> optax.GradientTransformation:
  """Clipping, moments, decoupled decay, learning rate: one optax chain.

  The learning rate and the weight decay of the latest update stand in the
  state's `hyperparams`. Without moments ('sgd') there is no other state.

  Args:
    config: the `optim` section.
    steps: optimizer steps of the whole run.
  """

  def covered(test, params):
    def one(keys, _):
      return test(config, '/'.join(key.key for key in keys))

    return jax.tree_util.tree_map_with_path(one, params)

  def chain(learning_rate, weight_decay):
    clip = (
      optax.clip_by_global_norm(config.clip_norm)
      if config.clip_norm
      else optax.identity()
    )
    moments = (
      optax.scale_by_adam(config.b1, config.b2, config.eps)
      if config.optimizer == 'adamw'
      else optax.identity()
    )
    return optax.chain(
      clip,
      moments,
      optax.add_decayed_weights(
        weight_decay, functools.partial(covered, is_decayed)
      ),
      optax.scale_by_learning_rate(learning_rate),
      optax.masked(
        optax.scale(config.scale_lr_ratio), functools.partial(covered, is_scale)
      ),
    )

  return optax.inject_hyperparams(chain)(
    learning_rate=learning_rate(config, steps),
    weight_decay=weight_decay(config, steps),
  )
