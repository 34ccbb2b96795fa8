"""What a walk runs on a device, as programs of abstract shapes to compile.

For models that do not fit the machine at hand: how much memory GPTQ and TaCQ
need, matrix by matrix and block by block, as a compiler lays it out.
"""

from collections.abc import Iterator
from collections.abc import Mapping
import contextlib
from typing import Any
from typing import NamedTuple

import jax
from jax import numpy as jnp
from ml_collections import ConfigDict
import numpy as np

from qat.nn import transformer
from qat.ptq import apply
from qat.ptq import calibrate
from qat.ptq import gptq
from qat.ptq import gradients
from qat.ptq import hessian
from qat.ptq import statistics as statistics_lib
from qat.ptq import tacq as tacq_lib


class Program(NamedTuple):
  """A jitted function with its arguments.

  Attributes:
    name: what it does.
    run: jitted.
    arguments: static ones, and shapes with dtypes.
    beside: bytes that the walk holds on the device beside the arguments.
    precise: whether it is traced under `gradients.precise`.
  """

  name: str
  run: Any
  arguments: tuple[Any, ...]
  beside: int = 0
  precise: bool = False


class Sizes(NamedTuple):
  """Bytes of one block and of all hidden states; together the limit."""

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
  model = transformer.build(config, platform, 1)
  shapes, tacq = _shapes(config), ptq.algorithm == 'tacq'
  block, params = calibrate.one_block(model, shapes), shapes['block_0']
  x_BTD, weights_BT = _batch(config, ptq, 'batch_size', config.model.dtype)
  yield Program(
    'embedding',
    calibrate.embed_rows,
    (
      model,
      {k: v for k, v in shapes.items() if k == 'positions'},
      _like(x_BTD.shape, shapes['embed']['embedding'].dtype),
    ),
  )
  groups = calibrate.groups(config.model)
  grams = {
    name: _statistics(calibrate.kernel(params, name).shape[0])
    for name in (group.layers[0] for group in groups)
  }
  passes = [(n,) for n in grams] if ptq.true_sequential else [tuple(grams)]
  for names in passes:
    sums = {name: grams[name] for name in names}
    yield Program(
      f'statistics of {", ".join(names)}',
      calibrate.observe,
      (block, names, params, sums, x_BTD, weights_BT, None),
    )
  yield from _codes(config, ptq, params, grams)
  yield Program('a block', calibrate.advance, (block, params, x_BTD))
  if tacq:
    yield from _gradients(config, ptq, platform, shapes)


def _codes(
  config: ConfigDict, ptq: ConfigDict, params: Mapping, grams: Mapping
) -> Iterator[Program]:
  """From Gram matrices to codes and their errors, each shape once."""
  tacq = ptq.algorithm == 'tacq'
  section = ptq.quantizer_options if tacq else ptq.method
  options = gptq.Options(**section.to_dict())
  held, factors, matrices = _bytes(params), {}, {}
  for group in calibrate.groups(config.model):
    gram = grams[group.layers[0]]
    attempt = (gram.gram_KK, _like((), 'float32'), _like((), 'float32'))
    attempt += (_like((), 'int32'), options.act_order)
    factors[gram.gram_KK.shape[0]] = attempt
    kernels = {n: calibrate.kernel(params, n) for n in group.layers}
    for name, w_KN in kernels.items():
      # The matrix is the block's; the group's values are beside the block.
      others = held + _bytes(kernels) - 2 * _bytes(w_KN)
      matrices.setdefault(w_KN.shape, []).append((others, name, w_KN))
  for width, attempt in factors.items():
    yield Program(f'factor of {width} inputs', hessian.attempt, attempt, held)
  for shape, found in matrices.items():
    others, (_, name, w_KN) = max(found)[0], found[0]
    attempt, (rows, columns) = factors[shape[0]], shape
    factor = jax.eval_shape(
      lambda *a, act_order=attempt[-1]: hessian.attempt(*a, act_order),
      *attempt[:-1],
    )
    yield Program(
      f'codes of {name}, {rows} x {columns}',
      gptq.solve,
      (w_KN, factor, options, _like(shape, 'bool') if tacq else None),
      others + _bytes(w_KN),  # Its own value follows while the factor is there.
    )
    yield Program(
      f'errors of {name}, {rows} x {columns}',
      apply.errors,
      (w_KN, w_KN, attempt[0]),
      others,
    )
    if tacq:
      yield Program(
        f'scores of {name}, {rows} x {columns}',
        tacq_lib.scores,
        (w_KN, w_KN, w_KN),
        held - _bytes(w_KN),
      )


def measure(
  config: ConfigDict, ptq: ConfigDict, device: jax.Device
) -> dict[str, Any]:
  """Compiles all programs for a device; runs none.

  Returns:
    Bytes: 'block_bytes', 'states_bytes', 'limit_bytes' (both together),
    'most_bytes' (the largest peak with what is beside it), and 'programs', for
    each its name, 'peak_bytes', 'temporary_bytes', 'beside_bytes', and
    'compiler_flops'.
  """
  there = jax.sharding.SingleDeviceSharding(device)

  def place(leaf):
    if not isinstance(leaf, jax.ShapeDtypeStruct):
      return leaf
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=there)

  rows = []
  for program in programs(config, ptq, device.platform):
    arguments = [jax.tree.map(place, a) for a in program.arguments]
    how = gradients.precise if program.precise else contextlib.nullcontext
    with how():
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
    'limit_bytes': held.block + held.states,
    'most_bytes': max(r['peak_bytes'] + r['beside_bytes'] for r in rows),
    'programs': rows,
  }


def _gradients(
  config: ConfigDict, ptq: ConfigDict, platform: str, shapes: Mapping
) -> Iterator[Program]:
  model = gradients.clean_model(config, platform)
  block = calibrate.one_block(model, shapes)
  x_BTD, weights_BT = _batch(config, ptq, 'gradient_batch', 'float32')
  tokens_BT = _like(weights_BT.shape, 'int32')
  params = shapes['block_0']
  names = tuple(n for g in calibrate.groups(config.model) for n in g.layers)
  sums = {n: calibrate.kernel(params, n) for n in names}
  for name, run, arguments in (
    ('a block in float32', calibrate.advance, (block, params, x_BTD)),
    (
      'gradient of the loss',
      gradients.loss_gradient,
      (
        model,
        gradients.last(config.model, shapes),
        x_BTD,
        tokens_BT,
        weights_BT,
      ),
    ),
    (
      'gradients of a block',
      gradients.back,
      (block, names, params, sums, x_BTD, x_BTD),
    ),
  ):
    yield Program(name, run, arguments, precise=True)


def _shapes(config: ConfigDict) -> dict[str, Any]:
  """The parameters with a single block: the others are like it."""
  config = config.copy_and_resolve_references().unlock()
  config.model.n_layers, config.model.scan_layers = 1, False
  model = transformer.build(config, 'cpu', 1)
  return transformer.abstract_params(model)


def _batch(
  config: ConfigDict, ptq: ConfigDict, size: str, dtype: str
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
