"""What a step's memory is compared with, compiled for this machine's CPU."""

from qat import footprint
from qat import step as step_lib
from tests import tiny


def size(compiled):
  """Bytes; the state that a step returns lies where the one given did."""
  m = compiled.memory_analysis()
  both = m.argument_size_in_bytes + m.output_size_in_bytes
  return both + m.temp_size_in_bytes - m.alias_size_in_bytes


def test_a_step_in_place_needs_about_what_a_forward_pass_does():
  # Deep and long enough for parameters and activations to count.
  fields = {
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
  config = tiny.config('integer', fields)
  program = step_lib.compile_program(config, tiny.mesh(config))
  found = footprint.beside(program)
  peak, forward, backprop = map(
    size, (program.train_step, found['forward'], found['backprop'])
  )
  kernels = 4 * 8 * (4 * 128**2 + 3 * 128 * 384)
  assert kernels < forward <= 1.05 * peak
  assert peak < 1.15 * forward
  assert peak < 0.4 * backprop
