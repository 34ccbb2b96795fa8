"""What a step's memory is compared with, compiled for this machine's CPU."""

import pytest

from qat import footprint
from qat import step as step_lib
from tests import tiny

# Deep and long enough for parameters and activations to count.
FIELDS = {
  'model.n_layers': 8,
  'model.d_model': 128,
  'model.d_ff': 384,
  'model.scan_layers': True,
  'model.remat': 'block',
  'data.seq_len': 64,
  'optim.estimator': 'spsa',
  'optim.optimizer': 'sgd',
  'optim.clip_norm': 0.0,
}
LAYER = 4 * (4 * 128**2 + 3 * 128 * 384)  # Bytes of its matrices in float32.
MATRIX = 4 * 128 * 384  # The largest of them.
STATES = 4 * 8 * 64 * 128  # Bytes of what a layer reads.


def size(compiled):
  """Bytes; the state that a step returns lies where the one given did."""
  m = compiled.memory_analysis()
  both = m.argument_size_in_bytes + m.output_size_in_bytes
  return both + m.temp_size_in_bytes - m.alias_size_in_bytes


def compiled(micro_batches):
  config = tiny.config('integer', FIELDS | {'optim.accumulate': micro_batches})
  program = step_lib.compile_program(config, tiny.mesh(config))
  return program.train_step, footprint.beside(program, config)


def test_a_step_in_place_needs_a_matrix_more_than_a_forward_pass():
  step, found = compiled(1)
  forward, backprop = size(found['forward']), size(found['backprop'])
  assert forward > 8 * LAYER
  # The matrix that is multiplied by, moved along a direction, and what the
  # first layer reads of the other side.
  assert 0.9 * MATRIX < size(step) - forward < 1.1 * (MATRIX + STATES)
  # Parameters, gradient and two moments, and what it keeps of each layer.
  assert backprop > 4 * 8 * LAYER
  assert size(step) < 0.26 * backprop


@pytest.mark.slow
def test_the_forward_pass_is_that_of_a_micro_batch():
  step, found = compiled(4)
  tokens = found['forward'].args_info[0][1]['tokens']
  assert tokens.shape == (2, 64)  # Of the 8 sequences of a step.
  # The sum over micro-batches takes no room for the whole batch.
  assert 0 < size(step) - size(found['forward']) < 2.2 * LAYER
  assert size(step) < 0.26 * size(found['backprop'])
