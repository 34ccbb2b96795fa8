"""Checks of a config, and its JSON form."""

from collections.abc import Mapping
import json
import math
import pathlib
import re
from typing import Any

import jax
from ml_collections import ConfigDict

from qat import estimator_checks
from qat import optim
from qat import sharding
from qat.data import task_loader
from qat.nn import attention
from qat.nn import ffn
from qat.nn import remat
from qat.nn import stacked
from qat.nn import transformer
from qat.quant import choice
from qat.quant import rules as rules_lib


class ConfigError(ValueError):
  """A config that cannot be run; the message names field, value and remedy."""


def check(
  config: ConfigDict,
  *,
  devices: int,
  processes: int = 1,
  platform: str | None = None,
) -> None:
  """Refuses an impossible config before anything is compiled.

  Args:
    config: a run's config.
    devices: how many devices the run has.
    processes: how many hosts.
    platform: of the devices: 'cpu', 'gpu' or 'tpu'; None: what jax runs on.

  Raises:
    ConfigError: naming every field that is wrong, its value and the remedy.
  """
  errors = [*_model_errors(config), *_number_errors(config)]
  errors += _batch_errors(config, devices, processes)
  errors += task_loader.errors(config)
  errors += estimator_checks.errors(config)
  for attempt in (
    lambda: sharding.mesh_shape(config.mesh, devices),
    lambda: optim.check_quantization(config.quant.anneal, config.train.steps),
    lambda: choice.choose_method(
      config.model.quantized_dot, config.model.dot_dtype, 'cpu'
    ),
    lambda: attention.choose_form(
      config.model.attention,
      platform or jax.default_backend(),
      devices,
      config.model.dot_dtype,
      config.model.d_model // max(1, config.model.n_heads),
    ),
  ):
    try:
      attempt()
    except ValueError as error:
      errors.append(str(error))
  errors += _regex_errors(config, devices if not errors else 0)
  if errors:
    raise ConfigError('\n'.join(f'config.{e}' for e in errors))


def _regex_errors(config: ConfigDict, devices: int) -> list[str]:
  """Of rules and patterns; with `devices`, also against the model's layers."""
  errors = []
  for field in ('no_decay', 'scales'):
    try:
      re.compile(config.optim[field])
    except re.error as error:
      errors.append(
        f'optim.{field}={config.optim[field]!r} is no regex: {error}.'
      )
  try:
    rules_lib.make_rules(config.quant.rules, config.quant.specs)
    if devices:
      shape = sharding.mesh_shape(config.mesh, devices)
      mesh = jax.sharding.AbstractMesh(shape, ('data', 'fsdp'))
      with jax.sharding.use_abstract_mesh(mesh):
        model = transformer.build(config, 'cpu', devices)
        params = transformer.abstract_params(model)
      params = stacked.unstacked(params)
      model.rules.check(rules_lib.kernels(params))
      if config.model.scan_layers:
        errors += stacked.errors(config, model.rules, params)
      errors += estimator_checks.parameter_errors(config, params)
  except (ValueError, TypeError) as error:
    errors.append(f'quant: {error}')
  return errors


