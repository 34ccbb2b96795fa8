"""scripts/compile_check.py: what it asks, prints and refuses."""

import json
import pathlib
import subprocess
import sys

import jax
import pytest

from qat import probe
from qat import targets
from scripts import compile_check
from tests import probe_tables_test

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


@pytest.fixture
def asked(monkeypatch):
  """What is asked, of a probe that answers by the target."""
  calls = []

  def ask(target, command, seconds):
    calls.append((target.name, command, seconds))
    error = None if target.is_gpu else 'no room'
    found = probe_tables_test.STEP | probe_tables_test.KERNEL
    del found['case']
    return found | {'target': target.name, 'error': error}

  monkeypatch.setattr(targets, 'missing', lambda _: None)
  monkeypatch.setattr(probe, 'ask', ask)
  return calls


def test_help(capsys):
  with pytest.raises(SystemExit) as end:
    compile_check.main(['--help'])
  assert end.value.code == 0
  text = capsys.readouterr().out
  for part in ('--target', '--json', '--config', 'NOTHING IS RUN', '--limit'):
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
  monkeypatch.setattr(probe, 'ask', None)
  error = refused(capsys, CONFIG, '--target=v5e:2x2,h200,v5e:2x2')
  lines = error.splitlines()
  assert len(lines) == 2
  assert f'pip install "jax[tpu]=={jax.__version__}"' in lines[0]
  assert 'jax-cuda13-plugin' in lines[1]


@pytest.mark.parametrize(
  ('arguments', 'expected'),
  [
    ([CONFIG, '--target=v9:2x2'], "No target 'v9:2x2'"),
    ([CONFIG, '--target=h200', '--config.model.nonsense=3'], 'nonsense'),
    ([CONFIG, '--target=h200', 'nonsense'], 'unknown arguments nonsense'),
    ([CONFIG, '--target=h200', '--nonsense=1'], 'nonsense'),
    (['--target=h200', '--config=configs/pquant.py:9b'], "No size '9b'"),
    (['--target=h200', '--config=nowhere.py'], 'nowhere.py'),
    (['--target=h200'], '--what=train_step needs a --config'),
    ([CONFIG, '--target=h200', '--only=act'], "--only='act'"),
    (['--what=decode', '--target=h200', CONFIG, '--compare'], '--compare'),
    (['--what=kernels', '--target=h200', CONFIG], 'takes no config'),
    (['--what=kernels', '--target=h200', '--config.a=1'], '--config.a=1'),
    (['--what=kernels', '--target=h200', '--compare'], '--compare'),
    (['--what=kernels', '--target=h200', '--only=('], "--only='('"),
    (['--what=kernels', '--target=h200', '--only=tpu'], 'leaves no case'),
  ],
)
def test_a_wrong_argument_is_told(capsys, monkeypatch, arguments, expected):
  monkeypatch.setattr(targets, 'missing', lambda _: None)
  assert expected in refused(capsys, *arguments)


def test_each_target_is_asked_and_a_failure_is_told(asked, capsys):
  status = compile_check.main([CONFIG, '--target=v5e:2x2,h200', '--limit=9'])
  assert status == 1
  assert [(name, seconds) for name, _, seconds in asked] == [
    ('v5e:2x2', 9),
    ('h200:1', 9),
  ]
  assert all(command[1] == CONFIG for _, command, _ in asked)
  printed = capsys.readouterr().out
  assert 'Nothing was run' in printed and 'v5e:2x2: no room' in printed
  assert compile_check.main([CONFIG, '--target=h200']) == 0


def test_each_kernel_is_asked_for_by_its_name(asked, capsys):
  only = '--only=^packed_matmul .* int4 int8 (1|16)x'
  arguments = ['--what=kernels', only, '--target=h200,v5e:2x2']
  assert compile_check.main(arguments) == 1
  names = [
    f'packed_matmul {name} int4 int8 {rows}x2000x600'
    for name in ('gpu', 'tpu')
    for rows in (1, 16)
  ]
  assert [command[-1] for _, command, _ in asked] == [
    f'--case={name}' for name in names
  ]
  printed = capsys.readouterr().out
  assert f'v5e:2x2 {names[2]}: no room' in printed
  compile_check.main([*arguments, '--json'])
  answer = json.loads(capsys.readouterr().out)
  assert [r['case'] for r in answer['results']] == names
  assert 'Nothing was run' in answer['note']


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
