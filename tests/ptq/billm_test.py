"""BiLLM against its loops in float64."""

import dataclasses

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from qat.ptq import billm
from qat.ptq import hessian
from qat.ptq import statistics
from qat.quant import packing
from tests import tiny

OPTIONS = billm.Options(16, 0.01, 8, 2)


@pytest.fixture(autouse=True, scope='module')
def _compiled_quickly():
  with tiny.compiled_quickly():
    yield


def once(x, mask):
  """Mean and scale of the masked weights of each output, and their values."""
  value = np.zeros_like(x)
  for n in range(x.shape[1]):
    own = x[mask[:, n], n]
    if own.size:
      mean = own.mean()
      scale = np.abs(own - mean).mean()
      value[mask[:, n], n] = mean + np.where(own > mean, scale, -scale)
  return value


def binarized(x, mask, order: int):
  value = np.zeros_like(x)
  for _ in range(order):
    value += once(np.where(mask, x - value, 0), mask)
  return value


def search(saliency, count: int, threshold, rest_order: int):
  """The error of a number of salient inputs and of a threshold, if given."""
  order = np.argsort(-saliency.sum(1), kind='stable')
  salient = np.zeros(saliency.shape, bool)
  salient[order[:count]] = True
  if threshold is None:
    value = binarized(saliency, ~salient, rest_order)
  else:
    small = ~salient & (saliency < threshold)
    value = binarized(saliency, small, 1)
    value += binarized(saliency, ~salient & ~small, 1)
  value += binarized(saliency, salient, 2)
  return ((saliency - value) ** 2).sum()


def reference(w, gram, tokens, options, chosen):
  """The weights after quantization, given the masks that were chosen."""
  w, gram = np.float64(w), np.float64(gram) * 2 / tokens
  dead = np.diag(gram) == 0
  gram[dead, dead] = 1
  w[dead] = 0
  gram += np.eye(len(gram)) * options.percdamp * np.diag(gram).mean()
  root = np.linalg.cholesky(np.linalg.inv(gram)).T
  result = np.zeros_like(w)
  for start in range(0, len(w), options.block_size):
    rows = slice(start, start + options.block_size)
    block = w[rows].copy()
    salient = np.repeat(chosen.salient_K[rows, None], w.shape[1], 1)
    large = ~salient & (chosen.second[rows] > 0)
    value = binarized(block, salient, 2)
    value += binarized(block, large, 1)
    value += binarized(block, ~salient & ~large, 1)
    result[rows] = value
    error = (block - value) / np.diag(root)[rows, None]
    later = slice(start + options.block_size, None)
    w[later] -= root[rows, later].T @ error
  return result


def layer(rng, inputs: int, outputs: int, tokens: int = 200):
  mix = np.eye(inputs) + 0.3 * rng.normal(size=(inputs, inputs))
  x = rng.normal(size=(tokens, inputs)) @ mix * np.exp(rng.normal(size=inputs))
  w = 0.05 * rng.normal(size=(inputs, outputs))
  return np.float32(w), np.float32(x)


def adversarial(case: str):
  rng = np.random.default_rng(1)
  w, x = layer(rng, 40, 12)  # The last block has 8 inputs.
  if case == 'dead':
    x[:, [0, 17, 39]] = 0
    w[20] = 0
  elif case == 'constant':
    w[:, 3] = 0.25
    w[:, 4] = 0
  elif case == 'outliers':
    w[5, 2] *= 1000
    x[:, 30] *= 1000
  elif case == 'singular':
    x[:, 1:] = x[:, :1] * (1 + 1e-4 * x[:, 1:])
  return w, x


CASES = ('plain', 'dead', 'constant', 'outliers', 'singular')


