"""Feed-forward layers against the paper's equations in float64."""

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from qat.nn import ffn
from tests import ffn_layers


@pytest.mark.parametrize(
  ('n_experts', 'gate_probability', 'norm_shared'),
  [
    (1, True, True),
    (1, True, False),
    (4, True, True),
    (4, False, True),
    (4, True, False),
  ],
)
def test_the_decoupled_layer_is_the_paper_in_float64(
  n_experts, gate_probability, norm_shared
):
  module, params, x_BTD = ffn_layers.layer(
    n_experts=n_experts,
    gate_probability=gate_probability,
    norm_shared=norm_shared,
  )
  # Where each linear has a norm of its own, the router reads the layer's.
  assert ('norm' in params) == (norm_shared or n_experts > 1)
  expected = ffn_layers.slow_decoupled(
    x_BTD, params, gate_probability, norm_shared
  )
  np.testing.assert_allclose(
    ffn_layers.run(module, params, x_BTD), expected, rtol=1e-4, atol=1e-5
  )


def test_the_gated_layer_is_bitnet_in_float64():
  module, params, x_BTD = ffn_layers.layer('bitnet')
  double = jax.tree.map(np.float64, params)
  expected = ffn_layers.slow_branch(
    ffn_layers.slow_norm(np.float64(x_BTD), double),
    double,
    ffn_layers.slow_binary,
  )
  np.testing.assert_allclose(
    ffn_layers.run(module, params, x_BTD), expected, rtol=1e-4, atol=1e-5
  )


@pytest.mark.parametrize('activation', ffn.ACTIVATIONS)
@pytest.mark.parametrize('norm', ['pre', 'inside'])
def test_the_gated_layer_is_its_parts(activation, norm):
  module, params, x_BTD = ffn_layers.layer(
    'fp', activation=activation, norm=norm
  )
  p = jax.tree.map(np.float64, params)
  x = ffn_layers.slow_norm(np.float64(x_BTD), p)
  gate = x @ p['gate']['kernel']
  act = {
    'silu': lambda a: a / (1 + np.exp(-a)),
    'relu': lambda a: np.maximum(a, 0),
    'relu2': lambda a: np.maximum(a, 0) ** 2,
    'gelu': lambda a: (
      0.5 * a * (1 + np.tanh((2 / np.pi) ** 0.5 * (a + 0.044715 * a**3)))
    ),
  }[activation]
  hidden = act(gate) * (x @ p['up']['kernel'])
  if norm == 'inside':
    hidden = ffn_layers.slow_norm(hidden, p['down'])
  np.testing.assert_allclose(
    ffn_layers.run(module, params, x_BTD),
    hidden @ p['down']['kernel'],
    rtol=1e-4,
    atol=1e-5,
  )


@pytest.mark.parametrize('n_experts', [1, 2])
def test_without_feature_scaling_both_scalars_are_1(n_experts):
  module, params, x_BTD = ffn_layers.layer(
    n_experts=n_experts, feature_scaling=False
  )
  assert not params.keys() & {'alpha', 'beta'}
  scaled, _, _ = ffn_layers.layer(n_experts=n_experts)
  ones = {**params, 'alpha': jnp.ones(()), 'beta': jnp.ones(())}
  np.testing.assert_array_equal(
    ffn_layers.run(module, params, x_BTD), ffn_layers.run(scaled, ones, x_BTD)
  )


def test_scalars_of_the_branches_start_as_the_paper_says():
  module, _, x_BTD = ffn_layers.layer()
  params = jax.jit(module.init)(jax.random.key(0), x_BTD)['params']
  assert params['alpha'] == 2 and params['beta'] == np.float32(0.2)
  assert params['wide']['up']['kernel'].shape == (32, 40)
  assert params['narrow']['up']['kernel'].shape == (32, 8)


def test_gradients_of_scalars_and_router_are_summed_in_float32():
  # In bfloat16 a sum over thousands of values stops growing.
  gradient = {}
  for dtype in ('float32', 'bfloat16'):
    module, params, _ = ffn_layers.layer(
      n_experts=2, dtype=dtype, dot_dtype=dtype
    )
    x_BTD = jnp.asarray(ffn_layers.normal(8, 256, 32), dtype)
    # Of one sign, as a gradient of alpha has it when alpha is too large.
    dy = jnp.sign(ffn_layers.run(module, params, x_BTD).astype(jnp.float32))
    gradient[dtype] = ffn_layers.gradients(module, params, x_BTD, dy)
  for name in ('alpha', 'beta', 'router'):
    exact, found = (np.ravel(g[name]) for g in gradient.values())
    error = np.linalg.norm(found - exact) / np.linalg.norm(exact)
    assert error < 0.05, name
