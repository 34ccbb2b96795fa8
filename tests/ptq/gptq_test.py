"""GPTQ against the loop of its paper, and against rounding to nearest."""

import dataclasses

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from qat.ptq import gptq
from qat.ptq import hessian
from qat.ptq import rtn
from qat.ptq import statistics
from tests import slow_gptq

K, N = 36, 6
PAPER = gptq.Options(
  bits=3,
  group_size=0,
  symmetric=False,
  mse=False,
  percdamp=0.01,
  act_order=False,
  static_groups=False,
  block_size=16,  # K is no multiple.
)


def inputs(tokens=100, width=K, seed=0):
  """Correlated, of unequal sizes, one always 0."""
  rng = np.random.default_rng(seed)
  mix_KK = np.eye(width) + 0.3 * rng.normal(size=(width, width))
  x_MK = rng.normal(size=(tokens, width)) @ mix_KK
  x_MK *= np.exp(rng.normal(size=width))
  x_MK[:, width // 2] = 0
  return x_MK.astype(np.float32)


def matrix(width=K, columns=N, seed=1):
  rng = np.random.default_rng(seed)
  return (0.02 * rng.standard_t(4, size=(width, columns))).astype(np.float32)


def hard():
  """Columns that go wrong, after an ordinary one."""
  w_KN = matrix()
  w_KN[3, 1] *= 1000
  w_KN[:, 2] = 0
  w_KN[:, 3] = 0.25
  w_KN[:, 4] = np.abs(w_KN[:, 4]) * 1e-6
  w_KN[K // 2, 5] = 1e4  # Of the dead input.
  return w_KN


def quantize(w_KN, x_MK, options=PAPER, keep_KN=None):
  if keep_KN is not None:
    keep_KN = jnp.asarray(keep_KN)
  of_inputs = statistics.of(jnp.asarray(x_MK))
  return gptq.quantize(jnp.asarray(w_KN), of_inputs, options, keep_KN)


def error_N(w_KN, leaf, x_MK, percdamp=0.01):
  """(W - Q)^T H (W - Q) of each output: the damped error of its values."""
  H, *_ = slow_gptq.hessian(x_MK, percdamp)
  d_KN = np.float64(w_KN) - np.float64(leaf.dequantize())
  return np.einsum('kn,kj,jn->n', d_KN, H, d_KN)


@pytest.mark.parametrize(
  'changes',
  [
    {},
    {'bits': 2, 'mse': True},
    {'bits': 8, 'symmetric': True},
    {'group_size': 12, 'block_size': 8},  # Groups of three blocks of four.
    {'group_size': 4, 'mse': True, 'symmetric': True},
    {'group_size': 12, 'static_groups': True},
    {'group_size': 12, 'static_groups': True, 'act_order': True},
    {'act_order': True, 'bits': 4, 'block_size': 128},
  ],
  ids=str,
)
@pytest.mark.parametrize('masked', [False, True])
def test_values_and_scales_are_those_of_the_slow_loop(changes, masked):
  options = dataclasses.replace(PAPER, **changes)
  w_KN, x_MK = matrix(), inputs()
  keep_KN = None
  if masked:
    keep_KN = np.random.default_rng(5).random(w_KN.shape) < 0.1
  found = quantize(w_KN, x_MK, options, keep_KN)
  fields = dataclasses.asdict(options)
  del fields['block_size']
  values, scales, zeros, _ = slow_gptq.gptq(
    w_KN.T, x_MK, **fields, keep=None if keep_KN is None else keep_KN.T
  )
  assert found.alphabet == f'int{options.bits}'
  np.testing.assert_allclose(found.scale, scales.T, rtol=2e-3)
  if not options.symmetric:
    assert found.zero.dtype == jnp.int8
    np.testing.assert_array_equal(found.zero, zeros.T)
  tolerance = 2e-3 * np.abs(values).max()  # Far less than a step.
  np.testing.assert_allclose(found.dequantize(), values.T, atol=tolerance)
  assert tolerance < 0.5 * np.min(found.scale) or options.bits == 8
  if masked:
    assert found.exact.dtype == jnp.float16
    zero_KN = np.zeros(w_KN.shape)
    if not options.symmetric:
      zero_KN = np.repeat(found.zero, K // found.zero.shape[0], 0)
    np.testing.assert_array_equal(found.codes[keep_KN], zero_KN[keep_KN])
    np.testing.assert_array_equal(found.exact[~keep_KN], 0)
  else:
    assert found.exact is None


@pytest.mark.parametrize('make', [matrix, hard])
@pytest.mark.parametrize('tokens', [8, 100])  # Fewer than inputs, and more.
def test_outputs_are_nearer_than_those_of_rounding(make, tokens):
  w_KN, x_MK = make(), inputs(tokens)
  found = quantize(w_KN, x_MK)
  live_KN = np.where(np.arange(K)[:, None] == K // 2, 0, w_KN)
  plain = rtn.quantize(
    jnp.asarray(live_KN), rtn.Options(3, 'channel', 0, False, False)
  )
  np.testing.assert_array_equal(found.scale, plain.scale)  # The same grid.
  ours_N = error_N(live_KN, found, x_MK)
  theirs_N = error_N(live_KN, plain, x_MK)
  assert np.all(ours_N <= theirs_N * (1 + 1e-3))
  assert ours_N[0] < 0.8 * theirs_N[0]
  assert np.all(np.isfinite(found.dequantize()))


def test_weights_of_dead_inputs_become_zero_and_move_no_scale():
  w_KN, x_MK = matrix(), inputs()
  large_KN = w_KN.copy()
  large_KN[K // 2] = 1e4
  found, same = quantize(w_KN, x_MK), quantize(large_KN, x_MK)
  np.testing.assert_array_equal(found.dequantize()[K // 2], 0)
  np.testing.assert_array_equal(found.dequantize(), same.dequantize())


def test_inputs_without_correlation_are_rounded_to_nearest():
  w_KN = matrix()
  x_MK = np.eye(K, dtype=np.float32)
  plain = rtn.quantize(
    jnp.asarray(w_KN), rtn.Options(3, 'channel', 0, False, False)
  )
  found = quantize(w_KN, x_MK)
  np.testing.assert_array_equal(found.codes, plain.codes)


def test_the_block_size_changes_nothing():
  w_KN, x_MK = matrix(), inputs()
  codes = [
    quantize(w_KN, x_MK, dataclasses.replace(PAPER, block_size=size)).codes
    for size in (1, 16, 128)
  ]
  np.testing.assert_array_equal(codes[0], codes[1])
  np.testing.assert_array_equal(codes[0], codes[2])


def test_levels_stay_where_they_are():
  x_MK = inputs()
  options = dataclasses.replace(PAPER, bits=4)
  once = quantize(matrix(), x_MK, options)
  on_grid_KN = once.dequantize()
  again = quantize(on_grid_KN, x_MK, options)
  reached = (np.ptp(once.codes, 0) == 15) & (np.any(once.codes != 0, 0))
  assert reached.any()  # Columns whose range the levels still span.
  np.testing.assert_array_equal(
    np.asarray(again.dequantize())[:, reached],
    np.asarray(on_grid_KN)[:, reached],
  )


def test_a_mask_of_nothing_is_no_mask():
  w_KN, x_MK = matrix(), inputs()
  plain = quantize(w_KN, x_MK)
  masked = quantize(w_KN, x_MK, keep_KN=np.zeros(w_KN.shape, bool))
  np.testing.assert_array_equal(masked.exact, 0)
  np.testing.assert_array_equal(plain.codes, masked.codes)
  np.testing.assert_array_equal(plain.scale, masked.scale)


def test_a_mask_of_all_is_the_original():
  w_KN, x_MK = matrix(), inputs()
  x_MK[:, K // 2] = 1
  found = quantize(w_KN, x_MK, keep_KN=np.ones(w_KN.shape, bool))
  np.testing.assert_array_equal(found.dequantize(), np.float16(w_KN))


def test_kept_weights_absorb_the_errors_before_them():
  w_KN, x_MK = matrix(), inputs()
  keep_KN = np.zeros(w_KN.shape, bool)
  keep_KN[K - 1] = True
  found = quantize(w_KN, x_MK, keep_KN=keep_KN)
  moved_N = np.abs(found.dequantize()[K - 1] - w_KN[K - 1])
  assert np.all(moved_N > 1e-5) and moved_N.max() > 1e-2
  fixed_KN = np.array(found.dequantize())
  fixed_KN[K - 1] = w_KN[K - 1]
  H, *_ = slow_gptq.hessian(x_MK, 0.01)
  d_KN = fixed_KN - w_KN
  without_N = np.einsum('kn,kj,jn->n', d_KN, H, d_KN)
  live_KN = np.where(np.arange(K)[:, None] == K // 2, 0, w_KN)
  assert np.all(error_N(live_KN, found, x_MK) < without_N)


def test_one_factor_serves_layers_and_stacks_of_layers():
  w_SKN = jnp.stack([jnp.asarray(matrix(seed=s)) for s in (1, 2)])
  of_inputs = statistics.of(jnp.asarray(inputs()))
  factor = hessian.factor(of_inputs, PAPER.percdamp)
  both = jax.vmap(lambda w_KN: gptq.solve(w_KN, factor, PAPER))(w_SKN)
  for i, w_KN in enumerate(w_SKN):
    found = gptq.quantize(w_KN, factor, PAPER)
    alone = gptq.quantize(w_KN, of_inputs, PAPER)
    np.testing.assert_array_equal(found.codes, alone.codes)
    np.testing.assert_array_equal(both.codes[i], alone.codes)


def test_bad_options_and_statistics_are_refused():
  w_KN, x_MK = matrix(), inputs()
  for changes, message in (
    ({'bits': 5}, 'bits=5'),
    ({'block_size': 0}, 'block_size=0'),
    ({'group_size': 7}, 'group_size=7 does not divide the 36'),
    ({'group_size': 12, 'act_order': True}, 'needs static_groups=True'),
  ):
    with pytest.raises(ValueError, match=message):
      quantize(w_KN, x_MK, dataclasses.replace(PAPER, **changes))
  with pytest.raises(ValueError, match=r'36 inputs .* \(35, 6\)'):
    quantize(w_KN[1:], x_MK)
