"""What the memory of a step is compared with; compiled, not run."""

import jax
from jax import stages
from ml_collections import ConfigDict

from qat import objective as objective_lib
from qat import step as step_lib


def beside(
  program: step_lib.Program, config: ConfigDict
) -> dict[str, stages.Compiled]:
  """What a step is compared with, compiled for the same devices.

  Args:
    program: the step's.
    config: the run's, where all matrices are floats; that of `program`, unless
      some of its are quantized for good.

  Returns:
    'forward', the loss alone of as many sequences as the step computes at once,
    which is a micro-batch: (params, batch) -> nats; 'backprop', a step of
    backpropagation and AdamW on the same batch.
  """
  mesh = program.mesh
  once = _unlocked(program.config)
  once.data.batch_size //= once.optim.accumulate

  def forward(params, batch):
    return objective_lib.loss_sum(program.model, once, mesh, params, batch)[0]

  with jax.set_mesh(mesh):
    batch = step_lib.abstract_batch(once, mesh)
    loss = jax.jit(forward).lower(program.abstract.params, batch).compile()
  other = _unlocked(config)
  other.optim.update(estimator='backprop', optimizer='adamw')
  other.zo.update(master='float32', resolution=0.0)
  step = step_lib.compile_program(other.lock(), mesh).train_step
  return {'forward': loss, 'backprop': step}


def _unlocked(config: ConfigDict) -> ConfigDict:
  return config.copy_and_resolve_references().unlock()
