"""The quantized dot against float64, and what it keeps for the backward pass.

References take the quantizers' codes as given (they have tests of their own)
and do everything after them in float64, with the roundings a method names.
"""

import dataclasses
import functools
import itertools

import jax
from jax import lax
from jax import numpy as jnp
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from qat.quant import activations
from qat.quant import dot
from qat.quant import rules
from qat.quant import weights

FLOAT32 = dot.Method(int8=False, dtype='float32')
# Each pair of values of (int8, dtype, transpose_in_loop) once.
METHODS = [
  dot.Method(False, 'float32', False),
  dot.Method(False, 'bfloat16', True),
  dot.Method(True, 'float32', True),
  dot.Method(True, 'bfloat16', False),
]
SPECS = [
  rules.Spec(*fields)
  for fields in itertools.product(
    ('none', *weights.QUANTIZERS),
    ('none', *activations.QUANTIZERS),
    weights.GRANULARITIES,
  )
  if fields[0] != 'none' or fields[2] == 'tensor'
]


def name(fields):
  return '-'.join(map(str, dataclasses.astuple(fields)))


for_specs = pytest.mark.parametrize('spec', SPECS, ids=name)
for_methods = pytest.mark.parametrize('method', METHODS, ids=name)
BINARY = rules.Spec('binary', 'int8', 'tensor')


def normal(*shape, seed=0):
  values = np.random.default_rng(seed).normal(0.1, 1, size=shape)
  return values.astype(np.float32)


def apply(x, w, spec, method):
  return dot.quantized_dot(
    dot.make_input(x, spec), make_weight(w, spec), method
  )


def make_weight(w, spec):
  return dot.make_weight({'kernel': jnp.asarray(w)}, spec)


def quantize(spec, w):
  return spec.quantize({'kernel': jnp.asarray(w)})


def value_and_gradients(x, w, dy, spec, method):
  # Not compiled as a whole: most specs and methods share their operations.
  y, vjp = jax.vjp(lambda x, w: apply(x, w, spec, method), x, w)
  return y, *vjp(dy)


def parts(q, a, dtype):
  """Codes and scale in float64; where there are none, rounded values and 1."""
  if q is None:
    return np.float64(jnp.asarray(a).astype(dtype)), np.ones((1, 1))
  return np.float64(q.codes), np.float64(q.scale)


def rounded(a, dtype):
  """From float32, as the method rounds it; then float64."""
  return np.float64(jnp.asarray(np.float32(a)).astype(dtype))


def slow(x_MK, w_KN, dy_MN, spec, dtype):
  """y, dx and dw of one matrix by the formulas, in float64."""
  xc, xs = parts(spec.quantize_input(jnp.asarray(x_MK)), x_MK, dtype)
  wc, ws = parts(quantize(spec, w_KN), w_KN, dtype)
  y = (xc @ wc) * xs * ws
  dx = rounded(np.float32(dy_MN) * np.float32(ws), dtype) @ wc.T
  dw = xc.T @ rounded(np.float32(dy_MN) * np.float32(xs), dtype)
  return y, dx, dw


def close(actual, expected, tolerance=2e-6):
  size = np.abs(expected).max()
  np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * size)


@for_specs
@for_methods
def test_value_and_gradients_are_the_formulas_in_float64(spec, method):
  x_MK, w_KN, dy_MN = normal(7, 12), normal(12, 5, seed=1), normal(7, 5, seed=2)
  found = value_and_gradients(x_MK, w_KN, dy_MN, spec, method)
  for actual, expected in zip(
    found, slow(x_MK, w_KN, dy_MN, spec, method.dtype), strict=True
  ):
    assert actual.dtype == jnp.float32
    close(actual, expected)


def test_the_value_is_bitnet_written_out():
  x_MK, w_KN = normal(6, 16), normal(16, 8, seed=1)
  x, w = np.float64(x_MK), np.float64(w_KN)
  gamma_M1 = 127 / np.abs(x).max(-1, keepdims=True)
  sign_KN = np.where(w - w.mean() > 0, 1, -1)
  y_MN = (np.round(x * gamma_M1) @ sign_KN) * np.abs(w).mean() / gamma_M1
  for method in METHODS:
    close(apply(x_MK, w_KN, BINARY, method), y_MN)


@for_specs
def test_gradients_are_autodiff_of_the_textbook_form(spec):
  x_MK, w_KN, dy_MN = normal(7, 12), normal(12, 5, seed=1), normal(7, 5, seed=2)

  def through(a, q):
    return a if q is None else a + lax.stop_gradient(q.dequantize() - a)

  def textbook(x_MK, w_KN):
    return through(x_MK, spec.quantize_input(x_MK)) @ through(
      w_KN, quantize(spec, w_KN)
    )

  y, vjp = jax.vjp(textbook, jnp.asarray(x_MK), jnp.asarray(w_KN))
  found = value_and_gradients(x_MK, w_KN, dy_MN, spec, FLOAT32)
  for actual, expected in zip(found, (y, *vjp(dy_MN)), strict=True):
    close(actual, expected, 1e-5)


