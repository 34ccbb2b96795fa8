"""scripts/compare_ptq.py: its commands, its table, and going on."""

import json
import subprocess

import pytest

from configs.ptq import common
from scripts import compare_ptq

REPORT = {'totals': {'bits_per_weight': 3.25, 'seconds': 12.0}}
EVALUATION = {
  'eval/perplexity': 20.5,
  'eval/bits_per_byte': 1.25,
  'texts': [
    {'text': 'a/wiki.txt', 'perplexity': 123456.0, 'bits_per_byte': 4.0}
  ],
  'tasks': [{'task': 'piqa', 'variant': 'rc_0shot', 'acc': 0.61}],
}


class Processes:
  """Stands for the two scripts; keeps what it was asked for."""

  def __init__(self):
    self.commands, self.broken = [], None

  def __call__(self, command, **_):
    self.commands.append(command)
    if self.broken and any(self.broken in word for word in command):
      raise subprocess.CalledProcessError(2, command)
    out = [w.removeprefix('--out=') for w in command if w.startswith('--out=')]
    if out:
      folder = compare_ptq.pathlib.Path(out[0])
      folder.mkdir(parents=True)
      (folder / 'report.json').write_text(json.dumps(REPORT))
    return subprocess.CompletedProcess(
      command, 0, stdout=json.dumps(EVALUATION).encode()
    )


@pytest.fixture
def processes(monkeypatch):
  found = Processes()
  monkeypatch.setattr(compare_ptq.subprocess, 'run', found)
  return found


def run(tmp_path, *arguments):
  return compare_ptq.main(
    [f'--model={tmp_path}/m', f'--out={tmp_path}/out', *arguments]
  )


@pytest.mark.parametrize('name', compare_ptq.VARIANTS)
def test_a_variant_sets_fields_that_its_config_has(name):
  stem, fields = compare_ptq.VARIANTS[name]
  module = __import__(f'configs.ptq.{stem}', fromlist=[stem])
  config = module.get_config()
  with config.unlocked():
    config.update_from_flattened_dict(fields)
  for field, value in fields.items():
    section = config
    for part in field.split('.'):
      assert part in section
      section = section[part]
    assert section == value
  assert set(config) == set(common.base(stem))


def test_the_table_and_what_is_finished(tmp_path, processes, capsys):
  names = '--methods=gptq-3,billm-a8'
  more = ['--quantize=--dataset=d', '--evaluate=--text "a b.txt"']
  assert run(tmp_path, names, *more) == 0
  assert len(processes.commands) == 1 + 2 * 2
  _, quantize, evaluate, *_ = processes.commands
  assert quantize[-2:] == ['--config.method.bits=3', '--dataset=d']
  assert evaluate[-2:] == ['--text', 'a b.txt']
  table = capsys.readouterr().out.splitlines()
  assert [line.split(' | ')[0] for line in table[2:]] == [
    '| float',
    '| gptq-3',
    '| billm-a8',
  ]
  expected = '3.250 | 12.000 | 20.500 | 1.250 | 1.2e+05 | 4.000 | 0.610 |'
  assert table[3].endswith(expected)
  # Finished variants stay, and are told with new ones.
  assert run(tmp_path, '--methods=rtn-4', *more) == 0
  assert len(processes.commands) == 5 + 2
  rows = json.loads((tmp_path / 'out' / 'table.json').read_text())
  assert [row['variant'] for row in rows] == [
    *('float', 'rtn-4', 'gptq-3', 'billm-a8')
  ]
  assert not (tmp_path / 'out' / 'rtn-4' / 'model').exists()


def test_a_variant_that_fails_does_not_stop_the_others(
  tmp_path, processes, capsys
):
  processes.broken = 'gptq.py'
  assert run(tmp_path, '--methods=gptq-3,rtn-3') == 1
  printed = capsys.readouterr()
  assert 'Error: gptq-3: ' in printed.err
  assert '| rtn-3 |' in printed.out and '| gptq-3 |' not in printed.out


def test_a_dry_run_only_tells(tmp_path, processes, capsys):
  assert run(tmp_path, '--methods=tacq-2', '--dry-run') == 0
  assert not processes.commands and not (tmp_path / 'out').exists()
  assert '--config.quantizer_options.bits=2' in capsys.readouterr().out


def test_an_unknown_variant_is_refused(tmp_path, processes, capsys):
  assert run(tmp_path, '--methods=gptq-5') == 2
  assert 'no gptq-5; there are rtn-4' in capsys.readouterr().err
  assert not processes.commands


def test_other_commands_do_not_mix_with_what_is_there(
  processes, tmp_path, capsys
):
  assert run(tmp_path, '--methods=rtn-4') == 0
  assert run(tmp_path, '--methods=rtn-4') == 0  # Nothing is to be done.
  done = len(processes.commands)
  capsys.readouterr()
  assert run(tmp_path, '--methods=rtn-4', '--evaluate=--limit=3') == 2
  assert 'made by other commands' in capsys.readouterr().err
  assert len(processes.commands) == done
