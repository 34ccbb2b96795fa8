"""What the memory of a step is compared with; compiled, not run."""

import jax
from jax import stages

from qat import step as step_lib


def beside(program: step_lib.Program) -> dict[str, stages.Compiled]:
  """What a step is compared with, compiled for the same batch and devices.

  Returns:
    'forward', the loss alone: (params, batch) -> nats; 'backprop', a step of
    backpropagation and AdamW.
  """
  config, mesh = program.config, program.mesh

  def forward(params, batch):
    return step_lib.loss_sum(program.model, config, mesh, params, batch)[0]

  with jax.set_mesh(mesh):
    batch = step_lib.abstract_batch(config, mesh)
    loss = jax.jit(forward).lower(program.abstract.params, batch).compile()
  other = config.copy_and_resolve_references().unlock()
  other.optim.update(estimator='backprop', optimizer='adamw')
  other.zo.update(master='float32', resolution=0.0)
  step = step_lib.compile_program(other.lock(), mesh).train_step
  return {'forward': loss, 'backprop': step}
