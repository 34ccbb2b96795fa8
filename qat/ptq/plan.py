"""What a config of `configs/ptq` asks of a model, checked before any work."""

from collections.abc import Callable
from collections.abc import Mapping
import dataclasses
import re
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from qat.nn import stacked
from qat.ptq import calibrate
from qat.ptq import cores
from qat.ptq import dbellquant
from qat.ptq import smoothquant
from qat.ptq import tacq
from qat.quant import activations
from qat.quant import composed
from qat.quant import rules as rules_lib

# What prepares the model for a quantizer.
SCALES: dict[str, ModuleType] = {
  'smoothquant': smoothquant,
  'dbellquant': dbellquant,
}
KEEPS: dict[str, ModuleType] = {'tacq': tacq}
ALGORITHMS = {**cores.QUANTIZERS, **SCALES, **KEEPS}


@dataclasses.dataclass(frozen=True)
class Plan:
  """The steps of a quantization.

  Attributes:
    config: the model's, with rules that quantize the inputs as asked.
    result: of the quantized model; the same unless it is `latent`.
    latent: whether the result keeps its matrices in float, with what their
      grids follow from beside them, to be trained on.
    groups: linear layers of a block that read one input.
    layers: block -> its layers that are quantized, 'block_0' -> ('attn/q', ..).
    core: gives the codes of a matrix.
    statistics: whether the final walk takes statistics of the inputs.
    scales: (absmax_K, kernels) -> (scales to fold, notes); None: none are.
    corrupt: the core of the copy that tells which weights are kept; None where
      none are.
    epochs: of the training of each block, before the final walk; None: what
      gives the codes learns nothing.
    options: of the algorithm.
  """

  config: ConfigDict
  result: ConfigDict
  latent: bool
  groups: tuple[calibrate.Group, ...]
  layers: dict[str, tuple[str, ...]]
  core: cores.Core
  statistics: bool
  scales: Callable[..., Any] | None
  corrupt: cores.Core | None
  epochs: int | None
  options: Any

  def steps(self, batches: int) -> int:
    """How many steps the progress has; `batches` are those of gradients."""
    blocks = self.config.model.n_layers
    matrices = sum(map(len, self.layers.values()))
    steps = matrices + (blocks if self.scales else 0)
    steps += len(self.layers) * (self.epochs or 0)
    return steps + (matrices + 2 * blocks * batches if self.corrupt else 0)


def needs_examples(ptq: ConfigDict) -> bool:
  """Whether a config asks for calibration sequences at all."""
  return ptq.quantizer not in cores.DATA_FREE or (
    ptq.algorithm not in cores.QUANTIZERS or ptq.output_errors
  )


