"""Cores by name: what each of them is given."""

import jax
import numpy as np
import pytest

from qat.ptq import cores
from qat.ptq import gptq
from qat.ptq import omniquant
from qat.ptq import rtn
from qat.ptq import splitquant
from qat.ptq import statistics as statistics_lib
from tests import clean


def core(name, **fields):
  method = clean.ptq(name, **fields).method.to_dict()
  options = cores.QUANTIZERS[name].Options(**method)
  return cores.make(name, options), options


def example():
  rng = np.random.default_rng(0)
  return rng.normal(size=(32, 8)).astype('f4'), rng.normal(size=(64, 32))


def test_each_is_given_what_it_needs():
  w_KN, x_MK = example()
  statistics = statistics_lib.of(np.float32(x_MK))
  made, options = core('rtn')
  found = made.quantize(w_KN, made.prepare(None), None)
  jax.tree.map(
    np.testing.assert_array_equal, found, rtn.quantize(w_KN, options)
  )
  made, options = core('gptq')
  found = made.quantize(w_KN, made.prepare(statistics), None)
  expected = gptq.quantize(w_KN, statistics, options)
  jax.tree.map(np.testing.assert_array_equal, found, expected)
  made, options = core('omniquant')
  clip = omniquant.clip(omniquant.start('a', w_KN.shape, options), 'a')
  found = made.quantize(w_KN, clip, None)
  expected = omniquant.quantize(w_KN, clip, options)
  jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_splitquant_alone_changes_biases():
  b_N = np.random.default_rng(1).normal(size=16).astype('f4')
  made, options = core('splitquant')
  expected = splitquant.quantize_bias(b_N, options)
  np.testing.assert_array_equal(made.bias(b_N), expected)
  assert np.any(expected != b_N)
  np.testing.assert_array_equal(core('rtn')[0].bias(b_N), b_N)


@pytest.mark.parametrize('name', ['rtn', 'gptq', 'omniquant'])
def test_a_layer_that_does_not_fit_is_named(name):
  fields = {'method__group_size': 12}
  if name == 'rtn':
    fields['method__granularity'] = 'group'
  made, _ = core(name, **fields)
  with pytest.raises(ValueError, match='block_0/attn/q, 32 x 8: .*12'):
    cores.check_shape(made, 'block_0/attn/q', (32, 8))