@pytest.mark.parametrize('weight', ['binary', 'ternary'])
def test_every_method_gives_the_same_exact_integers(weight):
  # The largest sums there are: all codes of a row are 127.
  spec = rules.Spec(weight, 'int8', 'channel')
  x_MK = np.concatenate([np.ones((1, 4096)), normal(3, 4096)]).astype('f4')
  w_KN = normal(4096, 6, seed=1)
  x, w = spec.quantize_input(jnp.asarray(x_MK)), quantize(spec, w_KN)
  exact_MN = np.int64(x.codes) @ np.int64(w.codes)
  expected = jnp.float32(exact_MN) * w.scale * x.scale
  for method in METHODS:
    found = apply(x_MK, w_KN, spec, method)
    np.testing.assert_allclose(found, expected, rtol=3e-7)


@for_specs
def test_a_stack_is_its_matrices_one_by_one(spec):
  x_MK, dy = normal(6, 8), normal(6, 3, 5, seed=2)
  w_EKN = normal(3, 8, 5, seed=1) * np.float32([1, 9, 0.1]).reshape(3, 1, 1)
  y, dx, dw = value_and_gradients(x_MK, w_EKN, dy, spec, FLOAT32)
  assert y.shape == (6, 3, 5)
  total_dx = 0
  for i, w_KN in enumerate(w_EKN):
    expected = slow(x_MK, w_KN, dy[:, i], spec, 'float32')
    close(y[:, i], expected[0])
    close(dw[i], expected[2])
    total_dx += expected[1]
  close(dx, total_dx)


@pytest.mark.parametrize(
  ('shape', 'stack'),
  [((8,), ()), ((2, 3, 8), ()), ((2, 3, 8), (4,)), ((0, 8), (4,))],
)
def test_leading_axes_of_the_input_are_those_of_the_output(shape, stack):
  x, w = normal(*shape), normal(*stack, 8, 5, seed=1)
  dy = normal(*shape[:-1], *stack, 5, seed=2)
  y, dx, dw = value_and_gradients(x, w, dy, BINARY, FLOAT32)
  assert y.shape == dy.shape and dx.shape == x.shape and dw.shape == w.shape
  flat = x.reshape(-1, 8)
  if len(flat):
    alone = apply(flat[-1], w, BINARY, FLOAT32)
    np.testing.assert_allclose(y.reshape(-1, *alone.shape)[-1], alone, 1e-6)


@pytest.mark.parametrize('width', [1, 7, 8])
def test_a_transpose_in_a_loop_needs_no_even_width(width):
  x_MK, dy_MN = normal(6, width), normal(6, 5, seed=2)
  w_KN = normal(width, 5, seed=1)
  plain, loop = (
    value_and_gradients(
      x_MK, w_KN, dy_MN, BINARY, dot.Method(False, 'float32', flag)
    )
    for flag in (False, True)
  )
  jax.tree.map(functools.partial(close, tolerance=1e-6), loop, plain)


@for_specs
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_gradients_have_the_dtypes_of_what_they_belong_to(spec, dtype):
  x, w = jnp.asarray(normal(4, 8)).astype(dtype), jnp.asarray(normal(8, 5))
  y, dx, dw = jax.eval_shape(
    lambda *a: value_and_gradients(*a, spec, dot.Method(False, dtype)),
    x,
    w,
    normal(4, 5),
  )
  assert y.dtype == jnp.float32  # Whoever asked for less rounds it once.
  assert dx.dtype == dtype and dw.dtype == jnp.float32


def kept(spec, method, m=64, k=32, n=16):
  """What stays between the forward and the backward pass: (shape, dtype)s."""
  x_MK, w_KN = jnp.asarray(normal(m, k)), jnp.asarray(normal(k, n))
  vjp = jax.eval_shape(
    lambda x, w: jax.vjp(lambda x, w: apply(x, w, spec, method), x, w)[1],
    x_MK,
    w_KN,
  )
  return [(leaf.shape, leaf.dtype.name) for leaf in jax.tree.leaves(vjp)]


@for_specs
@for_methods
def test_only_codes_and_scales_are_kept(spec, method):
  left = 'int8' if spec.activation != 'none' else method.dtype
  right = 'int8' if spec.weight != 'none' else method.dtype
  residuals = kept(spec, method)
  large = [leaf for leaf in residuals if np.prod(leaf[0]) > 64]
  assert sorted(large) == sorted([((64, 32), left), ((32, 16), right)])
  small = [shape for shape, _ in residuals if 0 < np.prod(shape) <= 64]
  assert set(small) <= {(64, 1), (1, 16), (1, 1)}