def make(
  config: ConfigDict, params: Mapping[str, Any], ptq: ConfigDict
) -> Plan:
  """The plan for a model.

  Args:
    config: of the model.
    params: its parameters, or their shapes.
    ptq: a config of `configs/ptq`.

  Raises:
    ValueError: naming field, value and remedy.
  """
  for field in ('sequences', 'length', 'batch_size', 'gradient_batch'):
    if ptq.calibration[field] < 1:
      raise ValueError(
        f'config.calibration.{field}={ptq.calibration[field]} must be at least'
        ' 1.'
      )
  there_are = {'algorithm': ALGORITHMS, 'quantizer': cores.QUANTIZERS}
  for field, there in there_are.items():
    if ptq[field] not in there:
      raise ValueError(
        f'config.{field}={ptq[field]!r}; there are {", ".join(there)}.'
      )
  if ptq.algorithm in cores.QUANTIZERS and ptq.quantizer != ptq.algorithm:
    raise ValueError(
      f'config.quantizer={ptq.quantizer!r} with config.algorithm='
      f'{ptq.algorithm!r}, which gives the codes itself; make them equal.'
    )
  if ptq.algorithm == 'tacq' and ptq.quantizer != 'gptq':
    raise ValueError(
      f'config.quantizer={ptq.quantizer!r}: tacq keeps weights in gptq alone.'
    )
  if ptq.quantizer in cores.LEARNED and ptq.algorithm != ptq.quantizer:
    raise ValueError(
      f'config.quantizer={ptq.quantizer!r} prepares the model itself; make'
      ' config.algorithm equal.'
    )
  if ptq.quantizer == 'slim_llm' and not ptq.calibration.rows:
    raise ValueError(
      'config.calibration.rows=0: slim_llm compares outputs; give it 1024.'
    )
  if config.model.scan_layers:
    raise ValueError(
      'config.model.scan_layers=True: quantize the unscanned form of the model'
      ' (transformer.unscanned).'
    )
  groups = calibrate.groups(config.model)
  layers = _layers(config, params, ptq.layers)
  options = _options(ptq.algorithm, ptq.method, 'method')
  if ptq.algorithm in cores.LEARNED and options.let:
    if config.model.norm != 'pre':
      raise ValueError(
        f'config.method.let=True with config.model.norm={config.model.norm!r}:'
        " scales can be moved past the norms of 'pre' alone; set let=False."
      )
  latent = ptq.algorithm in cores.LEARNED and ptq.latent
  if latent and options.symmetric:
    raise ValueError(
      'config.latent=True with config.method.symmetric=True: the formats that'
      ' train such grids on have a zero point; set symmetric=False.'
    )
  if ptq.algorithm in {**SCALES, **KEEPS}:
    ALGORITHMS[ptq.algorithm].check(options)
  core_options = options
  if ptq.algorithm not in cores.QUANTIZERS:
    core_options = _options(
      ptq.quantizer, ptq.quantizer_options, 'quantizer_options'
    )
  corrupt = None
  if ptq.algorithm in KEEPS:
    corrupt = cores.make('gptq', _options('gptq', ptq.corrupt, 'corrupt'))
  core = cores.make(ptq.quantizer, core_options)
  kernels = rules_lib.kernels(params)
  for one in (core, *([corrupt] if corrupt else [])):
    for block, names in layers.items():
      for path in (f'{block}/{name}' for name in names):
        cores.check_shape(one, path, kernels[path].shape)
  quantized = _with_inputs(config, params, layers, ptq)
  statistics = ptq.quantizer in cores.CALIBRATED or ptq.output_errors
  if statistics or ptq.algorithm in cores.LEARNED:
    _refuse_blocks_apart(quantized, kernels, ptq)
  result = _with_formats(config, params, layers, ptq) if latent else quantized
  return Plan(
    config=quantized,
    result=result,
    latent=latent,
    groups=groups,
    layers=layers,
    core=core,
    statistics=statistics,
    epochs=options.epochs if ptq.algorithm in cores.LEARNED else None,
    scales=_scales(ptq.algorithm, options),
    corrupt=corrupt,
    options=options,
  )


def _layers(
  config: ConfigDict, params: Mapping[str, Any], pattern: str
) -> dict[str, tuple[str, ...]]:
  """The layers whose whole path the pattern matches, by block."""
  try:
    regex = re.compile(pattern)
  except re.error as error:
    raise ValueError(
      f'config.layers={pattern!r} is no regex: {error}.'
    ) from error
  rules = rules_lib.make_rules(config.quant.rules, config.quant.specs)
  kernels = rules_lib.kernels(params)
  found: dict[str, tuple[str, ...]] = {}
  for path in kernels:
    if composed.is_quantized(kernels[path]):
      raise ValueError(
        f'{path} is quantized already; take the model it was made from.'
      )
    if not regex.fullmatch(path):
      continue
    spec = rules.find(path)
    if spec.weight != 'none' or spec.activation != 'none':
      raise ValueError(
        f'{path} was trained in low bits (weight={spec.weight!r}, activation='
        f'{spec.activation!r}); only layers of full precision are quantized'
        ' after training. Take such a model, or leave the layer out with'
        ' config.layers.'
      )
    block, name = path.split('/', 1)
    found[block] = (*found.get(block, ()), name)
  if not found:
    raise ValueError(
      f'config.layers={pattern!r} matches no layer; the layers are'
      f' {", ".join(kernels)}.'
    )
  in_block = [name for g in calibrate.groups(config.model) for name in g.layers]
  return {
    block: tuple(name for name in in_block if name in found[block])
    for block in (f'block_{i}' for i in range(config.model.n_layers))
    if block in found
  }


