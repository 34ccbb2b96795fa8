"""Quantizers that learn their scales: values, starts, gradients, by registry.

A gradient is checked against finite differences of what it is the gradient of:
a smooth function that has the quantizer's value where it is differentiated.
"""

import itertools

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from qat.quant import dot
from qat.quant import learned
from qat.quant import operand as operand_lib
from qat.quant import qtensor
from qat.quant import rules
from tests import slow_clipped

# Of LEVELS: the values of w / a, and where w / a is clipped.
VALUES = {
  'lsq3': (np.arange(-4, 4), -4, 3),
  'lsq4': (np.arange(-8, 8), -8, 7),
  'paretoq1': (np.array([-1, 1]), -1, 1),
  'paretoq_ternary': (np.array([-2, 0, 2]) / 3, -0.99, 0.99),
  'paretoq2': (np.array([-3, -1, 1, 3]) / 4, -0.99, 0.99),
}
POSITIVE = {'lsq3': 3, 'lsq4': 7}  # Q_p, where it is not 1.
# Of learned clipping: the bits.
CLIPPED = {'lwc2': 2, 'lwc3': 3, 'lwc4': 4, 'lwc6': 6, 'lwc8': 8}
ALL = [
  (name, granularity)
  for name, quantizer in learned.QUANTIZERS.items()
  for granularity in quantizer.granularities
]
FIXED = [pair for pair in ALL if pair[0] not in CLIPPED]
LEVELS = list(itertools.product(VALUES, ('tensor', 'channel', 'group')))
for_all = pytest.mark.parametrize(('name', 'granularity'), ALL)
for_fixed = pytest.mark.parametrize(('name', 'granularity'), FIXED)
for_levels = pytest.mark.parametrize(('name', 'granularity'), LEVELS)
SHAPE = (3, 6, 5)


