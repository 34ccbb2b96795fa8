"""Where a run begins: with fresh parameters, or with those of another model.

`config.init.model` names a model folder or another run's workdir. Its model
section, and with `config.init.quant` its rules, take the place of the run's
before anything else looks at the config; what comes of it is the run's config
from then on. Its parameters are those before the first step.

Matrices that were quantized after training stay as they are (`qat.carried`).
"""

import pathlib
from typing import Any
from typing import NamedTuple

import jax
from jax import numpy as jnp
from ml_collections import ConfigDict
import numpy as np

from qat import carried
from qat import config as config_lib
from qat import initial_checks
from qat import manifest
from qat.data import dataset as dataset_lib
from qat.infer import load
from qat.interop import folder as folder_lib
from qat.nn import stacked
from qat.quant import composed
from qat.quant import rules as rules_lib

# How a model is computed: the run's own, whatever model it starts from.
OWN = (
  *('dtype', 'dot_dtype', 'quantized_dot', 'expert_form', 'expert_tile'),
  *('attention', 'remat', 'scan_layers', 'loss_chunk'),
)
_SHOWN = 20  # Lines of a list of differences.


class Start(NamedTuple):
  """What the state before the first step is made of.

  Attributes:
    params: the parameters, in NumPy arrays; None where they are fresh, or come
      from a checkpoint of the run.
    described: the quantized matrices among them, or in the checkpoint.
    words: where they come from, for the log.
  """

  params: Any
  described: carried.Description
  words: str


def resolve(config: ConfigDict, workdir: pathlib.Path) -> ConfigDict:
  """The config with what it takes from `config.init.model`.

  A run that was started before takes it from its own config.json, where it
  stands since: the other model may have changed, or be gone.

  Args:
    config: a run's config.
    workdir: its folder.

  Raises:
    ConfigError: there is no such model, or none is named.
    CorruptError: a file of it is damaged.
  """
  if not config.init.model:
    if config.init.quant:
      raise config_lib.ConfigError(
        "config.init.quant=True with config.init.model=''; name the model whose"
        ' rules are meant.'
      )
    return config
  if (workdir / 'config.json').exists():
    source = config_lib.load(workdir)
  else:
    source = _source_config(config.init.model)
  made = config.copy_and_resolve_references().unlock()
  for field, value in source.model.items():
    if field not in OWN:
      made.model[field] = value
  if config.init.quant:
    made.quant.rules = source.quant.rules
    made.quant.specs = source.quant.specs
  return made.lock()


def find(
  config: ConfigDict, workdir: pathlib.Path, dataset: dataset_lib.Dataset
) -> Start:
  """Looks for the parameters before the first step.

  Args:
    config: the run's config, resolved.
    workdir: its folder. With a checkpoint in it nothing is loaded.
    dataset: what it trains on; must have the model's tokenizer.

  Raises:
    ConfigError: the model of `config.init` cannot be what the run starts from.
    CorruptError: a file of it is damaged.
  """
  checkpoints = workdir / 'checkpoints'
  numbered = manifest.numbered
  if numbered(checkpoints) or numbered(checkpoints, '.corrupt'):
    return Start(None, carried.saved(checkpoints), '')
  if not config.init.model:
    if config.optim.estimator != 'backprop':  # Which trains all there is.
      fresh = stacked.unstacked(carried.shapes(config))
      initial_checks.check_latent(config, fresh)
    return Start(None, {}, '')
  try:
    source = load.load_model(config.init.model, None)
  except (ValueError, FileNotFoundError) as error:
    raise initial_checks.error(config, str(error)) from error
  initial_checks.check_tokenizer(config, source, dataset)
  initial_checks.check_rules(config, source)
  params, again = parameters(config, source)
  initial_checks.check_latent(config, params)
  step = source.source.get('step')
  del source  # Its arrays go as they are stacked.
  if config.model.scan_layers:
    try:
      params = stacked.stacked(params)
    except ValueError as error:
      raise initial_checks.error(
        config, f'{error} Set config.model.scan_layers=False.'
      ) from error
  params = carried.packed(params)
  described = carried.describe(params)
  if described:
    initial_checks.check_frozen(config, described)
  at = '' if step is None else f', step {step}'
  words = f'Starting with the parameters of {config.init.model}{at}.'
  if again:
    words += (
      f' What the quantizers of {len(again)} of its matrices have learned is'
      ' of no use to those of this run, which start again from the matrices:'
      f' {again[0]}, for one.'
    )
  return Start(params, described, words)


