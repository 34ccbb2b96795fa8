"""Tests of qat.nn.reference: the fast models compute what the textbook does."""

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from configs import bitnet
from configs import bitnet_b158
from configs import fp
from configs import pquant
from qat import objective as objective_lib
from qat import sharding
from qat.nn import reference
from qat.nn import transformer
from tests import tiny


def _config(module, **changes):
  config = module.get_config('tiny').unlock()
  config.model.update(
    d_model=32,
    n_heads=4,
    n_kv_heads=2,
    n_layers=2,
    d_ff=48,
    branch_width=8,
    vocab_size=61,
    loss_chunk=8,
    dot_dtype='float32',
    quantized_dot='float',
    attention='blocked',
  )
  config.model.update(changes)
  return config.lock()


@pytest.mark.parametrize(
  ('module', 'changes'),
  [
    pytest.param(fp, {}, marks=pytest.mark.slow),
    pytest.param(bitnet, {}, marks=pytest.mark.slow),
    pytest.param(bitnet, {'norm_shared': False}, marks=pytest.mark.slow),
    (bitnet_b158, {'tied_embeddings': False}),
    (pquant, {}),
    pytest.param(pquant, {'norm_shared': False}, marks=pytest.mark.slow),
  ],
)
def test_value_and_gradient_equal_the_textbook_form(module, changes):
  config = _config(module, **changes)
  model = transformer.build(config, 'cpu', 1)
  tokens = jax.random.randint(jax.random.key(1), (2, 17), 0, 61)
  batch = {'tokens': tokens[:, :-1], 'targets': tokens[:, 1:]}
  # A draw in which no input lies so close to half a step that the two forms
  # round it to neighbouring codes.
  params = tiny.params(model)
  mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])

  def fast(params):
    total, _ = objective_lib.loss_sum(model, config, mesh, params, batch)
    return total / batch['targets'].size

  def textbook(params):
    return reference.loss(params, batch, config.model, model.rules)

  value, gradient = jax.jit(jax.value_and_grad(fast))(params)
  expected, expected_gradient = jax.jit(jax.value_and_grad(textbook))(params)
  np.testing.assert_allclose(value, expected, rtol=1e-6)
  assert all(jnp.any(g != 0) for g in jax.tree.leaves(expected_gradient))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      a, b, rtol=2e-4, atol=2e-5 * float(jnp.max(jnp.abs(b)))
    ),
    gradient,
    expected_gradient,
  )


def test_experts_are_refused():
  config = _config(pquant, n_experts=2)
  model = transformer.build(config, 'cpu', 1)
  with pytest.raises(ValueError, match='n_experts=1'):
    reference.loss({}, {}, config.model, model.rules)
