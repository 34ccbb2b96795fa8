"""scripts/import_model.py and export_model.py: what is written, and refused."""

import json

import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from qat.infer import load
from scripts import export_model
from scripts import import_model
from tests.interop import conftest as small


@pytest.fixture
def llama(tmp_path, tokenizer):
  return small.write(tmp_path / 'theirs', 'llama3', tokenizer)


def refused(capsys, code):
  printed = capsys.readouterr()
  assert code == 2
  assert not printed.out
  assert printed.err.startswith('Error: ')
  return printed.err


def test_a_model_goes_in_and_out(llama, tmp_path, capsys):
  ours, back = tmp_path / 'ours', tmp_path / 'back'
  assert import_model.main([str(llama), '--out', str(ours)]) == 0
  printed = capsys.readouterr().out
  assert '2 layers of width 32, 4 heads (2 of keys), vocabulary 264' in printed
  assert "begins with '<|endoftext|>'" in printed
  # 2 (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48 + 2 * 32) + 2 * 264 * 32 + 32.
  assert '32.4k parameters' in printed
  assert export_model.main([str(ours), '--out', str(back)]) == 0
  before = safetensors_numpy.load_file(llama / 'model.safetensors')
  after = safetensors_numpy.load_file(back / 'model.safetensors')
  assert before.keys() == after.keys()
  for name, x in before.items():
    np.testing.assert_array_equal(after[name], x)
  config = json.loads((back / 'config.json').read_text())
  assert config['rope_scaling'] == small.CONFIGS['llama3']['rope_scaling']


def test_options_of_an_import(llama, tmp_path, tokenizer):
  token = tokenizer.id_to_token(5)
  out = tmp_path / 'ours'
  options = ['--dtype', 'bfloat16', '--dot-dtype', 'bfloat16']
  options += ['--end-of-text', token, '--out', str(out)]
  assert import_model.main([str(llama), *options]) == 0
  loaded = load.load_model(out, None)
  assert loaded.begin == loaded.end == 5
  assert loaded.config.model.dot_dtype == 'bfloat16'
  whole = safetensors_numpy.load_file(llama / 'model.safetensors')
  np.testing.assert_array_equal(
    loaded.params['head'], whole['lm_head.weight'].astype('bfloat16')
  )


def test_what_is_wrong_is_told_in_a_line(llama, tmp_path, capsys):
  out = tmp_path / 'out'

  def call(source, *options):
    return import_model.main([str(source), '--out', str(out), *options])

  message = refused(capsys, call(tmp_path / 'missing'))
  assert 'does not look like a model' in message
  message = refused(capsys, call(llama, '--end-of-text', '</s>'))
  assert "no token '</s>'" in message and '--end-of-text' in message
  assert not out.exists()
  out.mkdir()
  (out / 'x').touch()
  assert 'exists already' in refused(capsys, call(llama))
  code = export_model.main([str(llama), '--out', str(tmp_path / 'back')])
  assert 'scripts/import_model.py' in refused(capsys, code)
  code = export_model.main([str(tmp_path), '--out', str(tmp_path / 'back')])
  assert 'holds no run' in refused(capsys, code)