@pytest.mark.parametrize('rest_order', [1, 2])
@pytest.mark.parametrize('case', CASES)
def test_the_first_block_is_cut_where_its_saliency_is_approximated_best(
  case, rest_order
):
  w, x = adversarial(case)
  options = dataclasses.replace(OPTIONS, rest_order=rest_order)
  factor = hessian.factor(statistics.of(jnp.asarray(x)), options.percdamp)
  diagonal = np.asarray(factor.diagonal_K)[:16, None]
  salient_B, large_BN = map(
    np.asarray,
    jax.jit(billm.masks, static_argnames='options')(
      jnp.asarray(w[:16]),
      jnp.asarray(diagonal[:, 0]),
      jnp.ones(16, bool),
      options,
    ),
  )
  saliency = (np.float64(w[:16]) / diagonal) ** 2
  count = salient_B.sum()
  assert 1 <= count < options.salient_limit
  score = saliency.sum(1)
  assert score[salient_B].min() >= score[~salient_B].max() * (1 - 1e-5)
  errors = [
    search(saliency, n, None, rest_order)
    for n in range(1, options.salient_limit)
  ]
  assert errors[count - 1] <= min(errors) * (1 + 1e-4)

  rest = saliency[~salient_B]
  thresholds = np.quantile(rest, np.linspace(0.1, 0.9, 81))
  errors = [search(saliency, count, t, 1) for t in thresholds]
  assert not large_BN[salient_B].any()
  large = large_BN[~salient_B]
  least = rest[large].min() if large.any() else np.inf
  assert not (~large & (rest > least * (1 + 1e-5))).any()
  assert search(saliency, count, least * (1 - 1e-6), 1) <= (
    min(errors) * (1 + 1e-4)
  )


@pytest.mark.parametrize('case', CASES)
def test_codes_are_a_partition_and_values_those_of_the_reference(case):
  w, x = adversarial(case)
  seen = statistics.of(jnp.asarray(x))
  found = billm.quantize(jnp.asarray(w), seen, OPTIONS)
  # Each weight has two bits, and so one of the three parts and a sign.
  for codes in (found.signs, found.second):
    assert found.shape == codes.shape == w.shape
    assert set(np.unique(codes)) <= {-1, 1}
  arrays, meta = packing.pack(found)
  assert arrays['levels'].dtype == np.float16
  np.testing.assert_array_equal(
    packing.unpack(arrays, meta).dequantize(), found.dequantize()
  )
  host = jax.tree.map(np.asarray, found)
  expected = reference(w, seen.gram_KK, len(x), OPTIONS, host)
  off = np.abs(np.asarray(found.dequantize()) - expected)
  # Levels have the 11 bits of float16, and errors feed on; a sign may flip
  # where a weight is as near to one level as to the other.
  size = np.abs(expected).max(1, keepdims=True) + np.abs(w).max()
  assert (off > 0.02 * size).mean() < 0.02


def test_one_weight_is_a_block():
  w, seen = jnp.float32([[0.3]]), statistics.of(jnp.ones((2, 1)))
  found = billm.quantize(w, seen, billm.Options(128, 0.01, 50, 1))
  np.testing.assert_allclose(found.dequantize(), w, rtol=1e-3)


def test_compensation_and_parts_make_outputs_better_than_signs():
  rng = np.random.default_rng(0)
  w, x = layer(rng, 40, 12, 400)
  w *= np.exp(rng.normal(size=(40, 1)))
  found = billm.quantize(jnp.asarray(w), statistics.of(jnp.asarray(x)), OPTIONS)
  plain = np.sign(w) * np.abs(w).mean(0)
  wanted = x @ w

  def error(q):
    return ((x @ np.asarray(q) - wanted) ** 2).sum() / (wanted**2).sum()

  assert error(found.dequantize()) < 0.6 * error(plain)
  # Two codes, and 7 levels of 16 bits for each of 3 blocks.
  stored = 2 * w.size + 40 + 3 * 7 * 16 * 12
  assert packing.stored_bits(found) == stored


@pytest.mark.parametrize(
  ('field', 'value'),
  [
    ('block_size', 0),
    ('percdamp', -1.0),
    ('salient_limit', 1),
    ('rest_order', 3),
  ],
)
def test_options_that_there_are_none_of_are_refused(field, value):
  options = dataclasses.replace(OPTIONS, **{field: value})
  with pytest.raises(ValueError, match=f'{field}={value}'):
    billm.check(options, (8, 8))


def test_statistics_of_another_layer_are_refused():
  seen = statistics.of(jnp.ones((3, 5)))
  with pytest.raises(ValueError, match='5 inputs'):
    billm.quantize(jnp.ones((4, 2)), seen, OPTIONS)
