"""Tests of qat.finish; what it writes is looked at in train_test."""

import types

import pytest

from configs import bitnet
from configs import bitnet_b158
from configs import fp
from configs import integer
from configs import lsq
from configs import onebit
from configs import paretoq
from configs import pquant
from qat import config as config_lib
from qat import finish
from qat.data import dataset as dataset_lib
from qat.data import tokenizer as tokenizer_lib
from qat.nn import transformer
from tests import tiny


@pytest.mark.parametrize(
  ('module', 'size', 'bits'),
  [
    (fp, 'tiny', 16.0),
    (bitnet, 'tiny', 1.0),
    (bitnet_b158, 'tiny', 1.58),
    (onebit, 'tiny', 1.0),
    (lsq, 'tiny', 4.0),
    (paretoq, 'tiny', 2.0),
    (integer, 'tiny', 4.0),
    # The exact shares of 8-bit weights are 3.40 %, 4.17 % and 4.69 %; the
    # paper's 1.28, 1.28 and 1.35 use rounded ones.
    (pquant, '300m', 1.24),
    (pquant, '700m', 1.29),
    (pquant, '1.3b', 1.33),
  ],
)
def test_bits_per_weight(module, size, bits):
  model = transformer.build(module.get_config(size), 'cpu', 1)
  params = transformer.abstract_params(model)
  assert finish.bits_per_weight(params, model.rules) == pytest.approx(
    bits, abs=0.005
  )


@pytest.mark.parametrize(
  ('begin', 'expected'), [('end', [7]), ('tokenizer', [])]
)
def test_samples_begin_as_texts_do(begin, expected, monkeypatch):
  config = tiny.config(
    'fp', {'data.begin': begin, 'sample.prompts': ('the sea', '')}
  )
  tokenizer = tokenizer_lib.train(['the sea was calm ' * 9], 262)
  given = []

  def generate(model, params, prompt_T, **options):
    assert options['stop'] == 7
    given.append(prompt_T)
    return []

  monkeypatch.setattr(finish.generate, 'generate', generate)
  finish._samples(
    types.SimpleNamespace(
      config=config, model=transformer.build(config, 'cpu', 1)
    ),
    {},
    types.SimpleNamespace(tokenizer=tokenizer, eot_id=7),
  )
  ids = tokenizer.encode('the sea', add_special_tokens=False).ids
  # Something has to stand before the first token.
  assert given == [[*expected, *ids], [7]]


def test_what_would_fail_at_the_end_fails_first(tmp_path):
  dataset = dataset_lib.open_dataset(tiny.dataset(tmp_path))
  short = {'sample.prompts': ('the sea',), 'sample.tokens': 15}
  learned = {'model.max_positions': 16, 'model.positions': 'learned'}
  finish.check(tiny.config('fp', short), dataset)
  finish.check(tiny.config('fp', {**learned, 'sample.tokens': 4}), dataset)
  with pytest.raises(config_lib.ConfigError, match=r"tokens=15 after .*'the s"):
    finish.check(tiny.config('fp', {**short, **learned}), dataset)
  many = tiny.config('fp', {'sensitivity.sequences': 10**6})
  with pytest.raises(
    config_lib.ConfigError, match='sequences=1000000: .*train'
  ):
    finish.check(many, dataset)


def test_a_run_of_no_calibration_sequences_has_no_study(tmp_path):
  dataset = dataset_lib.open_dataset(tiny.dataset(tmp_path))
  config = tiny.config('bitnet', {'sensitivity.sequences': 0})
  finish.check(config, dataset)
  program = types.SimpleNamespace(config=config)  # Its model is not asked for.
  assert finish.study(program, {}, dataset, tmp_path / 'run', None, 3)
  assert not (tmp_path / 'run').exists()
