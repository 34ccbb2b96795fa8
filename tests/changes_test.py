"""What a resumed run may change, and how a difference is told."""

import json

from ml_collections import ConfigDict
import pytest

from configs import pquant
from qat import changes
from qat import config as config_lib


def get(**fields) -> ConfigDict:
  """A config; `fields` are named with '__' for '.'."""
  config = pquant.get_config('tiny')
  config.update_from_flattened_dict(
    {name.replace('__', '.'): value for name, value in fields.items()}
  )
  return config


SAFE_CHANGES = dict(
  name='other',
  train__steps=800,
  train__log_every=1,
  eval__every=7,
  eval__batch_size=8,
  checkpoint__every=5,
  sensitivity__every=10,
  sample__prompts=('a', 'b', 'c'),
  mesh__fsdp=2,
  mesh__data=4,
  model__remat='block',
  data__workers=2,
  data__threads=4,
  data__timeout_s=1.0,
  data__cache_dir='elsewhere',
)
UNSAFE_CHANGES = dict(
  seed=1,
  model__d_model=128,
  model__dtype='bfloat16',
  model__n_experts=2,
  quant__rules=(('.*', 'binary'),),
  quant__specs__narrow__granularity='channel',
  optim__peak_lr=1e-4,
  optim__accumulate=2,
  data__dataset='data/other',
  data__batch_size=32,
  data__seq_len=128,
)


def test_safe_changes_are_taken():
  changes.refuse_changes(get(), get(**SAFE_CHANGES), 'w')
  changes.refuse_changes(get(), get(), 'w')


def test_every_change_is_seen():
  fields = {**SAFE_CHANGES, **UNSAFE_CHANGES}
  found = changes.changes(get(), get(**fields))
  names = [name.replace('__', '.') for name in fields]
  assert [change.field for change in found] == sorted(names)


@pytest.mark.parametrize('field', UNSAFE_CHANGES)
def test_an_unsafe_change_is_refused_with_its_difference(field):
  old, new = get(), get(**{**SAFE_CHANGES, field: UNSAFE_CHANGES[field]})
  with pytest.raises(config_lib.ConfigError) as caught:
    changes.refuse_changes(old, new, 'runs/mine')
  lines = str(caught.value).splitlines()
  assert 'runs/mine' in lines[0] and '--workdir' in lines[-1]
  (line,) = [line for line in lines if '->' in line]
  assert line.strip().startswith(field.replace('__', '.') + ': ')
  assert line.endswith(f'-> {json_like(UNSAFE_CHANGES[field])!r}')


def json_like(value):
  return json.loads(json.dumps(value))


def test_a_field_that_one_config_lacks_is_a_change():
  old, new = get().to_dict(), get()
  del old['optim']['eps']
  (change,) = changes.changes(ConfigDict(old), new)
  assert str(change) == "optim.eps: '(absent)' -> 1e-08"
  (change,) = changes.changes(new, ConfigDict(old))
  assert str(change) == "optim.eps: 1e-08 -> '(absent)'"
