"""The quantized dot against float64, and what it keeps for the backward pass.

References take the quantizers' codes as given (they have tests of their own)
and do everything after them in float64, with the roundings a method names.
"""

import functools

import jax
from jax import lax
from jax import numpy as jnp
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from pallas_kernels.quantized_train_matmul import cpu as scaled_matmul
from qat.quant import activations
from qat.quant import blocks
from qat.quant import choice
from qat.quant import dot
from qat.quant import operand as operand_lib
from qat.quant import rules
from qat.quant import weights
from tests import products


def test_the_specs_have_every_quantizer_and_every_granularity():
  for field, all_of_them in (
    ('weight', {'none', *weights.QUANTIZERS}),
    ('activation', {'none', *activations.QUANTIZERS}),
    ('granularity', {*blocks.AXES}),
    ('activation_granularity', {*activations.GRANULARITIES}),
  ):
    assert {getattr(spec, field) for spec in products.SPECS} == all_of_them


@products.for_specs
@products.for_methods
def test_value_and_gradients_are_the_formulas_in_float64(spec, method):
  x_MK, w_KN, dy_MN = (
    products.normal(7, 12),
    products.normal(12, 5, seed=1),
    products.normal(7, 5, seed=2),
  )
  found = products.value_and_gradients(x_MK, w_KN, dy_MN, spec, method)
  for actual, expected in zip(
    found, products.slow(x_MK, w_KN, dy_MN, spec, method.dtype), strict=True
  ):
    assert actual.dtype == jnp.float32
    products.close(actual, expected)


def test_the_value_is_bitnet_written_out():
  x_MK, w_KN = products.normal(6, 16), products.normal(16, 8, seed=1)
  x, w = np.float64(x_MK), np.float64(w_KN)
  gamma_M1 = 127 / np.abs(x).max(-1, keepdims=True)
  sign_KN = np.where(w - w.mean() > 0, 1, -1)
  y_MN = (np.round(x * gamma_M1) @ sign_KN) * np.abs(w).mean() / gamma_M1
  for method in products.METHODS:
    products.close(products.apply(x_MK, w_KN, products.BINARY, method), y_MN)


@products.for_specs
def test_gradients_are_autodiff_of_the_textbook_form(spec):
  x_MK, w_KN, dy_MN = (
    products.normal(7, 12),
    products.normal(12, 5, seed=1),
    products.normal(7, 5, seed=2),
  )

  def through(a, q):
    return a if q is None else a + lax.stop_gradient(q.dequantize() - a)

  def textbook(x_MK, w_KN):
    return through(x_MK, spec.quantize_input(x_MK)) @ through(
      w_KN, products.quantize(spec, w_KN)
    )

  y, vjp = jax.vjp(textbook, jnp.asarray(x_MK), jnp.asarray(w_KN))
  found = products.value_and_gradients(
    x_MK, w_KN, dy_MN, spec, products.FLOAT32
  )
  for actual, expected in zip(found, (y, *vjp(dy_MN)), strict=True):
    products.close(actual, expected, 1e-5)


@pytest.mark.parametrize('weight', ['binary', 'ternary'])
def test_every_method_gives_the_same_exact_integers(weight):
  # The largest sums there are: all codes of a row are 127.
  spec = rules.Spec(weight, 'int8', 'channel')
  x_MK = np.concatenate([np.ones((1, 4096)), products.normal(3, 4096)]).astype(
    'f4'
  )
  w_KN = products.normal(4096, 6, seed=1)
  x, w = spec.quantize_input(jnp.asarray(x_MK)), products.quantize(spec, w_KN)
  exact_MN = np.int64(x.codes) @ np.int64(w.codes)
  expected = jnp.float32(exact_MN) * w.scale * x.scale
  for method in products.METHODS:
    found = products.apply(x_MK, w_KN, spec, method)
    np.testing.assert_allclose(found, expected, rtol=3e-7)


@products.for_specs
def test_a_stack_is_its_matrices_one_by_one(spec):
  x_MK, dy = products.normal(6, 8), products.normal(6, 3, 5, seed=2)
  w_EKN = products.normal(3, 8, 5, seed=1) * np.float32([1, 9, 0.1]).reshape(
    3, 1, 1
  )
  y, dx, dw = map(
    np.asarray,
    products.value_and_gradients(x_MK, w_EKN, dy, spec, products.FLOAT32),
  )
  assert y.shape == (6, 3, 5)
  total_dx = 0
  for i, w_KN in enumerate(w_EKN):
    expected = products.slow(x_MK, w_KN, dy[:, i], spec, 'float32')
    products.close(y[:, i], expected[0])
    products.close(dw[i], expected[2])
    total_dx += expected[1]
  products.close(dx, total_dx)


