"""Tiles of rows, each with its own matrix, against one product a tile."""

import dataclasses

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from qat.quant import dot
from qat.quant import grouped_dot
from qat.quant import operand as operand_lib
from qat.quant import rules
from tests import products

SPECS = [
  rules.Spec(weight, activation, granularity, 'token')
  for weight, activation, granularity in (
    ('none', 'none', 'tensor'),
    ('binary', 'int8', 'tensor'),
    ('int8', 'int8', 'channel'),
    ('int4_asym', 'int4_asym', 'channel'),
    ('fp8', 'int8', 'tensor'),
  )
]
EXPERT_GC = np.array([[0, 2, 2], [1, 1, 3]], np.int32)
TILE, INPUTS, OUTPUTS = 5, 8, 12


X_GSK = jnp.asarray(products.normal(2, 3 * TILE, INPUTS))
W_EKN = jnp.asarray(products.normal(4, INPUTS, OUTPUTS, seed=1))
DY_GSN = jnp.asarray(products.normal(2, 3 * TILE, OUTPUTS, seed=2))


def multiply(x, w, spec, method):
  weight = products.make_weight(w, spec)
  expert_GC = jnp.asarray(EXPERT_GC)
  return grouped_dot.grouped_dot(
    operand_lib.make_input(x, spec), weight, expert_GC, method
  )


def one_by_one(x, w, spec, method):
  """Each matrix is quantized alone: a scale of a stack is one for each."""
  weights = [products.make_weight(w_KN, spec) for w_KN in w]
  y_CtN = [
    dot.quantized_dot(operand_lib.make_input(x_tK, spec), weights[e], method)
    for x_tK, e in zip(x.reshape(-1, TILE, INPUTS), EXPERT_GC.flat, strict=True)
  ]
  return jnp.stack(y_CtN).reshape(*x.shape[:2], -1)


@products.for_methods
@pytest.mark.parametrize('spec', SPECS, ids=products.name)
def test_a_tile_is_a_product_with_its_matrix(spec, method):
  # Not compiled as a whole: most specs and methods share their operations.
  found, expected = (
    jax.vjp(lambda x, w, form=form: form(x, w, spec, method), X_GSK, W_EKN)
    for form in (multiply, one_by_one)
  )
  tolerance = 0.06 if method.dtype == 'bfloat16' else 2e-5
  np.testing.assert_allclose(found[0], expected[0], atol=tolerance)
  pairs = zip(found[1](DY_GSN), expected[1](DY_GSN), strict=True)
  for a, b in pairs:
    np.testing.assert_allclose(a, b, atol=tolerance)


@products.for_methods
@pytest.mark.parametrize('spec', SPECS, ids=products.name)
def test_stacks_side_by_side_are_products_with_each(spec, method):
  def forward(form, x, w, other):
    weights = [products.make_weight(a, spec) for a in (w, other)]
    x, expert_GC = operand_lib.make_input(x, spec), jnp.asarray(EXPERT_GC)
    if form == 'together':
      return grouped_dot.grouped_dots(x, weights, expert_GC, method)
    return [grouped_dot.grouped_dot(x, w, expert_GC, method) for w in weights]

  other_EKN = 3 * jnp.asarray(products.normal(4, INPUTS, 2 * OUTPUTS, seed=3))
  dys = [DY_GSN, jnp.asarray(products.normal(2, 3 * TILE, 2 * OUTPUTS, seed=4))]
  found, expected = (
    jax.vjp(lambda *a, form=form: forward(form, *a), X_GSK, W_EKN, other_EKN)
    for form in ('together', 'alone')
  )
  for a, b in zip(found[0], expected[0], strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
  tolerance = 0.1 if method.dtype == 'bfloat16' else 2e-5
  pairs = zip(found[1](dys), expected[1](dys), strict=True)
  for a, b in pairs:
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def test_stacks_of_several_kinds_are_not_joined():
  specs = SPECS[1], SPECS[2]
  x = operand_lib.make_input(X_GSK, specs[0])
  weights = [products.make_weight(W_EKN, spec) for spec in specs]
  assert operand_lib.beside(weights) is None
  found = grouped_dot.grouped_dots(
    x, weights, jnp.asarray(EXPERT_GC), products.FLOAT32
  )
  for y, spec in zip(found, specs, strict=True):
    weight = products.make_weight(W_EKN, spec)
    alone = grouped_dot.grouped_dot(
      x, weight, jnp.asarray(EXPERT_GC), products.FLOAT32
    )
    np.testing.assert_array_equal(y, alone)


def test_the_backward_pass_keeps_codes_alone():
  spec = next(s for s in SPECS if s.weight == 'int8')
  method = products.FLOAT32

  @jax.jit
  def residuals(x, w):
    pair = (
      operand_lib.make_input(x, spec),
      operand_lib.make_weight({'kernel': w}, spec),
    )

    def forward(*values):
      x, w = (
        dataclasses.replace(operand, value=value)
        for operand, value in zip(pair, values, strict=True)
      )
      return grouped_dot.grouped_dot(x, w, jnp.asarray(EXPERT_GC), method)

    return jax.tree.leaves(jax.vjp(forward, x, w)[1])

  kept = residuals(X_GSK, W_EKN)
  assert any(a.dtype == jnp.int8 for a in kept)
  # A float for each row, and each column of a matrix; none of a whole array.
  floats = [a.size for a in kept if jnp.issubdtype(a.dtype, jnp.floating)]
  assert max(floats) <= max(X_GSK.shape[0] * X_GSK.shape[1], 4 * OUTPUTS)