def place(start: Start, abstract: Any) -> Any | None:
  """Puts the parameters on the devices, and takes them out of `start`.

  Each is copied and then given up, so that there is room for the model once:
  what lies on devices is theirs, and a state can be made in its place.

  Args:
    start: from `find`.
    abstract: the abstract state; says how each array is split. What it stores
      in another dtype is cast later, on the devices.

  Returns:
    The tree; None, for fresh parameters, where `start` has none.
  """
  if start.params is None:
    return None

  copy = jax.jit(jnp.copy)

  def one(leaf: np.ndarray, like: jax.ShapeDtypeStruct) -> jax.Array:
    # On a CPU the array may be the leaf itself, which is not the device's.
    return copy(
      jax.make_array_from_callback(
        like.shape, like.sharding, lambda index: np.asarray(leaf[index])
      )
    )

  def moved(tree: Any, like: Any) -> Any:
    if isinstance(tree, dict):
      return {name: moved(tree.pop(name), like[name]) for name in [*tree]}
    return jax.tree.map(one, tree, like)

  return moved(start.params, abstract.params)


def parameters(
  config: ConfigDict, source: load.Loaded
) -> tuple[dict[str, Any], list[str]]:
  """The parameters that a run begins with, by layer.

  What the run's quantizers learn is the source's where it learned the same,
  and else starts from its kernels.

  Args:
    config: the run's config, resolved.
    source: the model that it starts from.

  Returns:
    float32 arrays of NumPy, and quantized matrices of such; and the layers
    whose quantizers start again, though those of the source have learned.

  Raises:
    ConfigError: names the parameters that do not fit, and the matrices that
      would be quantized twice.
  """
  rules = rules_lib.make_rules(config.quant.rules, config.quant.specs)
  there = folder_lib.flat(source.params)
  found, again, lines = {}, {}, []
  for path, wanted in folder_lib.flat(
    stacked.unstacked(carried.shapes(config))
  ).items():
    layer, _, name = path.rpartition('/')
    kernel = there.get(f'{layer}/kernel')
    spec = its = None
    if kernel is not None:
      spec, its = rules.find(layer), source.model.rules.find(layer)
    if composed.is_quantized(kernel) and spec.weight != 'none':
      if name == 'kernel':
        lines.append(
          f'{path}: quantized there, and a rule with weight={spec.weight!r}'
          " here; take config.init.quant=True, or a rule with weight='none'"
        )
    elif (
      spec is not None
      and name in spec.parameters
      and not _learns_alike(spec, its)
    ):
      kernel = jnp.asarray(kernel, jnp.float32)
      found[path] = np.asarray(spec.start(kernel)[name])
      if its.parameters:
        again[layer] = True
    elif path not in there:
      lines.append(f'{path}: missing there, {list(wanted.shape)} here')
    elif tuple(there[path].shape) != wanted.shape:
      shape = list(there[path].shape)
      lines.append(f'{path}: {shape} there, {list(wanted.shape)} here')
    else:
      found[path] = jax.tree.map(np.asarray, there[path])
  if lines:
    shown = lines[:_SHOWN] + ['...'] * (len(lines) > _SHOWN)
    raise initial_checks.error(
      config,
      f'{len(lines)} of its parameters are not those of this run:\n  '
      + '\n  '.join(shown),
    )
  return folder_lib.nested(found), [*again]


def _learns_alike(a: rules_lib.Spec, b: rules_lib.Spec) -> bool:
  """Whether what a quantizer has learned is of use to the other."""

  def learns(spec: rules_lib.Spec) -> tuple[str, str, int]:
    grouped = spec.granularity == 'group'
    return spec.weight, spec.granularity, spec.group_size if grouped else 0

  return learns(a) == learns(b)


def _source_config(name: str) -> ConfigDict:
  path = pathlib.Path(name)
  try:
    if (path / manifest.FILE).is_file():
      return folder_lib.open_folder(path).config
    return config_lib.load(path)
  except (FileNotFoundError, ValueError) as error:
    raise config_lib.ConfigError(
      f'config.init.model={name!r}: {error}'
    ) from error
