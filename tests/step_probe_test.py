"""What a probe tells of a step, of devices of this process."""

import json

import jax
from jax import numpy as jnp
import pytest

from pallas_kernels import dispatch
from qat import step as step_lib
from qat import step_probe
from qat import targets
from tests import tiny

V5E = targets.parse('v5e:2x2')


def of_this_process(monkeypatch, count):
  """Devices of this process in the place of a target's."""
  monkeypatch.setattr(targets, 'devices', lambda _: jax.devices()[:count])


@pytest.mark.parametrize(
  'devices', [1, pytest.param(4, marks=pytest.mark.slow)]
)
def test_the_real_step_is_compiled(monkeypatch, devices):
  of_this_process(monkeypatch, devices)
  config = tiny.config(
    'pquant', {'model.scan_layers': True, 'mesh.fsdp': devices}
  )
  alone = devices == 1
  with tiny.compiled_quickly():
    found = step_probe.train_step(config, V5E, compare=alone)
  json.dumps(found)
  assert found['error'] is None and found['devices'] == devices
  assert found['mesh'] == {'data': 1, 'fsdp': devices}
  assert found['tokens_per_device'] == 8 * 16 // devices
  assert found['argument_bytes'] > 0 and found['temporary_bytes'] > 0
  assert bool(found['collectives']) == (devices > 1)
  assert found['memory_bytes'] == 16 << 30
  for name in ('forward', 'backprop'):
    assert (found.get(f'{name}_peak_bytes', 0) > 0) == alone


def test_a_config_that_the_devices_cannot_run_is_refused(monkeypatch):
  of_this_process(monkeypatch, 8)
  config = tiny.config('fp', {'data.batch_size': 12})
  with pytest.raises(ValueError, match='data.batch_size=12'):
    step_probe.train_step(config, targets.parse('v5e:2x4'))


def test_the_real_step_of_generation_is_compiled(monkeypatch):
  of_this_process(monkeypatch, 1)
  # The devices are CPUs, so it is their packed form.
  monkeypatch.setattr(
    targets.Target, 'kernels', property(lambda _: dispatch.here())
  )
  config = tiny.config('pquant', {'data.batch_size': 2, 'data.seq_len': 32})
  with tiny.compiled_quickly():
    found = step_probe.decode_step(config, V5E)
  json.dumps(found)
  assert found['error'] is None and found['devices'] == 1
  assert found['tokens_per_device'] == 2
  # The caches, keys and values of a layer, are given and come back in place.
  cache = 2 * 2 * 32 * 32 * jnp.dtype(config.model.dot_dtype).itemsize
  assert found['argument_bytes'] > cache
  assert cache <= found['reused_bytes'] <= found['output_bytes']
  weights = 4 * 32 * 32 + 3 * 32 * 48 + 64 * 32
  assert found['needed_flops'] == 2 * (2 * weights + 2 * 32 * 32)


def test_what_nothing_trains_is_compiled_as_quantized_for_good(monkeypatch):
  of_this_process(monkeypatch, 1)
  given = []

  def compile_program(config, mesh, described):
    given.append(described)
    raise ValueError('enough')

  monkeypatch.setattr(step_lib, 'compile_program', compile_program)
  fields = {
    'optim.estimator': 'spsa',
    'optim.optimizer': 'sgd',
    'optim.clip_norm': 0.0,
  }
  light = fields | {'zo.perturbed': '.*attn/(q|v)/kernel'}
  for changes in ({}, fields, light):
    with pytest.raises(ValueError, match='enough'):
      step_probe.train_step(tiny.config('integer', changes), V5E)
  every, spsa, frozen = given
  assert every == spsa == {}
  assert frozen.keys() == {
    f'block_0/{layer}/kernel'
    for layer in ('attn/k', 'attn/o', 'ffn/gate', 'ffn/up', 'ffn/down')
  }
