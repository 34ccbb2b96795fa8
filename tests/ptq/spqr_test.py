"""SpQR against a slow loop, and against GPTQ."""

import dataclasses

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from qat.ptq import gptq
from qat.ptq import hessian
from qat.ptq import spqr
from qat.ptq import statistics
from qat.quant import composed
from qat.quant import packing
from qat.quant import qtensor
from tests import slow_gptq

K, N = 24, 8
PAPER = spqr.Options(
  bits=3,
  group_size=6,
  scale_bits=3,
  zero_bits=3,
  second_group_size=4,
  outlier_threshold=0.1,
  simplified_outliers=False,
  percdamp=0.01,
  act_order=False,
  block_size=4,
)
PLAIN = dataclasses.replace(
  PAPER, scale_bits=0, zero_bits=0, outlier_threshold=0.0
)


def inputs(tokens=80, seed=0):
  rng = np.random.default_rng(seed)
  mix_KK = np.eye(K) + 0.3 * rng.normal(size=(K, K))
  x_MK = rng.normal(size=(tokens, K)) @ mix_KK * np.exp(rng.normal(size=K))
  x_MK[:, 7] = 0
  return x_MK.astype(np.float32)


def matrix(seed=1):
  rng = np.random.default_rng(seed)
  w_KN = 0.02 * rng.standard_t(3, size=(K, N))
  w_KN[2, 3] = 0.4
  return w_KN.astype(np.float32)


def quantize(w_KN, x_MK, options):
  of_inputs = statistics.of(jnp.asarray(x_MK))
  return spqr.quantize(jnp.asarray(w_KN), of_inputs, options)


def error(w_KN, leaf, x_MK):
  H, dead_K, _ = slow_gptq.hessian(x_MK, 0.01)
  d_KN = np.float64(w_KN) - np.float64(leaf.dequantize())
  d_KN[dead_K] = 0
  return np.einsum('kn,kj,jn->', d_KN, H, d_KN)


def slow_second_level(values_N, bits, size):
  out = []
  for part in values_N.reshape(-1, size):
    base = slow_gptq.half(part.min())
    step = max(slow_gptq.half((part.max() - base) / (2**bits - 1)), 2.0**-24)
    codes = np.clip(np.round((part - base) / step), 0, 2**bits - 1)
    out.append(slow_gptq.half(base + codes * step))
  return np.concatenate(out)


def slow_gains(W_NI, diagonal_I, bits):
  """Drops each weight in turn, and fits a grid to the others."""

  def error_of(row, diagonal):
    scale, _ = slow_gptq.fit_row(row, bits, False, False)
    zero = -(2 ** (bits - 1)) - min(row.min(), 0) / scale
    levels = slow_gptq.level_of(
      row, np.full(row.shape, scale), np.full(row.shape, zero), bits
    )
    return (((levels - row) / diagonal) ** 2).sum()

  return np.array(
    [
      [
        error_of(row, diagonal_I)
        - error_of(np.delete(row, i), np.delete(diagonal_I, i))
        for i in range(len(row))
      ]
      for row in W_NI
    ]
  )


def slow_spqr(w_KN, x_MK, options):
  _, dead_K, U = slow_gptq.hessian(x_MK, options.percdamp)
  W = np.where(dead_K[:, None], 0, w_KN).T.astype(np.float64)
  order = np.arange(K)
  if options.act_order:
    H, *_ = slow_gptq.hessian(x_MK, options.percdamp)
    order = np.argsort(-np.diag(H), kind='stable')
    U = np.linalg.cholesky(np.linalg.inv(H[order][:, order])).T
  diagonal = np.zeros(K)
  diagonal[order] = np.diag(U)
  limit = np.mean(W.var(0, ddof=1) / diagonal**2) * options.outlier_threshold

  def fit_group(W, columns, diagonal):
    del columns
    if options.outlier_threshold and not options.simplified_outliers:
      likely = slow_gains(W, diagonal, options.bits) > limit
      W = slow_gptq.replaced(W, likely)
    scale, _ = slow_gptq.fit(W, options.bits)
    if options.scale_bits:
      scale = slow_second_level(
        scale, options.scale_bits, options.second_group_size
      )
    low, high = -(2 ** (options.bits - 1)), 2 ** (options.bits - 1) - 1
    zero = np.clip(low - np.minimum(W.min(1), 0) / scale, low, high)
    if options.zero_bits:
      zero = slow_second_level(
        zero, options.zero_bits, options.second_group_size
      )
    else:
      zero = np.round(zero)
    return scale, zero

  def is_kept(w, q, column, u):
    del column
    if not options.outlier_threshold:
      return np.zeros(w.shape, bool)
    return ((w - q) / u) ** 2 > limit

  return slow_gptq.gptq(
    w_KN.T,
    x_MK,
    bits=options.bits,
    group_size=options.group_size,
    symmetric=False,
    mse=False,
    percdamp=options.percdamp,
    act_order=options.act_order,
    static_groups=options.act_order,
    fit_group=fit_group,
    is_kept=is_kept,
  )


