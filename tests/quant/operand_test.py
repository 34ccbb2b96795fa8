"""Sides of a product: what they carry, and weights side by side."""

from jax import numpy as jnp
import numpy as np
import pytest

from qat.quant import operand
from qat.quant import rules
from tests import products

X_MK = jnp.asarray(products.normal(3, 8))
LAYERS = [
  {'kernel': jnp.asarray(products.normal(8, columns, seed=columns))}
  for columns in (4, 6)
]


def value_of(side):
  return side.value if side.quantized is None else side.quantized.dequantize()


@pytest.mark.parametrize('weight', ['none', 'binary', 'int8', 'fp8'])
@pytest.mark.parametrize('granularity', ['tensor', 'channel'])
def test_weights_side_by_side_are_each_what_they_were(weight, granularity):
  spec = rules.Spec(weight, 'none', granularity)
  sides = [operand.make_weight(layer, spec) for layer in LAYERS]
  wide = operand.beside(sides)
  expected = np.concatenate([value_of(side) for side in sides], -1)
  np.testing.assert_array_equal(value_of(wide), expected)
  values = np.concatenate([side.value for side in sides], -1)
  np.testing.assert_array_equal(wide.value, values)


@pytest.mark.parametrize(
  ('first', 'second'),
  [
    (('binary', 'int8', 'tensor'), ('int8', 'int8', 'tensor')),
    (('none', 'none', 'tensor'), ('int8', 'int8', 'tensor')),
    (('int4', 'none', 'group'), ('int4', 'none', 'group')),
    (('int4_asym', 'none', 'tensor'), ('int4_asym', 'none', 'tensor')),
    (('binary_mix', 'none', 'tensor'), ('binary_mix', 'none', 'tensor')),
  ],
)
def test_weights_with_more_than_codes_and_columns_scales_stay_apart(
  first, second
):
  sides = [
    operand.make_weight(layer, rules.Spec(*fields, group_size=4))
    for layer, fields in zip(LAYERS, (first, second), strict=True)
  ]
  assert operand.beside(sides) is None


def test_an_input_is_mixed_with_its_quantized_value():
  spec = rules.Spec('none', 'int8', 'tensor', 'token')
  whole = operand.make_input(X_MK, spec)
  np.testing.assert_array_equal(whole.value, X_MK)
  half = operand.make_input(X_MK, spec, jnp.float32(0.5))
  assert half.quantized is None
  mean = (np.asarray(X_MK) + np.asarray(value_of(whole))) / 2
  np.testing.assert_allclose(half.value, mean, rtol=1e-6)


def test_inputs_of_packed_weights_are_what_other_inputs_are():
  spec = rules.Spec('binary', 'int8', 'tensor', 'token')
  found = operand.make_packed_input(X_MK, spec, None).quantized
  expected = operand.make_input(X_MK, spec).quantized
  np.testing.assert_array_equal(found.codes, expected.codes)
  np.testing.assert_array_equal(found.scale, expected.scale)
