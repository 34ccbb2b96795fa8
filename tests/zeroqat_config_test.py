"""The config of ZeroQAT: its words, and that each can be run."""

import re

import pytest

from configs import zeroqat
from qat import config as config_lib

PATHS = (
  *(
    'embed/embedding',
    'head',
    'block_0/attn/q/kernel',
    'block_0/attn/v/kernel',
  ),
  *('block_0/attn/k/kernel', 'blocks/ffn/down/kernel', 'final_norm/scale'),
  *('block_0/attn/q/clip_high', 'block_0/attn/q/bias', 'block_0/norm/scale'),
)


def checked(variant):
  config = zeroqat.get_config(variant).unlock()
  config.model.n_layers = 1  # All blocks are alike.
  if not config.init.model:
    config_lib.check(config, devices=1)
  return config


@pytest.mark.parametrize(
  'variant',
  (
    *('w4a4', 'w6a6', 'w2a16', 'w4a4,task', 'w2a16,light,task', 'w4a4,ste'),
    *('w4a4,tiny', 'w6a6,1.3b', 'w4a4,1.3b,light', 'w2a16,700m,ste'),
    *(f'w2a16,{shape}' for shape in zeroqat.SHAPES),
    'llama-13b,w2a16,task,light',
    *('w4a4,joint', 'w6a6,tiny,joint,task'),
  ),
)
def test_every_variant_is_sound(variant):
  config = checked(variant)
  assert config.name == 'zeroqat-' + variant.replace(',', '-')
  ours = 'ste' not in variant
  assert config.optim.optimizer == ('sgd' if ours else 'adamw')
  assert config.optim.estimator == ('spsa' if ours else 'backprop')
  assert bool(config.data.task) == ('task' in variant)


@pytest.mark.parametrize(
  ('variant', 'expected'),
  [
    ('w3a4', "No variant 'w3a4'; choose among w6a6, .*, llama-13b"),
    ('', "No variant ''"),
    ('w4a4,w2a16', 'at most one of'),
    ('w4a4,tiny,opt-1.3b', 'at most one size'),
    ('w2a16,light,ste', "'ste' trains what 'light' freezes"),
    ('w4a4,joint,light', "'light' lacks"),
  ],
)
def test_other_words_are_refused(variant, expected):
  with pytest.raises(ValueError, match=expected):
    zeroqat.get_config(variant)


def trained(variant):
  pattern = zeroqat.get_config(variant).zo.perturbed
  return [path for path in PATHS if re.fullmatch(pattern, path)]


def test_what_is_trained():
  assert trained('w4a4') == [*PATHS[:6]]
  assert trained('w4a4,light') == [*PATHS[2:4]]


def test_a_size_begins_afresh_and_the_rest_with_a_model():
  fresh, other = (zeroqat.get_config(v) for v in ('w4a4,tiny', 'w4a4'))
  assert not fresh.init.model and not fresh.init.quant
  assert other.init.model == 'models/zeroqat-w4a4' and other.init.quant
  assert zeroqat.get_config('light,task').init.model == 'models/zeroqat-light'
  # As model folders compute.
  assert other.model.dot_dtype == 'float32' != fresh.model.dot_dtype
  opt = zeroqat.get_config('w2a16,opt-1.3b')
  assert (opt.model.d_model, opt.model.ffn) == (2048, 'plain')
  assert opt.quant.specs.low.group_size == 128


def test_the_hyper_parameters_of_the_paper():
  """Table C.1, and the comments of the authors' code."""
  config = zeroqat.get_config('w4a4')
  assert (config.data.batch_size, config.train.steps) == (4, 10_000)
  assert (config.optim.peak_lr, config.zo.eps) == (5e-7, 5e-4)
  assert (config.zo.directions, config.zo.clip) == (1, 0.2)
  assert config.optim.schedule == 'constant' and not config.optim.warmup_steps
  w2 = zeroqat.get_config('w2a16')
  assert (w2.optim.peak_lr, w2.zo.eps) == (1e-8, 1e-4)
  task = zeroqat.get_config('w2a16,task')
  assert (task.data.batch_size, task.train.steps) == (32, 8000)
  assert task.data.task_choices == 2  # So 16 documents.
  assert (task.optim.peak_lr, task.zo.eps, task.zo.clip) == (1e-6, 1e-3, 0)
  for path, on_text in (
    ('blocks/attn/q/kernel', True),
    ('blocks/ffn/norm/scale', False),
    ('blocks/attn/q/bias', False),
    ('final_norm/scale', False),
  ):
    assert re.fullmatch(task.zo.perturbed, path)
    assert bool(re.fullmatch(config.zo.perturbed, path)) == on_text
  assert not re.fullmatch(task.zo.perturbed, 'blocks/attn/q/clip_high')
  light = zeroqat.get_config('w4a4,task,light')
  assert light.zo.perturbed == zeroqat.LIGHT and not light.zo.clip
  sizes = task.data.task_train, task.data.task_dev, task.data.task_test
  assert sizes == (1000, 500, 1000)