@pytest.mark.parametrize(
  'changes',
  [
    {},
    {'zero_bits': 0, 'bits': 2},
    {'scale_bits': 0, 'simplified_outliers': True},
    {'act_order': True},
    {'group_size': 0, 'scale_bits': 8, 'zero_bits': 8, 'bits': 4},
    {'outlier_threshold': 0.0},
  ],
  ids=str,
)
def test_values_and_outliers_are_those_of_the_slow_loop(changes):
  options = dataclasses.replace(PAPER, **changes)
  w_KN, x_MK = matrix(), inputs()
  found = quantize(w_KN, x_MK, options)
  values, scales, zeros, kept = slow_spqr(w_KN, x_MK, options)
  assert type(found) is composed.TwoLevel
  for numbers, bits in (
    (found.scale, options.scale_bits),
    (found.zero, options.zero_bits),
  ):
    assert isinstance(numbers, composed.Levels) == bool(bits)
    if bits:
      assert numbers.bits == bits and np.max(numbers.codes) == 2**bits - 1
      assert numbers.step.shape == (len(scales.T), N // 4)
  plain = found.one_level()
  np.testing.assert_allclose(plain.scale, scales.T, rtol=2e-3)
  np.testing.assert_allclose(plain.zero, zeros.T, atol=1e-2)
  assert plain.zero.dtype == (jnp.float32 if options.zero_bits else jnp.int8)
  np.testing.assert_allclose(found.dequantize(), values.T, atol=2e-3)
  if not options.outlier_threshold:
    assert found.exact is None
    return
  assert found.exact.dtype == jnp.float16
  np.testing.assert_array_equal(found.exact != 0, kept.T)
  assert 0 < kept.mean() < 0.2


def test_nothing_kept_and_nothing_rounded_further_is_gptq():
  w_KN, x_MK = matrix(), inputs()
  ours = quantize(w_KN, x_MK, PLAIN)
  options = gptq.Options(
    bits=3,
    group_size=6,
    symmetric=False,
    mse=False,
    percdamp=0.01,
    act_order=False,
    static_groups=False,
    block_size=4,
  )
  theirs = gptq.quantize(
    jnp.asarray(w_KN), statistics.of(jnp.asarray(x_MK)), options
  )
  assert type(ours) is qtensor.QTensor
  np.testing.assert_array_equal(ours.codes, theirs.codes)
  np.testing.assert_array_equal(ours.scale, theirs.scale)
  np.testing.assert_array_equal(ours.zero, theirs.zero)


def test_a_few_kept_weights_make_the_outputs_nearer():
  w_KN, x_MK = matrix(), inputs()
  errors = []
  for threshold in (0.0, 0.1, 0.02):
    options = dataclasses.replace(PLAIN, outlier_threshold=threshold)
    errors.append(error(w_KN, quantize(w_KN, x_MK, options), x_MK))
  assert errors == sorted(errors, reverse=True)
  assert errors[2] < 0.3 * errors[0]


def test_matrices_that_go_wrong_elsewhere():
  w_KN, x_MK = matrix(), inputs(6)  # Fewer tokens than inputs.
  w_KN[:, 4] = 0
  w_KN[:, 5] = 0.25
  w_KN[6:12, :4] = 0  # A group of zeros in all of a second-level group.
  w_KN[:, 6] *= 1e-6
  w_KN[20, 0] *= 1000
  found = quantize(w_KN, x_MK, PAPER)
  assert np.all(np.isfinite(found.dequantize()))
  assert np.all(found.scale.values() > 0)
  assert found.codes.min() >= -4 and found.codes.max() <= 3


def test_removal_gains_are_those_of_dropping_each_weight():
  w_IN = matrix()[:9]
  diagonal_I = np.linspace(0.5, 2, 9).astype(np.float32)
  gains = jax.jit(spqr.removal_gains, static_argnames='bits')
  found = gains(jnp.asarray(w_IN), jnp.asarray(diagonal_I), 3)
  expected = slow_gains(w_IN.T.astype(np.float64), diagonal_I, 3).T
  np.testing.assert_allclose(found, expected, rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize('bits', [1, 3, 8])
def test_second_level_values_are_few_and_near(bits):
  rng = np.random.default_rng(0)
  values_1N = np.exp(rng.normal(size=(1, 32))).astype(np.float32) * 1e-2
  values_1N[0, 8:16] = 0.5
  found = spqr.second_level(jnp.asarray(values_1N), bits, 8).values()
  np.testing.assert_array_equal(found, np.float16(found))
  expected = slow_second_level(values_1N[0].astype(np.float64), bits, 8)
  np.testing.assert_allclose(found[0], expected, rtol=2e-3)
  for part, found_part in zip(
    values_1N.reshape(-1, 8), np.reshape(found, (-1, 8)), strict=True
  ):
    assert len(np.unique(found_part)) <= 2**bits
    step = np.ptp(part) / (2**bits - 1)
    assert np.abs(part - found_part).max() <= 0.51 * step + 1e-3 * part.max()
  assert np.all(np.asarray(found) > 0)


def test_one_factor_serves_layers_that_read_the_same():
  of_inputs = statistics.of(jnp.asarray(inputs()))
  factor = hessian.factor(of_inputs, PAPER.percdamp)
  w_KN = jnp.asarray(matrix())
  np.testing.assert_array_equal(
    spqr.quantize(w_KN, factor, PAPER).codes,
    spqr.quantize(w_KN, of_inputs, PAPER).codes,
  )


def test_bits_are_counted_as_in_the_paper():
  # 4 + (3 + 3) / 16 + 64 / (16 * 16) + 32 * share.
  options = dataclasses.replace(
    PAPER, bits=4, group_size=16, second_group_size=16
  )
  assert spqr.average_bits(options, 4096, 0.0) == pytest.approx(4.625)
  assert spqr.average_bits(options, 4096, 0.01) == pytest.approx(4.945)
  whole = dataclasses.replace(PLAIN, group_size=0)
  assert spqr.average_bits(whole, 38, 0.0) == pytest.approx(3.5)


@pytest.mark.parametrize(
  'changes',
  [{}, {'zero_bits': 0, 'outlier_threshold': 0.0}, {'scale_bits': 0}],
  ids=str,
)
def test_what_a_file_takes_is_what_the_paper_counts(changes):
  rng = np.random.default_rng(0)
  options = dataclasses.replace(
    PAPER,
    bits=4,
    group_size=16,
    second_group_size=16,
    outlier_threshold=0.2,
    simplified_outliers=True,
    block_size=64,
  )
  options = dataclasses.replace(options, **changes)
  w_KN = np.float32(0.02 * rng.standard_t(4, size=(256, 96)))
  leaf = quantize(w_KN, rng.normal(size=(300, 256)), options)
  share = 0.0 if leaf.exact is None else float(np.mean(leaf.exact != 0))
  assert share < 0.05 and bool(share) == bool(options.outlier_threshold)
  found = packing.stored_bits(leaf) / w_KN.size
  counted = spqr.average_bits(options, 256, share)
  assert found == pytest.approx(counted, abs=0.01)


def test_bad_options_are_refused():
  for changes, message in (
    ({'bits': 5}, 'bits=5'),
    ({'scale_bits': 9}, 'scale_bits=9'),
    ({'zero_bits': -1}, 'zero_bits=-1'),
    ({'block_size': 0}, 'block_size=0'),
    ({'outlier_threshold': -0.1}, 'outlier_threshold=-0.1'),
    ({'group_size': 7}, 'group_size=7 does not divide the 24'),
    ({'second_group_size': 3}, 'second_group_size=3 does not divide the 8'),
  ):
    with pytest.raises(ValueError, match=message):
      quantize(matrix(), inputs(), dataclasses.replace(PAPER, **changes))