def _options(algorithm: str, section: ConfigDict, field: str) -> Any:
  """The Options of an algorithm from its section of the config."""
  kind = ALGORITHMS[algorithm].Options
  known = {f.name for f in dataclasses.fields(kind)}
  given = section.to_dict()
  if missing := sorted(known - set(given)):
    raise ValueError(
      f'config.{field} lacks {", ".join(missing)}, which {algorithm} has.'
    )
  if unknown := sorted(set(given) - known):
    raise ValueError(
      f'config.{field} has {", ".join(unknown)}, which {algorithm} has not; it'
      f' has {", ".join(sorted(known))}.'
    )
  # A comparison with NaN is false, so NaN is refused too.
  if not given.get('percdamp', 0) >= 0:
    raise ValueError(
      f'config.{field}.percdamp={given["percdamp"]} must be at least 0.'
    )
  return kind(**given)


def _scales(algorithm: str, options: Any) -> Callable[..., Any] | None:
  if algorithm == 'smoothquant':
    return lambda absmax_K, kernels: (
      smoothquant.scales(absmax_K, kernels, options),
      None,
    )
  if algorithm == 'dbellquant':
    return lambda absmax_K, kernels: dbellquant.scales(
      absmax_K, kernels, options
    )
  return None


def _with_inputs(
  config: ConfigDict,
  params: Mapping[str, Any],
  layers: Mapping[str, tuple[str, ...]],
  ptq: ConfigDict,
) -> ConfigDict:
  """The model's config with the chosen layers' inputs quantized as asked."""
  if ptq.activation == 'none':
    return config
  if ptq.activation not in activations.QUANTIZERS:
    raise ValueError(
      f'config.activation={ptq.activation!r}; choose none or one of'
      f' {", ".join(activations.QUANTIZERS)}.'
    )
  spec = rules_lib.Spec('none', ptq.activation, 'tensor')
  name = f'inputs_{ptq.activation}'
  return _with_rule(config, params, layers, (ptq.layers, name, spec))


def _refuse_blocks_apart(
  config: ConfigDict, kernels: Mapping[str, Any], ptq: ConfigDict
) -> None:
  """Raises a ValueError where inputs are quantized in some blocks alone."""
  rules = rules_lib.make_rules(config.quant.rules, config.quant.specs)
  if apart := stacked.told_apart(kernels, rules.find):
    raise ValueError(
      f'config.activation={ptq.activation!r} with config.layers='
      f'{ptq.layers!r}: inputs of {apart[0]} and of {apart[1]} would be'
      ' quantized differently, and one compiled block computes all. Choose'
      ' layers alike in all blocks, or leave inputs as they are.'
    )


def _with_formats(
  config: ConfigDict,
  params: Mapping[str, Any],
  layers: Mapping[str, tuple[str, ...]],
  ptq: ConfigDict,
) -> ConfigDict:
  """The model's config with the chosen layers in formats that train on."""
  bits, size = ptq.method.bits, ptq.method.group_size
  spec = rules_lib.Spec(f'lwc{bits}', ptq.activation, 'channel')
  name = spec.weight
  if size:
    spec = dataclasses.replace(spec, granularity='group', group_size=size)
    name += f'_{size}'
  if ptq.activation != 'none':
    name += f'_{ptq.activation}'
  return _with_rule(config, params, layers, (ptq.layers, name, spec))


def _with_rule(
  config: ConfigDict,
  params: Mapping[str, Any],
  layers: Mapping[str, tuple[str, ...]],
  rule: tuple[str, str, rules_lib.Spec],
) -> ConfigDict:
  """The model's config with a rule of the chosen layers before the others.

  Args:
    config: of the model.
    params: its parameters, or their shapes.
    layers: the chosen ones, by block.
    rule: the regex that chose them, and the name of a spec and the spec.
  """
  pattern, name, spec = rule
  changed = config.copy_and_resolve_references().unlock()
  changed.quant.specs[name] = ConfigDict(dataclasses.asdict(spec))
  chosen = {f'{block}/{name}' for block in layers for name in layers[block]}
  rules = rules_lib.make_rules(config.quant.rules, config.quant.specs)
  # A rule that decides about no layer is an error.
  used = {rules.index(p) for p in rules_lib.kernels(params) if p not in chosen}
  others = [config.quant.rules[i] for i in sorted(used)]
  changed.quant.rules = ((pattern, name), *others)
  return changed.lock()
