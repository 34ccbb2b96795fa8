"""Names of accelerators, and what compiling for them needs."""

import importlib.util
import os
import subprocess
import sys

import jax
import pytest

from pallas_kernels import dispatch
from qat import targets


@pytest.mark.parametrize(
  ('name', 'kind', 'shape'),
  [
    ('v5p:2x2x1', 'v5p', '2x2x1'),
    ('v5e:4x4', 'v5e', '4x4'),
    ('tpu7x:2x2x1', 'tpu7x', '2x2x1'),
    ('h200', 'h200', '1'),
    ('h200:8', 'h200', '8'),
  ],
)
def test_a_target_has_a_kind_and_a_shape(name, kind, shape):
  target = targets.parse(name)
  assert (target.kind, target.shape) == (kind, shape)
  assert target.is_gpu == (kind == 'h200')
  assert targets.parse(target.name) == target


@pytest.mark.parametrize(
  'name',
  [
    '',
    'v5p',
    'v5p:',
    'v5p:2',
    'v5e:0x4',
    'v9:2x2',
    'h200:2x2',
    'h200:0',
    'a100',
  ],
)
def test_another_name_is_refused(name):
  with pytest.raises(ValueError, match='No target') as error:
    targets.parse(name)
  assert repr(name) in str(error.value)
  assert 'v5p:2x2x1' in str(error.value) and 'h200' in str(error.value)


@pytest.mark.parametrize('name', ['v5e:2x2', 'h200'])
def test_the_process_itself_stays_on_its_cpu(name):
  inherited = {'HOME': '/h', 'JAX_PLATFORMS': 'tpu', 'XLA_FLAGS': '--a=1'}
  made = targets.environment(targets.parse(name), inherited)
  assert made['JAX_PLATFORMS'] == 'cpu' and made['HOME'] == '/h'
  assert made['XLA_FLAGS'].startswith('--a=1')
  assert inherited['JAX_PLATFORMS'] == 'tpu'


@pytest.mark.parametrize(
  ('name', 'package'), [('v5e:2x2', 'jax[tpu]'), ('h200', 'jax-cuda13-plugin')]
)
def test_a_missing_compiler_is_told_with_the_command(
  monkeypatch, name, package
):
  target = targets.parse(name)
  monkeypatch.setattr(importlib.util, 'find_spec', lambda _: None)
  text = targets.missing(target)
  assert text.startswith(target.name)
  assert 'pip install' in text and f'{package}=={jax.__version__}' in text
  monkeypatch.setattr(importlib.util, 'find_spec', lambda _: 'there')
  assert targets.missing(target) is None


DEVICES = """
from qat import targets
target = targets.parse({name!r})
devices = targets.devices(target)
print(len(devices), devices[0].platform, devices[0].device_kind)
"""


@pytest.mark.parametrize(
  ('name', 'expected'),
  [('v5e:2x4', '8 tpu TPU v5 lite'), ('h200:8', '8 gpu NVIDIA H200')],
)
def test_devices_of_a_target(name, expected):
  target = targets.parse(name)
  if targets.missing(target):
    pytest.skip(targets.missing(target))
  found = subprocess.run(
    [sys.executable, '-c', DEVICES.format(name=name)],
    env=targets.environment(target, os.environ),
    capture_output=True,
    text=True,
    check=False,
  )
  assert found.stdout.strip() == expected, found.stderr


@pytest.mark.parametrize('name', ['v4:2x2x1', 'v5e:2x2', 'tpu7x:2x2x1', 'h200'])
def test_there_are_kernels_for_every_target(name):
  target = targets.parse(name)
  assert dispatch.rows_for('packed_matmul', target.kernels)


def test_every_kind_has_a_memory():
  for kind, size in targets.MEMORY.items():
    assert 16 << 30 <= size < 200e9, kind
