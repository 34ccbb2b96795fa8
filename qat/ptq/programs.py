"""What a walk runs on a device, as programs of abstract shapes to compile.

For models that do not fit the machine at hand: how much memory GPTQ and TaCQ
need, matrix by matrix and block by block, as a compiler lays it out.
"""

from collections.abc import Iterator
from collections.abc import Mapping
from typing import Any
from typing import NamedTuple

import jax
from jax import numpy as jnp
from ml_collections import ConfigDict
import numpy as np

from qat.nn import transformer
from qat.ptq import calibrate
from qat.ptq import gptq
from qat.ptq import gradients
from qat.ptq import hessian
from qat.ptq import statistics as statistics_lib


class Program(NamedTuple):
  """A jitted function with its arguments.

  Attributes:
    name: what it does.
    run: jitted.
    arguments: static ones, and shapes with dtypes.
    beside: bytes that the walk holds on the device beside the arguments.
  """

  name: str
  run: Any
  arguments: tuple[Any, ...]
  beside: int


class Sizes(NamedTuple):
  """Bytes of what a walk holds anyway."""

  block: int
  states: int


def sizes(config: ConfigDict, ptq: ConfigDict) -> Sizes:
  """One block in float32, and the hidden states of all sequences.

  Args:
    config: a model's.
    ptq: a config of `configs/ptq`.
  """
  c = ptq.calibration
  states = _like(
    (c.sequences, c.length, config.model.d_model), config.model.dtype
  )
  return Sizes(_bytes(_shapes(config)['block_0']), _bytes(states))


def programs(
  config: ConfigDict, ptq: ConfigDict, platform: str
) -> Iterator[Program]:
  """Every program of a walk of GPTQ or TaCQ, each shape once.

  Args:
    config: of the model, full precision.
    ptq: a config of `configs/ptq`.
    platform: 'cpu', 'gpu' or 'tpu'.

  Raises:
    ValueError: for another algorithm.
  """
  if ptq.algorithm not in ('gptq', 'tacq'):
    raise ValueError(
      f'config.algorithm={ptq.algorithm!r}; the programs of gptq and tacq can'
      ' be compiled.'
    )
  shapes = _shapes(config)
  params, tacq = shapes['block_0'], ptq.algorithm == 'tacq'
  block = calibrate.one_block(transformer.build(config, platform, 1), shapes)
  x_BTD, weights_BT = _batch(config, ptq, config.model.dtype)
  held = sizes(config, ptq)
  others = held.states - _bytes(x_BTD)
  groups = calibrate.groups(config.model)
  grams = {}
  for group in groups:
    name = group.layers[0]
    grams[name] = _statistics(calibrate.kernel(params, name).shape[0])
    yield Program(
      f'statistics of {name}',
      calibrate.observe,
      (block, (name,), params, {name: grams[name]}, x_BTD, weights_BT, None),
      beside=others,
    )
  section = ptq.quantizer_options if tacq else ptq.method
  options = gptq.Options(**section.to_dict())
  factors, matrices = {}, {}
  for group in groups:
    gram = grams[group.layers[0]]
    factors[gram.gram_KK.shape] = gram
    for name in group.layers:
      shape = calibrate.kernel(params, name).shape
      matrices.setdefault(shape, (name, gram))
  for (width, _), gram in factors.items():
    yield Program(
      f'factor of {width} inputs',
      hessian._factor,
      (gram, _like((), 'float32'), options.act_order),
      beside=held.states + held.block,
    )
  for shape, (name, gram) in matrices.items():
    factor = jax.eval_shape(
      lambda gram: hessian._factor(gram, 0.01, options.act_order), gram
    )
    keep_KN = _like(shape, 'bool') if tacq else None
    yield Program(
      f'codes of {name}, {shape[0]} x {shape[1]}',
      gptq.solve,
      (_like(shape, 'float32'), factor, options, keep_KN),
      # The matrix is the block's; the Gram matrix is read again, for errors.
      beside=held.states + held.block - 4 * shape[0] * shape[1] + _bytes(gram),
    )
  yield Program('a block', calibrate.advance, (block, params, x_BTD), others)
  if tacq:
    yield from _gradients(config, ptq, platform, shapes)


def measure(
  config: ConfigDict, ptq: ConfigDict, device: jax.Device
) -> dict[str, Any]:
  """Compiles all programs for a device; runs none.

  Returns:
    Bytes: 'block_bytes', 'states_bytes', and 'programs', for each its name,
    'peak_bytes', 'temporary_bytes', 'beside_bytes', and 'compiler_flops'.
  """
  there = jax.sharding.SingleDeviceSharding(device)

  def place(leaf):
    if not isinstance(leaf, jax.ShapeDtypeStruct):
      return leaf
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=there)

  rows = []
  for program in programs(config, ptq, device.platform):
    arguments = [jax.tree.map(place, a) for a in program.arguments]
    compiled = program.run.lower(*arguments).compile()
    memory = compiled.memory_analysis()
    rows.append(
      {
        'name': program.name,
        'peak_bytes': memory.peak_memory_in_bytes,
        'temporary_bytes': memory.temp_size_in_bytes,
        'beside_bytes': program.beside,
        'compiler_flops': (compiled.cost_analysis() or {}).get('flops'),
      }
    )
  held = sizes(config, ptq)
  return {
    'block_bytes': held.block,
    'states_bytes': held.states,
    'programs': rows,
  }


def _gradients(
  config: ConfigDict, ptq: ConfigDict, platform: str, shapes: Mapping
) -> Iterator[Program]:
  model = gradients.clean_model(config, platform)
  block = calibrate.one_block(model, shapes)
  x_BTD, weights_BT = _batch(config, ptq, 'float32', 'gradient_batch')
  tokens_BT = _like(weights_BT.shape, 'int32')
  top, params = calibrate.outside(shapes), shapes['block_0']
  names = tuple(n for g in calibrate.groups(config.model) for n in g.layers)
  sums = {n: calibrate.kernel(params, n) for n in names}
  # The hidden states before every block of these few examples are held then.
  states = config.model.n_layers * _bytes(x_BTD)
  yield Program(
    'gradient of the loss',
    gradients.loss_gradient,
    (model, top, x_BTD, tokens_BT, weights_BT),
    beside=states,
  )
  yield Program(
    'gradients of a block',
    gradients.back,
    (block, names, params, sums, x_BTD, x_BTD),
    beside=states - _bytes(x_BTD),
  )


def _shapes(config: ConfigDict) -> dict[str, Any]:
  """The parameters with a single block: the others are like it."""
  config = config.copy_and_resolve_references().unlock()
  config.model.n_layers, config.model.scan_layers = 1, False
  model = transformer.build(config, 'cpu', 1)
  return transformer.abstract_params(model)


def _batch(
  config: ConfigDict, ptq: ConfigDict, dtype: str, size: str = 'batch_size'
) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
  shape = (ptq.calibration[size], ptq.calibration.length)
  return _like((*shape, config.model.d_model), dtype), _like(shape, 'float32')


def _statistics(inputs: int) -> statistics_lib.Statistics:
  return jax.eval_shape(lambda: statistics_lib.empty(inputs))


def _bytes(tree: Any) -> int:
  leaves = jax.tree.leaves(tree)
  return sum(int(np.prod(a.shape)) * a.dtype.itemsize for a in leaves)


def _like(shape: tuple[int, ...], dtype: str) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
