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


@pytest.fixture(scope='module')
def measured():
  config, ptq = configs(tacq)
  with ptq.unlocked():
    ptq.calibration.sequences = 32  # Twice a block, as with 128 x 2048 tokens.
  with tiny.compiled_quickly():
    return programs.measure(config, ptq, jax.devices()[0])


def test_every_shape_is_compiled_once_and_nothing_is_run(measured):
  names = [row['name'] for row in measured['programs']]
  assert names == [
    'embedding',
    'statistics of attn/q',
    'statistics of attn/o',
    'statistics of ffn/gate',
    'statistics of ffn/down',
    'factor of 32 inputs',
    'factor of 48 inputs',
    *(
      f'{what} of {matrix}'
      for matrix in (
        'attn/q, 32 x 32',
        'ffn/gate, 32 x 48',
        'ffn/down, 48 x 32',
      )
      for what in ('codes', 'errors', 'scores')
    ),
    'a block',
    'a block in float32',
    'gradient of the loss',
    'gradients of a block',
  ]
  by_name = {row['name']: row for row in measured['programs']}
  # The states of the other sequences are on the host; the block stays while
  # its Hessian is factored.
  assert by_name['a block']['beside_bytes'] == 0
  factor = by_name['factor of 48 inputs']
  assert factor['beside_bytes'] == measured['block_bytes']
  assert all(row['peak_bytes'] > 0 for row in measured['programs'])


def test_no_program_needs_more_than_a_block_and_all_hidden_states(measured):
  limit = measured['block_bytes'] + measured['states_bytes']
  rows = measured['programs']
  most = max(row['peak_bytes'] + row['beside_bytes'] for row in rows)
  assert measured['limit_bytes'] == limit
  assert measured['most_bytes'] == most <= limit


def test_layers_that_are_observed_together_are_one_program():
  config, ptq = configs(gptq)
  with ptq.unlocked():
    ptq.true_sequential = False
  names = [program.name for program in programs.programs(config, ptq, 'cpu')]
  assert names[1] == 'statistics of attn/q, attn/o, ffn/gate, ffn/down'
  assert names[2] == 'factor of 32 inputs'


def test_only_the_walks_it_knows_are_compiled():
  config, ptq = configs(rtn)
  with pytest.raises(ValueError, match="config.algorithm='rtn'"):
    next(programs.programs(config, ptq, 'cpu'))
