"""The programs of a walk as a compiler sees them."""

import jax
import pytest

from configs.ptq import gptq
from configs.ptq import rtn
from configs.ptq import tacq
from qat.ptq import programs
from tests import tiny


def configs(module):
  ptq = module.get_config()
  with ptq.unlocked():
    ptq.calibration.sequences, ptq.calibration.length = 8, 16
    ptq.calibration.batch_size = ptq.calibration.gradient_batch = 2
  return tiny.config('fp', {'model.attention': 'xla', 'model.n_layers': 3}), ptq


def test_sizes_are_those_of_a_block_and_of_all_hidden_states():
  config, ptq = configs(gptq)
  found = programs.sizes(config, ptq)
  norms, attention, ffn = 2 * 32, 4 * 32 * 32, 3 * 32 * 48
  assert found.block == 4 * (norms + attention + ffn)
  assert found.states == 4 * 8 * 16 * 32


def test_every_shape_is_compiled_once_and_nothing_is_run():
  config, ptq = configs(tacq)
  with tiny.compiled_quickly():
    found = programs.measure(config, ptq, jax.devices()[0])
  names = [row['name'] for row in found['programs']]
  assert names == [
    'statistics of attn/q',
    'statistics of attn/o',
    'statistics of ffn/gate',
    'statistics of ffn/down',
    'factor of 32 inputs',
    'factor of 48 inputs',
    'codes of attn/q, 32 x 32',
    'codes of ffn/gate, 32 x 48',
    'codes of ffn/down, 48 x 32',
    'a block',
    'gradient of the loss',
    'gradients of a block',
  ]
  by_name = {row['name']: row for row in found['programs']}
  # The states of all sequences but the batch's own are beside a block.
  assert by_name['a block']['beside_bytes'] == 4 * (8 - 2) * 16 * 32
  assert all(row['peak_bytes'] > 0 for row in found['programs'])


def test_only_the_walks_it_knows_are_compiled():
  config, ptq = configs(rtn)
  with pytest.raises(ValueError, match="config.algorithm='rtn'"):
    next(programs.programs(config, ptq, 'cpu'))
