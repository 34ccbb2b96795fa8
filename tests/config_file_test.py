"""What a script's --config arguments make, and what they are refused for."""

import pathlib

import pytest

from configs import fp
from qat import config_file

# ml_collections loads a config file in a way that Python 3.12 has given up.
pytestmark = pytest.mark.filterwarnings('ignore:the load_module')

FILE = str(pathlib.Path(fp.__file__)) + ':tiny'


def test_fields_go_over_the_file():
  fields = ['--config.train.steps=7', '--config.optim.peak_lr', '2e-4']
  found = config_file.read(FILE, fields)
  expected = fp.get_config('tiny')
  expected.train.steps, expected.optim.peak_lr = 7, 2e-4
  assert found.to_dict() == expected.to_dict() and found.is_locked


@pytest.mark.parametrize(
  ('path', 'fields', 'expected'),
  [
    (FILE, ['--config.train.stepz=7'], 'stepz'),
    (FILE, ['--config.train.steps=many'], 'many'),
    (FILE, ['more'], 'unknown arguments more'),
    (FILE.replace('tiny', 'huge'), [], "No size 'huge'"),
    (FILE.replace('fp.py', 'ptq/gptq.py'), [], 'has no variants'),
    ('nowhere.py', [], 'nowhere.py'),
  ],
)
def test_what_is_wrong_is_told_in_a_line(path, fields, expected):
  with pytest.raises(ValueError, match=expected) as caught:
    config_file.read(path, fields)
  assert '\n' not in str(caught.value)