@pytest.mark.parametrize(
  ('shape', 'stack'),
  [((8,), ()), ((2, 3, 8), ()), ((2, 3, 8), (4,)), ((0, 8), (4,))],
)
def test_leading_axes_of_the_input_are_those_of_the_output(shape, stack):
  x, w = products.normal(*shape), products.normal(*stack, 8, 5, seed=1)
  dy = products.normal(*shape[:-1], *stack, 5, seed=2)
  y, dx, dw = products.value_and_gradients(
    x, w, dy, products.BINARY, products.FLOAT32
  )
  assert y.shape == dy.shape and dx.shape == x.shape and dw.shape == w.shape
  flat = x.reshape(-1, 8)
  if len(flat):
    alone = products.apply(flat[-1], w, products.BINARY, products.FLOAT32)
    np.testing.assert_allclose(y.reshape(-1, *alone.shape)[-1], alone, 1e-6)


@pytest.mark.parametrize('width', [1, 7, 8])
def test_a_transpose_in_a_loop_needs_no_even_width(width):
  x_MK, dy_MN = products.normal(6, width), products.normal(6, 5, seed=2)
  w_KN = products.normal(width, 5, seed=1)
  plain, loop = (
    products.value_and_gradients(
      x_MK, w_KN, dy_MN, products.BINARY, dot.Method(False, 'float32', flag)
    )
    for flag in (False, True)
  )
  jax.tree.map(functools.partial(products.close, tolerance=1e-6), loop, plain)


@products.for_specs
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_gradients_have_the_dtypes_of_what_they_belong_to(spec, dtype):
  x, w = (
    jnp.asarray(products.normal(4, 8)).astype(dtype),
    jnp.asarray(products.normal(8, 5)),
  )
  y, dx, dw = jax.eval_shape(
    lambda *a: products.value_and_gradients(*a, spec, dot.Method(False, dtype)),
    x,
    w,
    products.normal(4, 5),
  )
  assert y.dtype == jnp.float32  # Whoever asked for less rounds it once.
  assert dx.dtype == dtype and dw.dtype == jnp.float32


def kept(spec, method, m=64, k=32, n=16):
  """What stays between the forward and the backward pass: (shape, dtype)s."""
  x_MK, w_KN = (
    jnp.asarray(products.normal(m, k)),
    jnp.asarray(products.normal(k, n)),
  )
  vjp = jax.eval_shape(
    lambda x, w: jax.vjp(lambda x, w: products.apply(x, w, spec, method), x, w)[
      1
    ],
    x_MK,
    w_KN,
  )
  return [(leaf.shape, leaf.dtype.name) for leaf in jax.tree.leaves(vjp)]


@products.for_specs
@products.for_methods
def test_only_codes_and_scales_are_kept_where_they_are_all(spec, method):
  codes = 'float8_e4m3fn' if spec.weight == 'fp8' else 'int8'
  left = 'int8' if products.plain(spec, 'x') else method.dtype
  right = codes if products.plain(spec, 'w') else method.dtype
  residuals = kept(spec, method)
  large = [leaf for leaf in residuals if np.prod(leaf[0]) > 64]
  assert sorted(large) == sorted([((64, 32), left), ((32, 16), right)])
  small = [shape for shape, _ in residuals if 0 < np.prod(shape) <= 64]
  assert set(small) <= {(64, 1), (1, 16), (1, 1)}


def test_the_textbook_form_keeps_floats():
  # The measure itself: it has to see what the dot is there to avoid.
  def textbook(x, w):
    q = products.quantize(products.BINARY, w)
    return x @ (w + lax.stop_gradient(q.dequantize() - w))

  vjp = jax.eval_shape(
    lambda *a: jax.vjp(textbook, *a)[1],
    products.normal(64, 32),
    products.normal(32, 16),
  )
  leaves = [(leaf.shape, leaf.dtype.name) for leaf in jax.tree.leaves(vjp)]
  assert ((64, 32), 'float32') in leaves and ((32, 16), 'float32') in leaves


def test_it_works_under_remat_and_vmap():
  x_BMK, w_KN = products.normal(3, 4, 8), products.normal(8, 5, seed=1)

  def loss(x, w):
    return jnp.sum(
      jnp.sin(products.apply(x, w, products.BINARY, products.FLOAT32))
    )

  plain = jax.grad(loss, (0, 1))(x_BMK, w_KN)
  remat = jax.grad(jax.checkpoint(loss), (0, 1))(x_BMK, w_KN)
  jax.tree.map(functools.partial(products.close, tolerance=1e-6), remat, plain)
  dx_BMK, dw_BKN = jax.vmap(jax.grad(loss, (0, 1)), (0, None))(x_BMK, w_KN)
  products.close(dx_BMK, plain[0], 1e-6)
  products.close(dw_BKN.sum(0), plain[1], 1e-6)