def normal(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def spec(name, granularity):
  return rules.Spec(name, 'none', granularity, group_size=2)


def layer(name, granularity, *shape, seed=0):
  """A layer whose scales are not those it starts with."""
  kernel = normal(*shape, seed=seed)
  made = {'kernel': kernel}
  start = spec(name, granularity).start(jnp.asarray(kernel))
  rng = np.random.default_rng(seed + 1)
  for key, value in start.items():
    factor = rng.uniform(0.5, 1.5, value.shape)
    made[key] = np.array(value * factor, np.float32)
    if name in CLIPPED:
      made[key] -= np.float32(3.5)  # So that some weights are clipped.
  return made


def scale_of(made, name, shape):
  """What multiplies each level, in float64, of the shape of the kernel."""
  if name == 'onebit':
    left, right = np.float64(made['gain_in']), np.float64(made['gain_out'])
    return left[..., :, None] * right[..., None, :]
  scale = np.float64(made['learned_scale'])
  scale = np.repeat(scale, shape[-2] // scale.shape[-2], -2)
  return np.broadcast_to(scale, shape)


def value_of(made, name, shape):
  """What a layer multiplies by, in float64."""
  if name in CLIPPED:
    ends = made['clip_high'], made['clip_low']
    return slow_clipped.quantize(made['kernel'], *ends, CLIPPED[name])[1]
  scale = scale_of(made, name, shape)
  return level_of(made, name, scale) * scale


def level_of(made, name, scale):
  """The nearest level of w / a; of the signs, -1 at 0."""
  u = np.float64(made['kernel']) / scale
  if name in ('onebit', 'paretoq1'):
    return np.where(made['kernel'] > 0, 1, -1)
  values = VALUES[name][0]
  return values[np.abs(u[..., None] - values).argmin(-1)]


def test_every_quantizer_has_a_slow_reference():
  assert {*VALUES, 'onebit', *CLIPPED} == {*learned.QUANTIZERS}
  assert {*VALUES} == {*learned.LEVELS}


@for_all
@pytest.mark.parametrize('shape', [SHAPE, (2, 1)])
def test_the_value_is_the_nearest_level(name, granularity, shape):
  made = layer(name, granularity, *shape)
  q = spec(name, granularity).quantize(made)
  expected = value_of(made, name, shape)
  np.testing.assert_allclose(q.dequantize(), expected, rtol=1e-6, atol=1e-7)
  assert q.alphabet == learned.QUANTIZERS[name].alphabet
  assert q.codes.dtype == jnp.int8 and q.scale.dtype == jnp.float32
  assert set(np.unique(q.codes)) <= set(qtensor.ALPHABETS[q.alphabet])


@for_fixed
def test_what_is_quantized_stays_as_it_is(name, granularity):
  made = layer(name, granularity, *SHAPE)
  once = spec(name, granularity).quantize(made)
  again = spec(name, granularity).quantize(made | {'kernel': once.dequantize()})
  np.testing.assert_array_equal(again.codes, once.codes)
  np.testing.assert_array_equal(again.scale, once.scale)


@for_all
def test_a_stack_is_its_matrices_one_by_one(name, granularity):
  made = layer(name, granularity, *SHAPE)
  made['kernel'] *= np.float32([1, 10, 0.1]).reshape(3, 1, 1)
  made |= spec(name, granularity).start(jnp.asarray(made['kernel']))
  made = jax.tree.map(np.asarray, made)
  together = np.asarray(spec(name, granularity).quantize(made).dequantize())
  for i in range(3):
    mine = {key: value[i] for key, value in made.items()}
    alone = spec(name, granularity).quantize(mine).dequantize()
    np.testing.assert_allclose(together[i], alone, rtol=1e-6)
    start = spec(name, granularity).start(jnp.asarray(mine['kernel']))
    for key, value in start.items():
      np.testing.assert_allclose(mine[key], value, rtol=1e-5)


# ------------------------------------------------------------------- gradients


def gradients(name, granularity, made, dw):
  """Those that training gets: by way of the layer's dequantized weight."""
  s = spec(name, granularity)

  def loss(made):
    quantized = s.quantize(jax.lax.stop_gradient(made))
    return jnp.sum(s.fake_quantize(made, quantized) * dw)

  return jax.grad(loss)(made)


def slope(f, a, step=1e-6):
  """df/da of a function of each element alone."""
  return (f(a + step) - f(a - step)) / (2 * step)


def block_sums(a, like):
  """Sums over the weights that share an entry of a scale."""
  *stack, k, n = a.shape
  groups, columns = like.shape[-2:]
  a = a.reshape(*stack, groups, k // groups, columns, n // columns)
  return a.sum((-3, -1))


@for_levels
def test_gradients_of_levels_are_those_of_a_smooth_function(name, granularity):
  made, dw = layer(name, granularity, *SHAPE), normal(*SHAPE, seed=3)
  if name.startswith('lsq'):
    made['learned_scale'] *= np.float32(0.4)  # At the start, little is clipped.
  w, scale = np.float64(made['kernel']), scale_of(made, name, SHAPE)
  level = level_of(made, name, scale)
  _, low, high = VALUES[name]
  # The residual of rounding counts as constant, and clipping as what it is.
  residual = level - np.clip(w / scale, low, high)

  def of_weight(w):
    return scale * (np.clip(w / scale, low, high) + residual)

  def of_scale(scale):
    if name == 'paretoq1':
      return scale * level
    return scale * (np.clip(w / scale, low, high) + residual)

  np.testing.assert_allclose(of_weight(w), level * scale, rtol=1e-9)
  found = gradients(name, granularity, made, dw)
  np.testing.assert_allclose(
    found['kernel'], dw * slope(of_weight, w), rtol=1e-4, atol=1e-5
  )
  clipped = np.mean(np.asarray(found['kernel']) == 0)
  assert 0 < clipped < 1  # Both cases were there.
  like = found['learned_scale']
  assert like.shape == made['learned_scale'].shape
  shared = w.size / like.size
  expected = block_sums(dw * slope(of_scale, scale), like)
  expected /= np.sqrt(shared * POSITIVE.get(name, 1))
  np.testing.assert_allclose(like, expected, rtol=1e-4, atol=1e-5)


def test_gradients_of_onebit_are_those_of_a_smooth_function():
  made, dw = layer('onebit', 'channel', *SHAPE), normal(*SHAPE, seed=3)
  w, scale = np.float64(made['kernel']), scale_of(made, 'onebit', SHAPE)
  found = gradients('onebit', 'channel', made, dw)
  # The kernel's: sign counts as tanh(w) + 0.001 w.
  expected = dw * scale * slope(lambda w: np.tanh(w) + 0.001 * w, w)
  np.testing.assert_allclose(found['kernel'], expected, rtol=1e-4, atol=1e-5)
  # The vectors': the value itself is smooth in them.
  for key in ('gain_in', 'gain_out'):
    for index in np.ndindex(made[key].shape):

      def of_gain(gain, key=key, index=index):
        changed = np.float64(made[key])
        changed[index] = gain
        scale = scale_of(made | {key: changed}, 'onebit', SHAPE)
        return np.sum(dw * np.where(w > 0, 1, -1) * scale)

      expected = slope(of_gain, np.float64(made[key][index]))
      np.testing.assert_allclose(
        found[key][index], expected, rtol=1e-4, atol=1e-4
      )


@for_all
def test_the_dot_hands_its_gradient_to_the_quantizer(name, granularity):
  made = layer(name, granularity, 6, 5)
  x_MK, dy_MN = normal(4, 6, seed=5), normal(4, 5, seed=6)
  s = spec(name, granularity)

  def apply(made):
    weight = operand_lib.make_weight(made, s)
    return dot.quantized_dot(
      operand_lib.make_input(jnp.asarray(x_MK), s),
      weight,
      dot.Method(False, 'float32'),
    )

  y, vjp = jax.vjp(apply, made)
  expected = x_MK @ np.asarray(s.quantize(made).dequantize())
  np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
  (found,) = vjp(jnp.asarray(dy_MN))
  expected = gradients(name, granularity, made, x_MK.T @ dy_MN)
  assert {*found} == {*made}
  for key in made:
    np.testing.assert_allclose(found[key], expected[key], rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------- starts


@pytest.mark.parametrize('bits', [3, 4])
def test_lsq_starts_with_twice_the_mean_over_the_root_of_q(bits):
  w_KN = normal(8, 6)
  found = spec(f'lsq{bits}', 'channel').start(jnp.asarray(w_KN))
  expected = 2 * np.abs(w_KN).mean(0) / np.sqrt(2 ** (bits - 1) - 1)
  np.testing.assert_allclose(found['learned_scale'], expected[None], rtol=1e-6)


@pytest.mark.parametrize('name', [n for n in VALUES if n.startswith('pareto')])
def test_paretoq_starts_near_the_least_error_of_normal_weights(name):
  made = {'kernel': normal(200, 200)}
  start = spec(name, 'tensor').start(jnp.asarray(made['kernel']))

  def error(factor):
    scale = factor * np.float64(start['learned_scale'])
    level = level_of(made, name, scale)
    return np.mean((level * scale - made['kernel']) ** 2)

  best = min(error(f) for f in np.linspace(0.5, 2, 31))
  assert error(1.0) <= 1.005 * best


@pytest.mark.parametrize('shape', [(12, 9), (1, 4), (5, 1), (2, 8, 6)])
@pytest.mark.parametrize('size', [1.0, 1e-6, 1e6])
def test_onebit_starts_with_the_first_singular_vectors(shape, size):
  w = size * normal(*shape)
  found = spec('onebit', 'channel').start(jnp.asarray(w))
  left, values, right = np.linalg.svd(np.abs(np.float64(w)))
  # Between two vectors, a factor may go to either: here a root to each.
  root = np.sqrt(values[..., :1])
  np.testing.assert_allclose(
    found['gain_in'], np.abs(left[..., :, 0]) * root, rtol=2e-2
  )
  np.testing.assert_allclose(
    found['gain_out'], np.abs(right[..., 0, :]) * root, rtol=2e-2
  )


@for_all
@pytest.mark.parametrize('value', [0.0, 0.25, -1e-30, 1e30])
def test_a_constant_matrix_starts_and_stays_finite(name, granularity, value):
  made = {'kernel': np.full((6, 5), value, np.float32)}
  made |= spec(name, granularity).start(jnp.asarray(made['kernel']))
  q = spec(name, granularity).quantize(made)
  if name in CLIPPED and value == 1e30:  # No float16 is a scale of these.
    assert jnp.all(jnp.isposinf(q.scale))
    return
  assert jnp.all(q.scale > 0) and jnp.all(jnp.isfinite(q.dequantize()))
  found = gradients(name, granularity, made, np.ones((6, 5), np.float32))
  assert all(jnp.all(jnp.isfinite(leaf)) for leaf in found.values())


@for_levels
def test_a_scale_that_fell_below_zero_finds_back(name, granularity):
  made = layer(name, granularity, 6, 5)
  made['learned_scale'] *= -1
  q = spec(name, granularity).quantize(made)
  assert jnp.all(q.scale > 0) and jnp.all(jnp.isfinite(q.dequantize()))
  # The value should grow in size: so the gradient lifts the scale.
  dw = -np.sign(made['kernel'])
  found = gradients(name, granularity, made, dw)
  assert jnp.all(found['learned_scale'] < 0)


@for_all
@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_reaches_the_output(name, granularity, bad):
  made = layer(name, granularity, 6, 5)
  made['kernel'][2, 1] = bad
  value = np.asarray(spec(name, granularity).quantize(made).dequantize())
  y_N = np.ones(6) @ value
  assert not np.isfinite(y_N[1])
  if granularity != 'tensor':
    assert np.isfinite(np.delete(y_N, 1)).all()


@for_all
def test_low_precision_kernels_are_quantized_in_float32(name, granularity):
  made = layer(name, granularity, 6, 5)
  low = made | {'kernel': jnp.asarray(made['kernel'], jnp.bfloat16)}
  wide = made | {'kernel': low['kernel'].astype(jnp.float32)}
  a, b = (spec(name, granularity).quantize(m) for m in (low, wide))
  np.testing.assert_array_equal(a.codes, b.codes)
  np.testing.assert_array_equal(a.scale, b.scale)
