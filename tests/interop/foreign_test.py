"""Which models are another program's, and that all open alike."""

import pytest

from qat.interop import foreign
from tests.interop import conftest as small


def test_what_is_another_programs(tmp_path, tokenizer):
  folder = small.write(tmp_path / 'm', 'llama', tokenizer)
  (tmp_path / 'x.gguf').touch()
  (tmp_path / 'x.txt').touch()
  assert foreign.is_foreign(folder)
  assert foreign.is_foreign(tmp_path / 'x.gguf')
  assert not foreign.is_foreign(tmp_path / 'x.txt')
  assert not foreign.is_foreign(tmp_path)
  assert not foreign.is_foreign(tmp_path / 'missing')
  (folder / 'config.json').write_text('{"model": {}}')
  assert not foreign.is_foreign(folder)


def test_a_folder_is_opened_with_its_options(tmp_path, tokenizer):
  folder = small.write(tmp_path / 'm', 'llama', tokenizer)
  given = tmp_path / 't.json'
  (folder / 'tokenizer.json').rename(given)
  token = tokenizer.id_to_token(5)
  source = foreign.open_model(str(folder), tokenizer=given)
  assert (source.begin, source.end) == (0, 0)
  assert source.about['name'] == 'm'
  with pytest.raises(ValueError, match='no token .</s>'):
    foreign.open_model(str(folder), tokenizer=given, end_of_text='</s>')
  source = foreign.open_model(str(folder), tokenizer=given, end_of_text=token)
  assert (source.begin, source.end) == (5, 5)


def test_a_path_that_does_not_exist(tmp_path):
  with pytest.raises(FileNotFoundError, match='does not look like a model'):
    foreign.open_model(str(tmp_path / 'missing'))
  with pytest.raises(FileNotFoundError, match=r'No file .*x\.gguf'):
    foreign.open_model(str(tmp_path / 'x.gguf'))


def test_a_config_is_only_made_of_a_whole_model(tmp_path, tokenizer, base):
  found = small.random_tensors('llama')
  del found['model.norm.weight']
  folder = small.write(tmp_path / 'm', 'llama', tokenizer, found)
  source = foreign.open_model(str(folder))
  with pytest.raises(ValueError, match=r'm is not .*1 tensors:\n  norm.weight'):
    foreign.config(source, base, 'float32')
