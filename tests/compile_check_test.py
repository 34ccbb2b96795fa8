"""scripts/compile_check.py: what it prints, refuses, and passes on."""

import json
import pathlib
import subprocess
import sys

import jax
import pytest

from qat import targets
from scripts import compile_check
from tests import tiny

# ml_collections loads a config file in a way that Python 3.12 has given up.
pytestmark = pytest.mark.filterwarnings('ignore:the load_module')

ROOT = pathlib.Path(compile_check.__file__).parents[1]
CONFIG = f'--config={ROOT}/configs/pquant.py:tiny'
SMALL = [
  '--config.model.n_layers=2',
  '--config.model.d_model=64',
  '--config.model.n_heads=2',
  '--config.model.n_kv_heads=2',
  '--config.model.scan_layers=True',
  '--config.model.remat=dots',
  '--config.data.seq_len=64',
  '--config.data.batch_size=8',
]


def compilers(*names):
  for name in names:
    lacking = targets.missing(targets.parse(name))
    if lacking:
      pytest.skip(lacking)


def refused(capsys, *arguments):
  assert compile_check.main(arguments) == 2
  printed = capsys.readouterr()
  assert not printed.out and printed.err.startswith('Error: ')
  return printed.err


def test_help(capsys):
  with pytest.raises(SystemExit) as end:
    compile_check.main(['--help'])
  assert end.value.code == 0
  text = capsys.readouterr().out
  for part in ('--target', '--json', '--config', 'NOTHING IS RUN'):
    assert part in text


def test_an_unknown_shape_of_a_model_is_refused(capsys, tmp_path):
  error = refused(
    capsys,
    f'--config={ROOT}/configs/ptq/gptq.py',
    '--model=llama9',
    '--target=h200',
    f'--probe={tmp_path}/answer',
  )
  assert '--model=llama9' in error and 'llama3-8b' in error


def test_a_missing_compiler_is_told_before_anything_is_compiled(
  capsys, monkeypatch
):
  monkeypatch.setattr(targets.importlib.util, 'find_spec', lambda _: None)
  monkeypatch.setattr(compile_check, '_in_a_process', None)
  error = refused(capsys, CONFIG, '--target=v5e:2x2,h200,v5e:2x2')
  lines = error.splitlines()
  assert len(lines) == 2
  assert f'pip install "jax[tpu]=={jax.__version__}"' in lines[0]
  assert 'jax-cuda13-plugin' in lines[1]


@pytest.mark.parametrize(
  ('arguments', 'expected'),
  [
    (['--target=v9:2x2'], "No target 'v9:2x2'"),
    (['--target=h200', '--config.model.nonsense=3'], 'nonsense'),
    (['--target=h200', 'nonsense'], 'unknown arguments nonsense'),
    (['--target=h200', '--nonsense=1'], 'nonsense'),
    (['--target=h200', '--config=configs/pquant.py:9b'], "No size '9b'"),
    (['--target=h200', '--config=nowhere.py'], 'nowhere.py'),
  ],
)
def test_a_wrong_argument_is_told(capsys, arguments, expected):
  assert expected in refused(capsys, CONFIG, *arguments)


class FakeDevices:
  """Devices of this process in the place of a target's."""

  def __init__(self, count):
    self.count = count

  def __call__(self, target):
    return jax.devices()[: self.count]


@pytest.mark.parametrize('devices', [1, 4])
def test_the_real_step_is_compiled(monkeypatch, devices):
  monkeypatch.setattr(targets, 'devices', FakeDevices(devices))
  config = tiny.config(
    'pquant', {'model.scan_layers': True, 'mesh.fsdp': devices}
  )
  with tiny.compiled_quickly():
    alone = devices == 1
    found = compile_check.probe(config, targets.parse('v5e:2x2'), compare=alone)
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
  monkeypatch.setattr(targets, 'devices', FakeDevices(8))
  config = tiny.config('fp', {'data.batch_size': 12})
  with pytest.raises(ValueError, match='data.batch_size=12'):
    compile_check.probe(config, targets.parse('v5e:2x4'))


def child(monkeypatch, code):
  """Lets the process of a target run `code` instead of the compiler."""
  run = subprocess.run

  def instead(command, **options):
    return run([sys.executable, '-c', code, *command[2:]], **options)

  monkeypatch.setattr(compile_check.subprocess, 'run', instead)


def test_an_end_of_the_compiler_is_told(monkeypatch, capsys):
  monkeypatch.setattr(targets, 'missing', lambda _: None)
  child(
    monkeypatch,
    'import os, sys; print("Check failed: x", file=sys.stderr, flush=True);'
    ' os.abort()',
  )
  assert compile_check.main([CONFIG, '--target=v5e:2x2']) == 1
  printed = capsys.readouterr().out
  assert 'SIGABRT' in printed and 'Check failed: x' in printed
  assert compile_check.main([CONFIG, '--target=v5e:2x2', '--json']) == 1
  (result,) = json.loads(capsys.readouterr().out)['results']
  assert 'SIGABRT' in result['error'] and result['target'] == 'v5e:2x2'


def test_the_table_says_that_nothing_was_run(monkeypatch, capsys):
  monkeypatch.setattr(targets, 'missing', lambda _: None)
  answer = {
    'target': 'h200:1',
    'memory_bytes': 141 * 10**9,
    'error': None,
    'mesh': {'data': 1, 'fsdp': 1},
    'compile_seconds': 12.5,
    'tokens_per_device': 8192,
    'argument_bytes': 3.73e9,
    'output_bytes': 3.73e9,
    'reused_bytes': 3.73e9,
    'temporary_bytes': 2e9,
    'peak_bytes': 142e9,
    'forward_peak_bytes': 100e9,
    'needed_flops': 1.5e13,
    'compiler_flops': None,
    'collectives': {'all-reduce': {'count': 3, 'bytes': 5e6, 'unknown': 1}},
  }
  code = (
    'import pathlib, sys; path ='
    ' [a for a in sys.argv if a.startswith("--probe=")][0][8:];'
    f' pathlib.Path(path).write_text({json.dumps(answer)!r})'
  )
  child(monkeypatch, code)
  assert compile_check.main([CONFIG, '--target=h200']) == 0
  printed = capsys.readouterr().out
  assert 'Nothing was run' in printed
  assert '1.420' in printed and 'backpropagation' not in printed
  for part in ('3.73 GB', 'NO ROOM', 'not told', '5.0 MB or more in 3'):
    assert part in printed


@pytest.mark.slow
@pytest.mark.parametrize('target', ['v5e:2x2', 'h200:2'])
def test_a_step_compiles_for_devices_that_are_not_there(target):
  compilers(target)
  done = subprocess.run(
    [
      sys.executable,
      compile_check.__file__,
      CONFIG,
      f'--target={target}',
      '--json',
      '--config.mesh.fsdp=2',
      *SMALL,
    ],
    capture_output=True,
    text=True,
    check=False,
    cwd=ROOT,
  )
  assert done.returncode == 0, done.stderr
  (result,) = json.loads(done.stdout)['results']
  assert result['error'] is None
  assert 0 < result['peak_bytes'] < result['memory_bytes']
  assert result['collectives']