def _model_errors(config: ConfigDict) -> list[str]:
  m = config.model
  errors = []
  if m.n_heads < 1:
    pass  # Reported with the other numbers.
  elif m.d_model % m.n_heads:
    errors.append(
      f'model.d_model={m.d_model} is no multiple of'
      f' model.n_heads={m.n_heads}; change one of them.'
    )
  elif (m.d_model // m.n_heads) % 2:
    errors.append(
      f'model.d_model={m.d_model} over model.n_heads={m.n_heads} makes heads'
      f' of odd width {m.d_model // m.n_heads}; rotary positions need pairs.'
    )
  if m.n_kv_heads < 1 or m.n_heads % m.n_kv_heads:
    errors.append(
      f'model.n_kv_heads={m.n_kv_heads} does not divide'
      f' model.n_heads={m.n_heads}; take a divisor of it.'
    )
  choices = {
    'norm': ('pre', 'inside'),
    'norm_type': ('rms', 'layer'),
    'bias': ('none', 'qkv', 'all'),
    'positions': ('rotary', 'learned'),
    'ffn': ('gated', 'decoupled', 'plain'),
    'activation': tuple(ffn.ACTIVATIONS),
    'dtype': ('float32', 'bfloat16'),
    'expert_form': ('auto', 'grouped', 'dense'),
    'remat': ('none', *remat.POLICIES),
  }
  for field, allowed in choices.items():
    if m[field] not in allowed:
      errors.append(
        f'model.{field}={m[field]!r}; choose one of {", ".join(allowed)}.'
      )
  if m.rope_scaling.kind not in ('none', 'llama3'):
    errors.append(
      f'model.rope_scaling.kind={m.rope_scaling.kind!r}; choose one of none,'
      ' llama3.'
    )
  if m.positions == 'learned' and m.max_positions < 1:
    errors.append(
      f"model.max_positions={m.max_positions} with model.positions='learned';"
      ' give the length of the table.'
    )
  if m.norm == 'inside' and (m.ffn == 'plain' or m.norm_type == 'layer'):
    errors.append(
      f"model.norm='inside' with model.ffn={m.ffn!r}, model.norm_type="
      f"{m.norm_type!r}; linears have RMSNorms of their own: take norm='pre'."
    )
  if m.ffn == 'decoupled':
    r, multiple = m.branch_width, m.branch_multiple
    if not 0 < r < m.d_ff:
      errors.append(
        f'model.branch_width={r} must lie between 0 and model.d_ff={m.d_ff}.'
      )
    if multiple > 0 and r % multiple:
      errors.append(
        f'model.branch_width={r} is no multiple of model.branch_multiple='
        f'{multiple}; take {max(multiple, round(r / multiple) * multiple)}.'
      )
    if m.n_experts < 1:
      errors.append(f'model.n_experts={m.n_experts}; at least 1.')
    if not 1 <= m.experts_per_token <= max(1, min(2, m.n_experts)):
      errors.append(
        f'model.experts_per_token={m.experts_per_token} of model.n_experts='
        f'{m.n_experts}; 1, or 2 where there are as many.'
      )
    if m.n_experts > 1 and m.bias == 'all':
      errors.append(
        f"model.bias='all' with model.n_experts={m.n_experts}: experts have no"
        " biases; take 'qkv' or 'none'."
      )
  elif m.n_experts != 1:
    errors.append(
      f"model.n_experts={m.n_experts} needs model.ffn='decoupled'; a layer of"
      f' ffn={m.ffn!r} has no experts.'
    )
  return errors


_POSITIVE = """model.vocab_size model.d_model model.n_layers model.n_heads
  model.d_ff model.branch_multiple model.norm_eps model.rope_theta
  model.rope_scaling.factor model.rope_scaling.low_freq_factor
  model.rope_scaling.high_freq_factor model.rope_scaling.original_positions
  model.init_std model.loss_chunk model.expert_tile optim.peak_lr optim.eps
  optim.accumulate data.seq_len data.batch_size data.threads data.timeout_s
  train.steps train.log_every train.health_every train.timeout_s
  eval.batch_size eval.every checkpoint.every checkpoint.keep_last
  checkpoint.timeout_s sensitivity.damping""".split()
_NOT_NEGATIVE = """seed model.max_positions optim.warmup_steps
  optim.final_lr_ratio optim.weight_decay optim.second_weight_decay
  optim.second_peak_ratio optim.clip_norm optim.scale_lr_ratio
  quant.anneal.start_step quant.anneal.steps data.workers eval.batches
  checkpoint.keep_every sensitivity.every sensitivity.sequences sample.tokens
  sample.temperature sample.top_k model.balance_coef model.router_init_std
  model.capacity_factor""".split()
_FINITE = ['model.alpha_init', 'model.beta_init']
_SHARES = """optim.decay_fraction optim.switch_fraction
  model.router_jitter""".split()
# Fields that the first configs did not have, apart from these numbers.
_LATER = """model.scan_layers model.expert_form model.feature_scaling
  model.experts_per_token model.norm_type model.bias model.positions
  model.rope_scaling.kind optim.scales optim.estimator quant.anneal.shape
  init.model zo.master zo.quantizer_eps zo.quantizer_lr data.task
  data.task_choices data.begin""".split()


def _number_errors(config: ConfigDict) -> list[str]:
  errors, values = [], flatten(config.to_dict())
  for fields, test, meaning in (
    (_POSITIVE, lambda x: x > 0, 'greater than 0'),
    (_NOT_NEGATIVE, lambda x: x >= 0, 'not negative'),
    (_FINITE, math.isfinite, 'finite'),
    (_SHARES, lambda x: 0 <= x <= 1, 'between 0 and 1'),
    (['optim.b1', 'optim.b2'], lambda x: 0 <= x < 1, 'at least 0, below 1'),
    (['sample.top_p'], lambda x: 0 < x <= 1, 'above 0, at most 1'),
  ):
    for field in fields:
      value = values[field]
      # A comparison with NaN is false, so NaN is refused too.
      if not test(value) or value == float('inf'):
        errors.append(f'{field}={value} must be {meaning}.')
  schedules = ('two_phase', 'cosine', 'wsd', 'constant')
  if config.optim.schedule not in schedules:
    errors.append(
      f'optim.schedule={config.optim.schedule!r}; choose one of'
      f' {", ".join(schedules)}.'
    )
  if config.optim.warmup_steps >= config.train.steps:
    errors.append(
      f'optim.warmup_steps={config.optim.warmup_steps} must be fewer than'
      f' train.steps={config.train.steps}.'
    )
  if config.optim.schedule == 'wsd' and not config.optim.decay_fraction:
    errors.append("optim.decay_fraction=0 with optim.schedule='wsd'.")
  return errors


def _batch_errors(
  config: ConfigDict, devices: int, processes: int
) -> list[str]:
  errors = []
  batch, micro = config.data.batch_size, config.optim.accumulate
  if micro > 0 and batch % (devices * micro):
    errors.append(
      f'data.batch_size={batch} is no multiple of {devices} devices times'
      f' optim.accumulate={micro}; take a multiple of {devices * micro}.'
    )
  if config.eval.batch_size % devices:
    errors.append(
      f'eval.batch_size={config.eval.batch_size} is no multiple of'
      f' {devices} devices.'
    )
  if 0 < config.model.max_positions < config.data.seq_len:
    errors.append(
      f'data.seq_len={config.data.seq_len} is more than model.max_positions='
      f'{config.model.max_positions}; give shorter sequences.'
    )
  if config.sensitivity.sequences % processes:
    errors.append(
      f'sensitivity.sequences={config.sensitivity.sequences} is no multiple of'
      f' {processes} processes.'
    )
  try:
    fsdp = sharding.mesh_shape(config.mesh, devices)[1]
  except ValueError:
    return errors  # Reported with the mesh.
  if config.model.d_model % fsdp:
    errors.append(
      f'model.d_model={config.model.d_model} is no multiple of mesh.fsdp='
      f'{fsdp}; parameters are split along it.'
    )
  return errors


def check_tokenizer(config: ConfigDict, vocab_size: int, dataset: str) -> None:
  """Refuses a model whose vocabulary is smaller than its data's."""
  if config.model.vocab_size < vocab_size:
    raise ConfigError(
      f'config.model.vocab_size={config.model.vocab_size} is smaller than the'
      f' {vocab_size} tokens of the tokenizer of {dataset}; set it to'
      f' {vocab_size} or more.'
    )


def to_json(config: ConfigDict) -> str:
  """The resolved config as readable JSON; `from_json` inverts it."""
  return json.dumps(plain(config.to_dict()), indent=2, allow_nan=False) + '\n'


def from_json(text: str) -> ConfigDict:
  """A locked config from `to_json`."""
  values = json.loads(text)
  values['quant']['rules'] = tuple(map(tuple, values['quant']['rules']))
  values['sample']['prompts'] = tuple(values['sample']['prompts'])
  return ConfigDict(values).lock()


def load(workdir: pathlib.Path) -> ConfigDict:
  """The config of an existing run.

  Raises:
    FileNotFoundError: where there is no run.
    ConfigError: its config.json cannot be read, or lacks fields.
  """
  path = workdir / 'config.json'
  if not path.is_file():
    raise FileNotFoundError(
      f'{workdir} holds no run and no model: {path} is missing. Give what'
      ' qat.main wrote with --workdir, or scripts/import_model.py or'
      ' scripts/quantize.py with --out.'
    )
  try:
    config = from_json(path.read_text('utf-8'))
  except (ValueError, KeyError, TypeError) as error:
    raise ConfigError(
      f'{path} is damaged ({type(error).__name__}: {error}); put back the'
      ' config that the run was started with, or give another --workdir.'
    ) from error
  known = {*_POSITIVE, *_NOT_NEGATIVE, *_FINITE, *_SHARES, *_LATER}
  if missing := sorted(known - {*flatten(config.to_dict())}):
    raise ConfigError(
      f'{path} lacks {", ".join(missing)}: an earlier version wrote it. Use'
      ' that version; or add them to a run with the values of'
      ' configs/common.py, and make a model folder again.'
    )
  return config


def plain(value: Any) -> Any:
  """A config, or a value of one, as dicts and lists, as JSON has them."""
  if isinstance(value, Mapping):
    return {key: plain(v) for key, v in value.items()}
  if isinstance(value, list | tuple):
    return [plain(v) for v in value]
  return value


def flatten(tree: Any, prefix: str = '') -> dict[str, Any]:
  """Field such as 'model.d_model' -> value, of a config as plain dicts."""
  if not isinstance(tree, dict):
    return {prefix: tree}
  flat = {}
  for key, value in tree.items():
    flat |= flatten(value, f'{prefix}.{key}' if prefix else key)
  return flat