def test_the_textbook_form_keeps_floats():
  # The measure itself: it has to see what the dot is there to avoid.
  def textbook(x, w):
    q = quantize(BINARY, w)
    return x @ (w + lax.stop_gradient(q.dequantize() - w))

  vjp = jax.eval_shape(
    lambda *a: jax.vjp(textbook, *a)[1], normal(64, 32), normal(32, 16)
  )
  leaves = [(leaf.shape, leaf.dtype.name) for leaf in jax.tree.leaves(vjp)]
  assert ((64, 32), 'float32') in leaves and ((32, 16), 'float32') in leaves


def test_it_works_under_remat_and_vmap():
  x_BMK, w_KN = normal(3, 4, 8), normal(8, 5, seed=1)

  def loss(x, w):
    return jnp.sum(jnp.sin(apply(x, w, BINARY, FLOAT32)))

  plain = jax.grad(loss, (0, 1))(x_BMK, w_KN)
  remat = jax.grad(jax.checkpoint(loss), (0, 1))(x_BMK, w_KN)
  jax.tree.map(functools.partial(close, tolerance=1e-6), remat, plain)
  dx_BMK, dw_BKN = jax.vmap(jax.grad(loss, (0, 1)), (0, None))(x_BMK, w_KN)
  close(dx_BMK, plain[0], 1e-6)
  close(dw_BKN.sum(0), plain[1], 1e-6)


def test_readers_of_one_input_add_their_gradients():
  x_MK, a_KN, b_KN = normal(6, 8), normal(8, 4, seed=1), normal(8, 3, seed=2)

  def loss(shared, x):
    inputs = [dot.make_input(x, BINARY)] * 2
    if not shared:
      inputs[1] = dot.make_input(x, BINARY)
    return sum(
      jnp.sum(
        jnp.sin(dot.quantized_dot(source, make_weight(w, BINARY), FLOAT32))
      )
      for source, w in zip(inputs, (a_KN, b_KN), strict=True)
    )

  gradients = [
    jax.grad(functools.partial(loss, shared))(x_MK) for shared in (True, False)
  ]
  close(*gradients, 1e-6)


def test_quantization_has_no_other_gradient():
  # The scale depends on the input; straight through, that counts as constant.
  x_MK = normal(6, 8)
  zero = jax.grad(
    lambda x: jnp.sum(dot.make_input(x, BINARY).quantized.dequantize())
  )(x_MK)
  np.testing.assert_array_equal(zero, 0)


@pytest.mark.parametrize('weight', ['binary', 'int8'])
def test_devices_exchange_codes_instead_of_floats(weight):
  spec = rules.Spec(weight, 'int8', 'tensor')
  mesh = Mesh(np.array(jax.devices()), ('fsdp',))
  x_MK, w_KN, dy_MN = normal(16, 64), normal(64, 24, seed=1), normal(16, 24)
  split = NamedSharding(mesh, P('fsdp', None))
  arguments = [jax.device_put(a, split) for a in (x_MK, w_KN, dy_MN)]
  plain = value_and_gradients(x_MK, w_KN, dy_MN, spec, FLOAT32)
  method = dot.Method(False, 'float32', gather_codes=True)
  with jax.set_mesh(mesh):
    compiled = (
      jax.jit(value_and_gradients, static_argnums=(3, 4))
      .lower(*arguments, spec, method)
      .compile()
    )
    found = compiled(*arguments)
  jax.tree.map(functools.partial(close, tolerance=1e-6), found, plain)
  gathers = [x for x in compiled.as_text().splitlines() if ' all-gather' in x]
  assert any('s8[64,24]' in line for line in gathers)
  assert not any('f32[64,24]' in line for line in gathers)


@pytest.mark.parametrize('platform', ['cpu', 'gpu', 'tpu'])
@pytest.mark.parametrize('tiles', [False, True])
def test_choose_method_resolves_auto(monkeypatch, platform, tiles):
  monkeypatch.setattr(dot, '_cpu_has_tiles', lambda: tiles)
  method = dot.choose_method('auto', 'bfloat16', platform)
  assert method.int8 == (platform != 'cpu' or tiles)
  assert method.transpose_in_loop == (platform == 'cpu')
  assert dot.choose_method('int8', 'float32', platform).int8
  assert not dot.choose_method('float', 'float32', platform).int8
  assert dot.choose_method('float', 'float32', platform, True).gather_codes


def test_choose_method_refuses_what_it_does_not_know():
  with pytest.raises(ValueError, match="quantized_dot='int4'.*auto"):
    dot.choose_method('int4', 'bfloat16', 'cpu')
  with pytest.raises(ValueError, match="dot_dtype='float16'.*bfloat16"):
    dot.choose_method('auto', 'float16', 'cpu')
