"""BitNet's and BitNet b1.58's linears against independent implementations.

They are the layers of the library transformers, and the formulas of "The Era of
1-bit LLMs: Training Tips" (their activations, ternary and binary weights, and
the straight-through x + (q(x) - x).detach()) in PyTorch's automatic
differentiation. Kernels are [K, N] here and [N, K] there.

All compute in float32, so they differ by rounding alone. Where an output is a
sum of n products a * b, the order of adding changes it by at most n * U times
the sum of |a| * |b|, for U = 2^-24; a few more U are the scales', which are
rounded and summed up differently too. That bound is asserted of each number.
It holds where both sides round to the same code; so no number here lies so near
to a threshold between two codes that the last bit decides.
"""

import itertools

import flax.linen as nn
import jax
from jax import numpy as jnp
import numpy as np
import pytest

from qat.nn import layers
from qat.quant import dot
from qat.quant import operand as operand_lib
from qat.quant import rules

torch = pytest.importorskip('torch')
bitnet = pytest.importorskip('transformers.integrations.bitnet')

U = 2.0**-24
EPS = 1e-6  # Of RMSNorm.
METHODS = {
  'float': dot.Method(int8=False, dtype='float32'),
  'int8': dot.Method(int8=True, dtype='float32'),
}
SPECS = {
  name: rules.Spec(name, 'int8', 'tensor') for name in ('binary', 'ternary')
}
# M, K, N; the size of the inputs; the size of the weights. Below 1e-5, the
# floors of the scales are at work.
CASES = [
  (1, 1, 4, 1.0, 1.0),
  (4, 8, 4, 1.0, 0.02),
  (7, 33, 12, 30.0, 0.5),
  (3, 97, 8, 1e-6, 1e-5),
  (16, 96, 20, 1.0, 0.02),
]
for_cases = pytest.mark.parametrize('case', CASES)
for_methods = pytest.mark.parametrize('method', METHODS)
for_specs = pytest.mark.parametrize('spec', SPECS)


@pytest.fixture(autouse=True)
def eager():
  # Some of transformers' functions would be compiled, for seconds each.
  with torch.compiler.set_stance('force_eager'):
    yield


# ------------------------------------------------------------ the published


def published_inputs(x):
  scale = 127 / x.abs().max(-1, keepdim=True).values.clamp(min=1e-5)
  return (x * scale).round().clamp(-128, 127) / scale


def published_ternary(w):
  scale = 1 / w.abs().mean().clamp(min=1e-5)
  return (w * scale).round().clamp(-1, 1) / scale


def published_binary(w):
  return (w - w.mean()).sign() * w.abs().mean()


PUBLISHED = {'binary': published_binary, 'ternary': published_ternary}


def published_linear(x, w_NK, spec):
  x_q = x + (published_inputs(x) - x).detach()
  w_q = w_NK + (PUBLISHED[spec](w_NK) - w_NK).detach()
  return torch.nn.functional.linear(x_q, w_q)


def published_norm(x, gain):
  return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * gain


# ------------------------------------------------------------------ the data


def rms_norm(x):
  return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + EPS)


def to_threshold(x, spec):
  """How far each number is from the next threshold, in steps between codes."""
  x = np.float64(x)
  if spec == 'binary':
    return np.abs(x - x.mean()) / np.abs(x).mean()
  if spec == 'ternary':
    return np.abs(np.abs(x) / max(np.abs(x).mean(), 1e-5) - 0.5)
  scaled = 127 * x / np.abs(x).max(-1, keepdims=True).clip(1e-5)
  return np.abs(scaled - np.floor(scaled) - 0.5)


def weights(k, n, size, spec):
  """Weights w_KN with a mean and a few large ones, clear of thresholds."""
  for seed in itertools.count():
    rng = np.random.default_rng(seed)
    w_KN = np.float32(size * (rng.standard_t(4, (k, n)) + 0.1))
    # A single weight is its own mean: no code of it is clear.
    if k * n == 1 or to_threshold(w_KN, spec).min() > 1e-5:
      return w_KN


def inputs(m, k, size, norm=lambda x: x):
  """Inputs x_MK that are clear of thresholds after `norm`."""
  rng = np.random.default_rng(1)
  rows = []
  while len(rows) < m:
    x_K = np.float32(size * (rng.standard_t(4, k) + 0.2))
    # The largest is the middle of its code.
    if to_threshold(norm(np.float64(x_K)), 'int8').min() > 1e-4:
      rows.append(x_K)
  return np.stack(rows)


def ours(x, w_KN, dy, spec, method):
  """y, dx and dw of this project."""

  def linear(x, w_KN):
    weight = operand_lib.make_weight({'kernel': w_KN}, SPECS[spec])
    source = operand_lib.make_input(x, SPECS[spec])
    return dot.quantized_dot(source, weight, METHODS[method])

  y, vjp = jax.vjp(linear, jnp.asarray(x), jnp.asarray(w_KN))
  return y, *vjp(jnp.asarray(dy))


