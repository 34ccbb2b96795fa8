"""One kernel, compiled; and the schedules that this is for."""

import json
import subprocess
import sys

import jax
from jax import numpy as jnp
import pytest

from pallas_kernels import cases
from qat import kernel_probe
from qat import targets
from scripts import compile_check

V5E, H200 = targets.parse('v5e:2x2'), targets.parse('h200')


class Double:
  """Stands for a case: a program for any device."""

  name, flops = 'double', 7

  def call(self):
    return lambda x: x + x, (jax.ShapeDtypeStruct((5, 3), jnp.float32),)


@pytest.fixture
def here(monkeypatch):
  """This process's device in the place of a target's; its environment stays."""
  monkeypatch.setattr(targets, 'devices', lambda _: jax.devices()[:1])
  monkeypatch.setattr(cases, 'cases', lambda _: [Double()])
  monkeypatch.setenv('LIBTPU_INIT_ARGS', '--old=1')
  monkeypatch.setenv('MOSAIC_GPU_DUMP_TO', 'nowhere')


def test_figures_of_a_case(here):
  found = kernel_probe.measure(V5E, 'double')
  json.dumps(found)
  assert found['case'] == 'double' and found['error'] is None
  assert found['argument_bytes'] == found['output_bytes'] == 60
  assert found['needed_flops'] == 7
  assert found['schedules'] == {}  # It has no kernel.


def test_without_what_the_assembler_says_there_is_no_answer(here):
  with pytest.raises(FileNotFoundError, match='ptxas'):
    kernel_probe.measure(H200, 'double')


def test_registers_are_those_of_the_largest_kernel(tmp_path):
  for name, used, spilled in (('a', 40, 8), ('b', 168, 0)):
    (tmp_path / f'{name}.ptxas').write_text(
      f'    16 bytes stack frame, {spilled} bytes spill stores, 4 bytes spill'
      f' loads\nptxas info    : Used {used} registers, used 2 barriers\n'
    )
  found = kernel_probe._registers(tmp_path)
  assert found == {'registers': 168, 'spilled_bytes': 8}


def test_another_case_is_refused(capsys):
  arguments = ['--target=v5e:2x2', '--case=nonsense', '--probe=nowhere']
  assert kernel_probe.main(arguments) == 2
  assert "No case 'nonsense'" in capsys.readouterr().err


def compiled(target, only):
  lacking = targets.missing(targets.parse(target))
  if lacking:
    pytest.skip(lacking)
  done = subprocess.run(
    [
      *(sys.executable, compile_check.__file__, '--what=kernels', '--json'),
      *(f'--target={target}', f'--only={only}'),
    ],
    capture_output=True,
    text=True,
    check=False,
  )
  results = json.loads(done.stdout)['results']
  assert done.returncode == 0, results
  return results


# Of the plain int8 product, at most: what unpacking 1-bit weights may cost.
@pytest.mark.slow
@pytest.mark.parametrize(('chip', 'most'), [('v5e', 1.1), ('v6e', 1.4)])
def test_unpacking_1_bit_weights_takes_few_instructions(chip, most):
  only = '^packed_matmul tpu (1bit|int8) int8 128x'
  steps = {}
  for result in compiled(f'{chip}:2x2', only):
    ((name, found),) = result['schedules'].items()
    assert found['total'] > found['step'] + sum(found['conditions'])
    steps[name.split('.')[0]] = found['step']
  plain = steps.pop('packed_matmul_int8')
  assert plain > 200  # Of 128 x 1,024 x 256 products.
  assert steps['packed_matmul_1bit'] <= most * plain


@pytest.mark.slow
def test_a_kernel_of_a_gpu_spills_nothing():
  (found,) = compiled('h200', '^packed_matmul gpu 1bit int8 1x')
  assert 0 < found['registers'] <= 255 and found['spilled_bytes'] == 0
