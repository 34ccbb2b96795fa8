"""Compiles programs of a config for devices that are not there; runs nothing.

Called in a process that was started with the `environment` of the target. What
comes back is JSON: `probe.result`, and figures of the compiler by name.
"""

import time
from typing import Any

import jax
from jax import errors as jax_errors
from jax import stages
from ml_collections import ConfigDict

from qat import carried
from qat import config as config_lib
from qat import flops
from qat import footprint
from qat import hlo
from qat import probe
from qat import sharding
from qat import step as step_lib
from qat import targets
from qat.infer import decode
from qat.nn import transformer
from qat.ptq import programs


def train_step(
  config: ConfigDict, target: targets.Target, compare: bool = False
) -> dict[str, Any]:
  """The training step that `python -m qat.main` runs.

  Args:
    config: a locked config. Without an `init.model`, what it quantizes and does
      not train counts as quantized for good.
    target: the devices.
    compare: whether also to compile what the step is compared with.

  Returns:
    Of each device; with `compare` also peaks of `footprint.beside`.

  Raises:
    ValueError: the config cannot run on these devices.
  """
  devices = targets.devices(target)
  config_lib.check(config, devices=len(devices), platform=devices[0].platform)
  mesh = sharding.make_mesh(config.mesh, devices)
  found = probe.result(target) | {
    'kind': devices[0].device_kind,
    'devices': len(devices),
    'mesh': dict(mesh.shape),
  }
  start = time.monotonic()
  try:
    with jax.set_mesh(mesh):
      run, described = carried.described_from_shapes(config)
    program = step_lib.compile_program(run, mesh, described)
    seconds = time.monotonic() - start
    others = footprint.beside(program, config) if compare else {}
    for name, other in others.items():
      peak = other.memory_analysis().peak_memory_in_bytes
      found[f'{name}_peak_bytes'] = peak
  except jax_errors.JaxRuntimeError as error:
    return found | {'error': probe.refusal(error)}
  tokens = config.data.batch_size * config.data.seq_len
  with jax.set_mesh(mesh):
    shapes = transformer.abstract_params(program.model)
  needed = flops.train_flops_per_token(config, shapes)
  own = {
    'tokens_per_device': tokens // len(devices),
    'needed_flops': needed * tokens / len(devices),
  }
  return found | _figures(program.train_step, seconds) | own


def decode_step(config: ConfigDict, target: targets.Target) -> dict[str, Any]:
  """A step of generation from packed weights, on the first device.

  Args:
    config: of the model; `data.batch_size` texts with room for `data.seq_len`
      tokens each are generated at once.
    target: the devices.

  Returns:
    As `train_step`. The operations are the mean over the positions of a text.

  Raises:
    ValueError: the model has no packed form.
  """
  device = targets.devices(target)[0]
  config = config.copy_and_resolve_references().unlock()
  config.mesh.update(data=1, fsdp=1)
  texts, length = config.data.batch_size, config.data.seq_len
  program = decode.decode_program(config, target.kernels, texts, length)
  there = jax.sharding.SingleDeviceSharding(device)
  arguments = jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=there),
    program.arguments,
  )
  found = probe.result(target) | {
    'kind': device.device_kind,
    'devices': 1,
    'mesh': {'data': 1, 'fsdp': 1},
  }
  run = jax.jit(program.function, donate_argnums=program.donate)
  start = time.monotonic()
  try:
    compiled = run.lower(*arguments).compile()
  except jax_errors.JaxRuntimeError as error:
    return found | {'error': probe.refusal(error)}
  figures = _figures(compiled, time.monotonic() - start)
  model = transformer.build(config, device.platform, 1)
  params = transformer.abstract_params(model)
  config.optim.estimator = 'backprop'  # A third of it is the forward pass.
  needed = flops.train_flops_per_token(config, params) / 3
  own = {'tokens_per_device': texts, 'needed_flops': texts * needed}
  return found | figures | own


def walk(
  ptq: ConfigDict, config: ConfigDict, target: targets.Target
) -> dict[str, Any]:
  """The programs of a quantization after training, on the first device.

  Args:
    ptq: a config of `configs/ptq`.
    config: the model's.
    target: the devices.

  Returns:
    'programs' has a dict for each; see `programs.measure`.
  """
  device = targets.devices(target)[0]
  found = programs.measure(config, ptq, device)
  return probe.result(target) | {'kind': device.device_kind} | found


def _figures(compiled: stages.Compiled, seconds: float) -> dict[str, Any]:
  """What a compiler tells of a program that it compiled in some seconds."""
  memory = compiled.memory_analysis()
  return {
    'compile_seconds': round(seconds, 1),
    'argument_bytes': memory.argument_size_in_bytes,
    'output_bytes': memory.output_size_in_bytes,
    'reused_bytes': memory.alias_size_in_bytes,
    'temporary_bytes': memory.temp_size_in_bytes,
    'peak_bytes': memory.peak_memory_in_bytes,
    'compiler_flops': (compiled.cost_analysis() or {}).get('flops'),
    'collectives': {
      kind: vars(each)
      for kind, each in hlo.collectives(compiled.as_text()).items()
    },
  }