def theirs(layer, x, w_KN, dy):
  """y, dx and dw of a function of tensors x and w_NK."""
  x = torch.tensor(x, requires_grad=True)
  w_NK = torch.tensor(w_KN.T.copy(), requires_grad=True)
  y = layer(x, w_NK)
  y.backward(torch.tensor(dy))
  return y.detach().numpy(), x.grad.numpy(), w_NK.grad.numpy().T


def check(got, expected, x, w_KN, dy, spec):
  """Holds y, dx and dw to the bound of the module's docstring."""
  # Beside the codes: w + (q(w) - w) rounds by the size of w itself.
  x_q = published_inputs(torch.tensor(x)).numpy()
  w_q = PUBLISHED[spec](torch.tensor(w_KN)).numpy()
  x_size = (np.abs(x) + np.abs(x_q)).reshape(-1, x.shape[-1])
  w_size = np.abs(w_KN) + np.abs(w_q)
  dy_size = np.abs(dy).reshape(-1, dy.shape[-1])
  for name, a, b, left, right in (
    ('y', got[0], expected[0], x_size, w_size),
    ('dx', got[1], expected[1], dy_size, w_size.T),
    ('dw', got[2], expected[2], x_size.T, dy_size),
  ):
    size = left @ right
    bound = (left.shape[1] + 16) * U * size.reshape(np.shape(a))
    error = np.abs(np.float64(a) - b)
    assert np.all(error <= bound), f'{name}: {np.max(error / bound):.2f} bounds'


def problem(case, spec, lead=()):
  m, k, n, x_size, w_size = case
  dy = np.random.default_rng(2).normal(size=(*lead, m, n)).astype(np.float32)
  x = inputs(int(np.prod([*lead, m])), k, x_size).reshape(*lead, m, k)
  return x, weights(k, n, w_size, spec), dy


# ----------------------------------------------------------------- the tests


@for_cases
@for_methods
@for_specs
def test_the_published_training_formulas(spec, method, case):
  x, w_KN, dy = problem(case, spec)
  check(
    ours(x, w_KN, dy, spec, method),
    theirs(lambda x, w: published_linear(x, w, spec), x, w_KN, dy),
    *(x, w_KN, dy, spec),
  )


@for_cases
@for_methods
def test_transformers_online_layer(method, case):
  x, w_KN, dy = problem(case, 'ternary')

  def layer(x, w_NK):
    made = bitnet.AutoBitLinear(*w_NK.shape[::-1], False, online_quant=True)
    return torch.func.functional_call(made, {'weight': w_NK}, x)

  check(
    ours(x, w_KN, dy, 'ternary', method),
    theirs(layer, x, w_KN, dy),
    *(x, w_KN, dy, 'ternary'),
  )


def test_axes_in_front_are_tokens():
  x, w_KN, dy = problem((5, 33, 12, 1.0, 0.1), 'ternary', lead=(2, 3))
  check(
    ours(x, w_KN, dy, 'ternary', 'int8'),
    theirs(lambda x, w: published_linear(x, w, 'ternary'), x, w_KN, dy),
    *(x, w_KN, dy, 'ternary'),
  )