def test_readers_of_one_input_add_their_gradients():
  x_MK, a_KN, b_KN = (
    products.normal(6, 8),
    products.normal(8, 4, seed=1),
    products.normal(8, 3, seed=2),
  )

  def loss(shared, x):
    inputs = [operand_lib.make_input(x, products.BINARY)] * 2
    if not shared:
      inputs[1] = operand_lib.make_input(x, products.BINARY)
    return sum(
      jnp.sum(
        jnp.sin(
          dot.quantized_dot(
            source, products.make_weight(w, products.BINARY), products.FLOAT32
          )
        )
      )
      for source, w in zip(inputs, (a_KN, b_KN), strict=True)
    )

  gradients = [
    jax.grad(functools.partial(loss, shared))(x_MK) for shared in (True, False)
  ]
  products.close(*gradients, 1e-6)


def test_quantization_has_no_other_gradient():
  # The scale depends on the input; straight through, that counts as constant.
  x_MK = products.normal(6, 8)
  zero = jax.grad(
    lambda x: jnp.sum(
      operand_lib.make_input(x, products.BINARY).quantized.dequantize()
    )
  )(x_MK)
  np.testing.assert_array_equal(zero, 0)


@pytest.mark.parametrize('weight', ['binary', 'int8'])
def test_devices_exchange_codes_instead_of_floats(weight):
  spec = rules.Spec(weight, 'int8', 'tensor')
  mesh = Mesh(np.array(jax.devices()), ('fsdp',))
  x_MK, w_KN, dy_MN = (
    products.normal(16, 64),
    products.normal(64, 24, seed=1),
    products.normal(16, 24),
  )
  split = NamedSharding(mesh, P('fsdp', None))
  arguments = [jax.device_put(a, split) for a in (x_MK, w_KN, dy_MN)]
  plain = products.value_and_gradients(
    x_MK, w_KN, dy_MN, spec, products.FLOAT32
  )
  method = dot.Method(False, 'float32', gather_codes=True)
  with jax.set_mesh(mesh):
    compiled = (
      jax.jit(products.value_and_gradients, static_argnums=(3, 4))
      .lower(*arguments, spec, method)
      .compile()
    )
    found = compiled(*arguments)
  jax.tree.map(functools.partial(products.close, tolerance=1e-6), found, plain)
  gathers = [x for x in compiled.as_text().splitlines() if ' all-gather' in x]
  assert any('s8[64,24]' in line for line in gathers)
  assert not any('f32[64,24]' in line for line in gathers)


@pytest.mark.skipif(
  not scaled_matmul.runs_here(), reason='no C++ extension, or no AVX512-VNNI'
)
@pytest.mark.parametrize('weight', ['binary', 'ternary', 'int8'])
def test_the_extension_changes_no_bit(weight):
  spec = rules.Spec(weight, 'int8', 'tensor')
  x_MK, w_KN, dy_MN = (
    products.normal(9, 70),
    products.normal(70, 37, seed=1),
    products.normal(9, 37, seed=2),
  )
  ours, xlas = (
    products.value_and_gradients(x_MK, w_KN, dy_MN, spec, method)
    for method in (
      dot.Method(False, 'bfloat16', True, native=True),
      dot.Method(False, 'bfloat16', True),
    )
  )
  jax.tree.map(np.testing.assert_array_equal, ours, xlas)


def test_the_order_of_weight_codes_in_memory_changes_no_value():
  rng = np.random.default_rng(0)
  spec = rules.Spec('binary', 'int8', 'tensor')
  x_MK = jnp.float32(rng.normal(size=(6, 16)))
  w_KN = jnp.float32(rng.normal(size=(16, 8)))

  def product(row_major, w_KN):
    method = dot.Method(True, 'float32', row_major=row_major)
    weight = operand_lib.make_weight({'kernel': w_KN}, spec)
    return dot.quantized_dot(operand_lib.make_input(x_MK, spec), weight, method)

  np.testing.assert_array_equal(
    *(jax.jit(functools.partial(product, on))(w_KN) for on in (False, True))
  )
  for on in (False, True):
    text = jax.jit(functools.partial(product, on)).lower(w_KN).as_text()
    assert ('LayoutConstraint' in text) == on
  chosen = {
    platform: choice.choose_method('auto', 'bfloat16', platform).row_major
    for platform in ('cpu', 'gpu', 'tpu')
  }
  assert chosen == {'cpu': False, 'gpu': True, 'tpu': True}
