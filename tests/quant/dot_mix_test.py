"""Products while quantization is annealed: values, and gradients."""

import functools

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from qat.quant import dot
from qat.quant import operand as operand_lib
from qat.quant import rules
from tests import products


@pytest.mark.parametrize('mix', [0.0, 0.25, 1.0])
@products.for_specs
def test_annealing_mixes_values_and_leaves_the_gradient(spec, mix):
  x_MK, w_KN, dy_MN = (
    products.normal(7, 12),
    products.normal(12, 5, seed=1),
    products.normal(7, 5, seed=2),
  )
  share = jnp.float32(mix)

  def apply(x_MK, w_KN):
    x = operand_lib.make_input(x_MK, spec, share)
    weight = operand_lib.make_weight({'kernel': w_KN}, spec, share)
    return dot.quantized_dot(x, weight, products.FLOAT32)

  def mixed(a, q):
    value = np.float64(a if q is None else q.dequantize())
    return (1 - mix) * np.float64(a) + mix * value

  y, vjp = jax.vjp(apply, jnp.asarray(x_MK), jnp.asarray(w_KN))
  x = mixed(x_MK, spec.quantize_input(jnp.asarray(x_MK)))
  w = mixed(w_KN, products.quantize(spec, w_KN))
  expected = x @ w, dy_MN @ w.T, x.T @ dy_MN
  for actual, value in zip((y, *vjp(dy_MN)), expected, strict=True):
    products.close(actual, value)
  if not mix:  # Exactly what is computed without quantization.
    full = rules.Spec('none', 'none', 'tensor')
    plain = products.apply(x_MK, jnp.asarray(w_KN), full, products.FLOAT32)
    np.testing.assert_array_equal(y, plain)


def test_annealing_scales_the_gradient_of_a_learned_scale():
  spec = rules.Spec('lsq3', 'none', 'channel')
  w_KN = jnp.asarray(products.normal(12, 5))
  layer = {'kernel': w_KN, **spec.start(w_KN)}

  def gradient(mix):
    def loss(layer):
      return jnp.sum(jnp.sin(operand_lib.make_weight(layer, spec, mix).value))

    return jax.grad(loss)(layer)

  def expected(mix):
    value = spec.quantize(layer).dequantize()
    dw_KN = jnp.cos((1 - mix) * w_KN + mix * value)
    through = jax.vjp(
      lambda layer: spec.fake_quantize(layer, spec.quantize(layer)), layer
    )[1](dw_KN)[0]
    return {
      'kernel': (1 - mix) * dw_KN + mix * through['kernel'],
      'learned_scale': mix * through['learned_scale'],
    }

  for mix in (0.0, 0.25, 1.0):
    found = gradient(jnp.float32(mix))
    jax.tree.map(
      functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6),
      found,
      expected(mix),
    )
  assert not np.any(gradient(jnp.float32(0))['learned_scale'])