@for_cases
@for_methods
def test_transformers_packed_layers(method, case):
  x, w_KN, dy = problem(case, 'ternary')
  y, *_ = ours(x, w_KN, dy, 'ternary', method)
  quantized = SPECS['ternary'].quantize({'kernel': jnp.asarray(w_KN)})
  codes_NK = torch.tensor(np.asarray(quantized.codes, np.float32).T.copy())
  scale = torch.tensor(np.asarray(quantized.scale).reshape(1))
  shape = w_KN.shape
  # The packed layer divides by what the other one multiplies with.
  packed = bitnet.BitLinear(*shape, False, dtype=torch.float32)
  packed.weight = bitnet.pack_weights(codes_NK.clone())
  packed.weight_scale = 1 / scale
  assert packed.weight.shape == (shape[1] // 4, shape[0])
  stored = bitnet.AutoBitLinear(*shape, False, dtype=torch.float32)
  stored.weight.data, stored.weight_scale = codes_NK, scale
  codes_MK, _ = packed.activation_quant(torch.tensor(x))
  np.testing.assert_array_equal(
    codes_MK,
    operand_lib.make_input(jnp.asarray(x), SPECS['ternary']).quantized.codes,
  )
  for layer in (packed, stored):
    with torch.no_grad():
      found = layer(torch.tensor(x)).numpy()
    size = np.abs(codes_MK.numpy()) @ np.abs(codes_NK.numpy().T)
    size = (
      size * np.abs(x).max(-1, keepdims=True).clip(1e-5) / 127 * float(scale)
    )
    assert np.all(np.abs(found - y) <= (shape[0] + 16) * U * size)


class Projection(nn.Module):
  """One linear layer with a norm of its own."""

  features: int
  spec: str
  method: str

  @nn.compact
  def __call__(self, x):
    linear = layers.Linear(
      self.features,
      rules.Rules((('.*', SPECS[self.spec]),)),
      init_std=1.0,
      norm_eps=EPS,
      name='linear',
    )
    return layers.project(x, [linear], METHODS[self.method])[0]


@pytest.mark.parametrize('case', [c for c in CASES if c[1] > 1])
@pytest.mark.parametrize('which', ['transformers', 'binary', 'ternary'])
def test_a_layer_with_its_norm(which, case):
  m, k, n, x_size, w_size = case
  spec = 'ternary' if which == 'transformers' else which
  rng = np.random.default_rng(3)
  gain_K = np.float32(1 + 0.3 * rng.normal(size=k))
  x = inputs(m, k, x_size, lambda x: rms_norm(x) * gain_K)
  w_KN = weights(k, n, w_size, spec)
  dy = rng.normal(size=(m, n)).astype(np.float32)

  def apply(x, w_KN, gain_K):
    params = {'linear': {'kernel': w_KN, 'norm': {'scale': gain_K}}}
    return Projection(n, spec, 'int8').apply({'params': params}, x)

  y, vjp = jax.vjp(apply, *map(jnp.asarray, (x, w_KN, gain_K)))
  got = [y, *vjp(jnp.asarray(dy))]

  gain = torch.tensor(gain_K, requires_grad=True)

  def layer(x, w_NK):
    if which != 'transformers':
      return published_linear(published_norm(x, gain), w_NK, spec)
    made = bitnet.AutoBitLinear(
      *(k, n, False), online_quant=True, use_rms_norm=True, rms_norm_eps=EPS
    )
    parameters = {'weight': w_NK, 'rms_norm.weight': gain}
    return torch.func.functional_call(made, parameters, x)

  expected = [*theirs(layer, x, w_KN, dy), gain.grad.numpy()]
  # The norm's gradient subtracts numbers that are nearly equal, so its error is
  # one of the largest. A code that is off by one would be 1e-3 of it or more.
  for a, b in zip(got, expected, strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.max(np.abs(b)))


def test_halves_are_rounded_to_even_by_all():
  # The largest is 127, so each number is its own code.
  x = np.float32([[0.5, 1.5, -2.5, 3.5, -0.5, 126.5, 127.0]])
  codes = operand_lib.make_input(
    jnp.asarray(x), SPECS['ternary']
  ).quantized.codes
  assert codes.tolist() == [[0, 2, -2, 4, 0, 126, 127]]
  np.testing.assert_array_equal(published_inputs(torch.tensor(x)), codes)
  np.testing.assert_array_equal(bitnet.ActQuant.apply(torch.tensor(x)), codes)
  # The mean of sizes is 1: halves become 0, and one and a half is clipped.
  w_KN = np.float32([[0.5, -0.5], [1.5, -1.5]])
  codes = SPECS['ternary'].quantize({'kernel': jnp.asarray(w_KN)}).codes
  assert codes.tolist() == [[0, 0], [1, -1]]
  np.testing.assert_array_equal(published_ternary(torch.tensor(w_KN)), codes)
  np.testing.assert_array_equal(
    bitnet.WeightQuant.apply(torch.tensor(w_KN)), codes
  )


def test_a_weight_that_is_the_mean_is_negative_here_and_zero_there():
  # BitNet's paper says sign(0) = -1; PyTorch's sign(0) is 0.
  w_KN = np.float32([[1.0, -1.0], [0.0, 2.0], [-2.0, 0.0]])
  quantized = SPECS['binary'].quantize({'kernel': jnp.asarray(w_KN)})
  published = published_binary(torch.tensor(w_KN)).numpy()
  at_mean = w_KN == 0
  assert np.all(published[at_mean] == 0)
  assert np.all(np.asarray(quantized.dequantize())[at_mean] == -1)
  np.testing.assert_array_equal(
    quantized.dequantize()[~at_mean], published[~at_mean]
  )


def test_rows_beyond_the_last_four_unpack_as_minus_one():
  # Why the outputs of a packed layer are a multiple of 4 wide.
  codes_NK = torch.tensor([[1.0, 0.0], [-1.0, 1.0], [0.0, 0.0]])
  packed = bitnet.pack_weights(codes_NK.clone())
  unpacked = bitnet.unpack_weights(packed, torch.float32)
  np.testing.assert_array_equal(unpacked[:3], codes_NK)
  np.testing.assert_array_equal(unpacked[3:], -np.ones((1, 2)))
