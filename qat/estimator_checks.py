"""What no step can be made with, in a config's sections `optim` and `zo`."""

import math
import re
from typing import Any

import jax
from ml_collections import ConfigDict

from qat import estimators
from qat import optim
from qat.nn import stacked
from qat.quant import learned
from qat.zo import perturb
from qat.zo import spsa


def errors(config: ConfigDict) -> list[str]:
  """What in the sections `optim` and `zo` no step can be made with.

  Args:
    config: a run's config.

  Returns:
    Messages that name field, value and remedy.
  """
  c, zo, found = config.optim, config.zo, []
  for field, value, allowed in (
    ('optim.estimator', c.estimator, ('backprop', 'spsa', 'forward')),
    ('optim.optimizer', c.optimizer, ('adamw', 'sgd')),
    ('zo.master', zo.master, ('float32', 'bfloat16')),
  ):
    if value not in allowed:
      found.append(f'{field}={value!r}; choose one of {", ".join(allowed)}.')
  try:
    spsa.Options(zo.eps, zo.directions, zo.clip, zo.perturbed, zo.resolution)
  except ValueError as error:
    found.append(f'zo.{error}')
  if not (0 <= zo.quantizer_eps < math.inf and 0 < zo.quantizer_lr < math.inf):
    found.append(
      f'zo.quantizer_eps={zo.quantizer_eps} must be finite, and 0 for none;'
      f' zo.quantizer_lr={zo.quantizer_lr} finite and greater than 0.'
    )
  both = "optim.estimator='spsa' with optim.optimizer='sgd'"
  moved = estimators.in_place(config)
  if moved and c.clip_norm:
    found.append(
      f'optim.clip_norm={c.clip_norm} with {both}, where no gradient is made;'
      ' set it to 0. zo.clip clips slopes.'
    )
  if zo.quantizer_eps and not moved:
    found.append(
      f'zo.quantizer_eps={zo.quantizer_eps} needs {both}; set it to 0, or'
      ' these.'
    )
  if zo.master != 'float32' and not moved:
    found.append(
      f'zo.master={zo.master!r} needs {both}: elsewhere updates are rounded to'
      " nearest, which loses small ones. Take 'float32'."
    )
  if zo.resolution:
    decays = c.weight_decay, c.second_weight_decay
    two = c.schedule == 'two_phase'
    if not moved or zo.master != 'float32' or decays[0] or two and decays[1]:
      found.append(
        f'zo.resolution={zo.resolution} needs {both}, zo.master='
        "'float32' and no weight decay, so that a step can be undone; set it to"
        ' 0, or these.'
      )
  if c.estimator != 'backprop' and config.model.balance_coef:
    found.append(
      f'model.balance_coef={config.model.balance_coef} needs optim.estimator='
      "'backprop'; set it to 0."
    )
  if c.estimator == 'forward':
    found += _forward_errors(config)
  return found


def _forward_errors(config: ConfigDict) -> list[str]:
  """What the textbook form of the model has not."""
  m, forward = config.model, "with optim.estimator='forward'"
  errors = [
    f'{field}={value!r} {forward}, whose form of the model has only {only!r};'
    " set it to that, or take optim.estimator='spsa'."
    for field, value, only in (
      ('model.activation', m.activation, 'silu'),
      ('model.ffn', 'gated' if m.ffn == 'decoupled' else m.ffn, 'gated'),
      ('model.norm_type', m.norm_type, 'rms'),
      ('model.bias', m.bias, 'none'),
      ('model.positions', m.positions, 'rotary'),
      ('model.rope_scaling.kind', m.rope_scaling.kind, 'none'),
      ('model.n_experts', m.n_experts, 1),
      ('quant.anneal.shape', config.quant.anneal.shape, 'none'),
    )
    if value != only
  ]
  for name, spec in config.quant.specs.items():
    if spec.output_norm:
      errors.append(
        f'quant.specs.{name}.output_norm=True {forward}, whose form of the'
        " model has none; take optim.estimator='spsa'."
      )
    if spec.weight in learned.QUANTIZERS:
      errors.append(
        f'quant.specs.{name}.weight={spec.weight!r} {forward}, whose form of'
        ' the model has no slopes of what quantizers learn; take'
        " optim.estimator='spsa'."
      )
  return errors


def parameter_errors(config: ConfigDict, params: Any) -> list[str]:
  """What in `zo.perturbed` does not fit a model.

  Args:
    config: a run's config.
    params: its (abstract) parameters, unstacked.
  """
  if config.optim.estimator == 'backprop':
    return []
  pattern = config.zo.perturbed
  paths = [
    perturb.path_name(keys)
    for keys, _ in jax.tree_util.tree_leaves_with_path(params)
  ]
  try:
    trained = {p for p in paths if re.fullmatch(pattern, p)}
  except re.error:
    return []  # Reported by `errors`.
  if not trained:
    return [
      f'zo.perturbed={pattern!r} covers no parameter; their paths read like'
      f' {", ".join(paths[:3])}.'
    ]
  if config.zo.quantizer_eps and not any(
    optim.is_scale(config.optim, path) for path in paths
  ):
    return [
      f'zo.quantizer_eps={config.zo.quantizer_eps}, but optim.scales='
      f'{config.optim.scales!r} covers no parameter: no quantizer learns'
      ' anything. Set it to 0, or take a format that does, such as lwc4.'
    ]
  apart = stacked.told_apart(paths, trained.__contains__)
  if config.model.scan_layers and apart:
    return [
      f'zo.perturbed={pattern!r} covers only one of {" and ".join(apart)}, but'
      ' model.scan_layers=True computes all layers alike; set it to False, or'
      ' treat them alike.'
    ]
  return []
