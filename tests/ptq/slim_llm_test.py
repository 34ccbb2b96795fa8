"""SliM-LLM against its steps in float64, column after column."""

import dataclasses

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from qat.ptq import hessian
from qat.ptq import slim_llm
from qat.ptq import statistics
from qat.quant import packing
from tests import slow_gptq
from tests import tiny

K, N = 44, 6  # Five groups of 8 and one of 4.
PAPER = slim_llm.Options(
  bits=2,
  group_size=8,
  percdamp=0.01,
  salient_deviations=2.0,
  salient_weight=1.0,
  search_range=0.1,
  search_steps=10,
)


@pytest.fixture(autouse=True, scope='module')
def quickly():
  with tiny.compiled_quickly():
    yield


def inputs(tokens=120, seed=0):
  """Correlated, of unequal sizes, one always 0."""
  rng = np.random.default_rng(seed)
  mix_KK = np.eye(K) + 0.2 * rng.normal(size=(K, K))
  x_MK = rng.normal(size=(tokens, K)) @ mix_KK
  x_MK *= np.exp(0.7 * rng.normal(size=K))
  x_MK[:, K // 2] = 0
  return x_MK.astype(np.float32)


def matrix(seed=1):
  """Its third group of eight has larger weights than the others."""
  rng = np.random.default_rng(seed)
  w_KN = 0.02 * rng.standard_t(4, size=(K, N))
  w_KN[16:24] *= 3
  return w_KN.astype(np.float32)


def hard():
  """Columns that go wrong, after an ordinary one."""
  w_KN = matrix()
  w_KN[3, 1] *= 1000
  w_KN[:, 2] = 0
  w_KN[:, 3] = 0.25
  w_KN[:, 4] = np.abs(w_KN[:, 4]) * 1e-6
  w_KN[K // 2, 5] = 1e4  # Of the dead input.
  return w_KN


def quantize(w_KN, x_MK, options=PAPER, sample=40):
  of_inputs = statistics.of(jnp.asarray(x_MK), sample=sample)
  return slim_llm.quantize(jnp.asarray(w_KN), of_inputs, options)


# ------------------------------------------------------- the steps in float64


def slow_fit(W, U_J, bits, options, search=True):
  """Scale and zero of each row of a group of the paper's `W`."""
  if bits == 1:
    scale = np.maximum(slow_gptq.half(2 * np.abs(W).mean(1)), 2.0**-24)
    return scale, slow_gptq.half(0.5 - W.mean(1) / scale)
  salience = (W / U_J) ** 2
  edge = salience.mean() + options.salient_deviations * salience.std(ddof=1)
  weight = np.where(salience > edge, options.salient_weight, 1.0)
  n = options.search_steps if search else 0
  up = [1 + options.search_range * i / n for i in range(1, n + 1)]
  down = [1 - options.search_range * i / n for i in range(1, n + 1)]
  found = []
  for row, importance in zip(W, weight, strict=True):
    least, most = min(row.min(), 0), max(row.max(), 0)
    if least == most == 0:
      least, most = -1, 1
    best, smallest = None, np.inf
    for share in [1, *up, *down]:
      tried = slow_gptq.scale_and_zero(share * least, share * most, bits, False)
      error = np.abs(slow_gptq.level(row, *tried, bits) - row) ** 2.4
      if (importance * error).sum() < smallest:
        best, smallest = tried, (importance * error).sum()
    found.append(best)
  return tuple(np.array(part, np.float64) for part in zip(*found, strict=True))


def slow_level(W, scale, zero, bits):
  if bits > 1:
    return slow_gptq.level(W, scale, zero, bits)
  codes = np.clip(np.round(W / scale + zero), 0, 1)
  return (codes - zero) * scale


def slow_groups(options):
  size = options.group_size or K
  return [np.arange(a, min(a + size, K)) for a in range(0, K, size)]


def slow_bits(w_KN, x_MK, x_SK, options):
  """Bits of the groups, and the distance of the outputs for each i."""
  W = w_KN.T.astype(np.float64)
  _, dead, U = slow_gptq.hessian(x_MK, options.percdamp)
  W[:, dead] = 0
  groups = slow_groups(options)
  mean = [((W[:, g] / np.diag(U)[g]) ** 2).mean() for g in groups]
  order = np.argsort(mean, kind='stable')

  def log_softmax(y_SN):
    y_SN = y_SN - y_SN.max(1, keepdims=True)
    return y_SN - np.log(np.exp(y_SN).sum(1, keepdims=True))

  log_p = log_softmax(x_SK @ W.T)
  tried, distances = [], []
  for i in range(len(groups) // 2 + 1):
    bits = np.full(len(groups), options.bits)
    bits[order[:i]] -= 1
    bits[order[len(groups) - i :]] += 1
    Q = np.zeros_like(W)
    for columns, b in zip(groups, bits, strict=True):
      part = W[:, columns]
      scale, zero = slow_fit(part, np.diag(U)[columns], b, options, False)
      Q[:, columns] = slow_level(part, scale[:, None], zero[:, None], b)
    log_q = log_softmax(x_SK @ Q.T)
    tried.append(bits)
    distances.append((np.exp(log_q) * (log_q - log_p)).sum(1).mean())
  return tried[int(np.argmin(distances))], distances


def slow_solve(w_KN, x_MK, bits, options):
  """Values `[K, N]`, scales and zeros `[G, N]`."""
  W = w_KN.T.astype(np.float64)
  _, dead, U = slow_gptq.hessian(x_MK, options.percdamp)
  W[:, dead] = 0
  scales, zeros = [], []
  for columns, b in zip(slow_groups(options), bits, strict=True):
    scale, zero = slow_fit(W[:, columns], np.diag(U)[columns], b, options)
    scales.append(scale)
    zeros.append(zero)
    for j in columns:
      q = slow_level(W[:, j], scale, zero, b)
      error = (W[:, j] - q) / U[j, j]
      W[:, j] = q
      W[:, j + 1 :] -= np.outer(error, U[j, j + 1 :])
  return W.T, np.array(scales), np.array(zeros)


# ---------------------------------------------------------------------- tests


@pytest.mark.parametrize(
  'changes',
  [
    {},
    {'bits': 3, 'salient_weight': 4.0},
    {'bits': 4, 'group_size': 11, 'search_steps': 7, 'percdamp': 0.1},
    {'group_size': 0},
  ],
  ids=str,
)
def test_bits_values_and_scales_are_those_of_the_slow_steps(changes):
  options = dataclasses.replace(PAPER, **changes)
  w_KN, x_MK = matrix(), inputs()
  found = quantize(w_KN, x_MK, options)
  bits, distances = slow_bits(w_KN, x_MK, x_MK[:40], options)
  assert len(distances) == 1 or np.diff(np.sort(distances))[0] > 1e-5
  np.testing.assert_array_equal(found.bits_G, bits)
  values, scales, zeros = slow_solve(w_KN, x_MK, bits, options)
  np.testing.assert_allclose(found.scale, scales, rtol=2e-3)
  np.testing.assert_allclose(found.zero, zeros, rtol=2e-3, atol=2e-3)
  tolerance = 2e-3 * np.abs(values).max()
  np.testing.assert_allclose(found.dequantize(), values, atol=tolerance)
  assert tolerance < 0.45 * np.min(found.scale)


def test_some_groups_get_more_bits_and_as_many_get_fewer():
  """At 2 bits there are groups of 1 and of 3; the salient ones have more."""
  found = quantize(matrix(), inputs())
  bits_G = np.asarray(found.bits_G)
  assert bits_G[2] == 3
  assert (bits_G == 3).sum() == (bits_G == 1).sum() >= 1
  whole = np.asarray(found.codes)
  for g, bits in enumerate(bits_G):
    codes = whole[8 * g : 8 * g + 8]
    low = 0 if bits == 1 else -(2 ** (bits - 1))
    assert codes.min() >= low and codes.max() < low + 2**bits


def test_a_group_of_one_bit_has_two_levels_around_the_mean():
  w_KN, x_MK = matrix(), inputs()
  factor = hessian.factor(statistics.of(jnp.asarray(x_MK)), PAPER.percdamp)
  bits_G = jnp.asarray([1, 2, 2, 2, 2, 1], jnp.int8)
  found = slim_llm.solve(jnp.asarray(w_KN), factor, bits_G, PAPER)
  first_IN = np.asarray(found.dequantize())[:8]
  mean_N, size_N = w_KN[:8].mean(0), np.abs(w_KN[:8]).mean(0)
  for n in range(N):
    np.testing.assert_allclose(
      np.unique(first_IN[:, n]),
      [mean_N[n] - size_N[n], mean_N[n] + size_N[n]],
      atol=2e-3 * size_N[n],
    )


def test_errors_of_salient_weights_may_count_more():
  """With a great weight the search fits them, and the others go wrong."""
  rng = np.random.default_rng(3)
  w_IN = rng.normal(size=(64, 1)).astype(np.float32)
  salience_IN = np.ones((64, 1), np.float32)
  salient = np.array([5, 40])
  w_IN[salient, 0] = [0.9, -0.9]
  salience_IN[salient] = 50
  search = jax.jit(slim_llm._search, static_argnames='options')
  errors = {}
  for weight in (0.0, 1.0, 1e6):
    levels = search(
      jnp.asarray(w_IN),
      jnp.asarray(salience_IN),
      jnp.ones((64, 1), bool),
      jnp.int32(3),
      dataclasses.replace(PAPER, salient_weight=weight),
    )
    values = slow_gptq.level(w_IN, *map(np.asarray, levels), 3)
    error = np.abs(values - w_IN)[:, 0] ** 2.4
    errors[weight] = error[salient].sum(), np.delete(error, salient).sum()
  assert errors[1e6][0] < errors[1.0][0]
  assert errors[0.0][1] <= errors[1.0][1] < errors[1e6][1]


@pytest.mark.parametrize('bits', [2, 3])
def test_matrices_that_go_wrong_stay_finite(bits):
  x_MK = inputs()
  x_MK[:, 7] *= 1000
  w_KN = hard()
  found = quantize(w_KN, x_MK, dataclasses.replace(PAPER, bits=bits))
  values = np.asarray(found.dequantize())
  assert np.all(np.isfinite(values))
  np.testing.assert_array_equal(found.scale > 0, True)
  # A column of zeros, and the weights of an input that never came.
  np.testing.assert_allclose(values[:, 2], 0, atol=1e-6)
  groups = np.arange(K) // 8
  plain = np.asarray(found.bits_G)[groups] > 1
  if plain[K // 2]:
    np.testing.assert_array_equal(values[K // 2], 0)


def test_compensation_is_worth_it():
  """The outputs are closer than those of the same scales without GPTQ."""
  w_KN, x_MK = matrix(), inputs()
  found = quantize(w_KN, x_MK)
  group_K = np.arange(K) // 8
  plain = np.empty((K, N))
  for k in range(K):
    g = group_K[k]
    plain[k] = slow_level(
      np.float64(w_KN[k]),
      np.float64(found.scale[g]),
      np.float64(found.zero[g]),
      int(found.bits_G[g]),
    )
  H, dead, _ = slow_gptq.hessian(x_MK, PAPER.percdamp)
  plain[dead] = 0

  def error(values):
    d_KN = np.where(dead[:, None], 0, w_KN - values)
    return np.einsum('kn,kj,jn', d_KN, H, d_KN)

  assert error(np.float64(found.dequantize())) < error(plain)


def test_a_file_keeps_every_number():
  found = quantize(matrix(), inputs())
  assert len(np.unique(np.asarray(found.bits_G))) > 1
  back = packing.unpack(*packing.pack(jax.device_get(found)))
  for field in ('codes', 'scale', 'zero', 'bits_G'):
    np.testing.assert_array_equal(getattr(back, field), getattr(found, field))
  for name in ('scale', 'zero'):
    values = np.asarray(getattr(found, name))
    np.testing.assert_array_equal(values, slow_gptq.half(values))


@pytest.mark.parametrize(
  ('changes', 'expected'),
  [
    ({'bits': 1}, 'bits=1'),
    ({'bits': 8}, 'bits=8'),
    ({'group_size': -1}, 'group_size=-1'),
    ({'salient_weight': float('nan')}, 'salient_weight=nan'),
    ({'search_range': 1.0}, 'search_range=1.0'),
    ({'search_steps': -1}, 'search_steps=-1'),
  ],
)
def test_bad_options_are_refused(changes, expected):
  with pytest.raises(ValueError, match=expected):
    quantize(matrix(), inputs(), dataclasses.replace(PAPER, **changes))


def test_statistics_have_to_fit():
  with pytest.raises(ValueError, match='config.calibration.rows'):
    quantize(matrix(), inputs(), sample=0)
  with pytest.raises(ValueError, match='Statistics of 44 inputs for a matrix'):
    quantize(matrix()[:-1], inputs())
