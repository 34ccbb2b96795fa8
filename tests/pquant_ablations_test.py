"""The ablations of configs/pquant.py are valid, distinct, and they train."""

import functools

from jax import numpy as jnp
import numpy as np
import pytest

from configs import pquant
from qat import config as config_lib
from qat import step as step_lib
from qat.nn import transformer
from tests import tiny

# At the width of the tests, and for as few programs as there are kinds.
SHRUNKEN = {
  'model.branch_width': 8,
  'model.branch_multiple': 1,
  'model.n_experts': 2,
  'quant.specs.binary.group_size': 16,
}


def shrunken(name):
  fields = {
    key: value if value == 1 else SHRUNKEN.get(key, value)
    for key, value in pquant.ABLATIONS[name].items()
  }
  return tiny.config('pquant', fields)


@functools.cache
def trained(text):
  """The losses of three steps on one batch; equal configs are trained once."""
  config = config_lib.from_json(text)
  with tiny.compiled_quickly():
    program = step_lib.compile_program(config, tiny.mesh(config))
  state, batch = tiny.state(program), tiny.batch(config)
  losses = []
  for _ in range(3):
    state, metrics = program.train_step(state, batch)
    losses.append(float(metrics['train/loss']))
    assert metrics['healthy']
  return losses


@pytest.mark.parametrize('name', pquant.ABLATIONS)
def test_an_ablation_trains(name):
  config = shrunken(name)
  config_lib.check(config, devices=1)
  losses = trained(config_lib.to_json(config))
  assert np.isfinite(losses).all()
  assert losses[-1] < losses[0]


@pytest.mark.parametrize('name', pquant.ABLATIONS)
def test_an_ablation_fits_the_size_of_the_paper(name):
  config = pquant.get_config(f'700m,{name}')
  assert config.name == f'pquant-700m-{name}'
  config_lib.check(config, devices=1)


def test_ablations_differ_from_pquant_and_from_each_other():
  plain = pquant.get_config('700m').unlock()
  plain.name = ''
  texts = {}
  for name in pquant.ABLATIONS:
    config = pquant.get_config(f'700m,{name}').unlock()
    config.name = ''
    texts[name] = config_lib.to_json(config)
  same = {n for n, text in texts.items() if text == config_lib.to_json(plain)}
  # Points of a series that pQuant itself is a point of.
  assert same == {'scaling_2_02', 'r256', 'n1'}
  others = [text for n, text in texts.items() if n not in same]
  assert len(set(others)) == len(others)


def test_what_figure_7_compares_has_no_narrow_branch():
  for name in ('channel', 'group', 'native_mix'):
    model = transformer.build(shrunken(name), 'cpu', 1)
    params = transformer.abstract_params(model)
    assert 'narrow' not in params['block_0']['ffn']
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(32, 48)))
    q = model.rules.find('block_0/ffn/up').quantize({'kernel': kernel})
    expected = {'channel': (1, 48), 'group': (2, 48), 'native_mix': (1, 1)}
    assert q.scale.shape == expected[name]
    if name == 'native_mix':
      exact = np.mean(np.asarray(q.exact, np.float32) != 0)
      assert exact == pytest.approx(0.08, abs=0.005)


def test_an_ablation_that_there_is_not_is_refused():
  with pytest.raises(ValueError, match="'r65'.*r64, r128"):
    pquant.get_config('700m,r65')
  with pytest.raises(ValueError, match="size 'huge'"):
    pquant.get_config('huge,r64')
