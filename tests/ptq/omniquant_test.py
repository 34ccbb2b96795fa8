"""Learned clipping against its formula in float64."""

import dataclasses

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from configs.ptq import omniquant as config
from qat.ptq import omniquant
from qat.ptq import rtn


def options(**fields):
  made = omniquant.Options(**config.get_config().method.to_dict())
  return dataclasses.replace(made, **fields)


def example(seed=0, inputs=24, outputs=6):
  """Weights, one column of them of one sign, and u and l of groups of 8."""
  rng = np.random.default_rng(seed)
  w_KN = rng.normal(size=(inputs, outputs)).astype(np.float32)
  w_KN[:, 1] = np.abs(w_KN[:, 1])
  high, low = rng.normal(1.5, 1, (2, inputs // 8, 1, outputs)).astype('f4')
  return w_KN, (high, low)


def slow(w_KN, clip, bits, symmetric):
  """Codes and values of groups of 8, in float64, column by column."""
  codes, values = np.zeros(w_KN.shape), np.zeros(w_KN.shape)
  bottom, top = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
  for g in range(len(w_KN) // 8):
    rows = slice(8 * g, 8 * g + 8)
    for n in range(w_KN.shape[1]):
      w = np.float64(w_KN[rows, n])
      u, low = (np.float64(part[g, 0, n]) for part in clip)
      most = max(w.max(), 0) / (1 + np.exp(-u))
      least = min(w.min(), 0) / (1 + np.exp(-low))
      if symmetric:
        most = max(most, -least)
        least = -most
      scale = np.float64(np.float16((most - least) / (2**bits - 1)))
      zero = (
        0
        if symmetric
        else np.clip(np.round(bottom - least / scale), bottom, top)
      )
      codes[rows, n] = np.clip(np.round(w / scale) + zero, bottom, top)
      values[rows, n] = (codes[rows, n] - zero) * scale
  return codes, values


@pytest.mark.parametrize('symmetric', [False, True])
@pytest.mark.parametrize('bits', [2, 4])
def test_codes_and_values_are_the_formula_in_float64(bits, symmetric):
  w_KN, clip = example()
  made = options(bits=bits, group_size=8, symmetric=symmetric)
  found = omniquant.quantize(w_KN, clip, made)
  codes, values = slow(w_KN, clip, bits, symmetric)
  np.testing.assert_array_equal(found.codes, codes)
  np.testing.assert_allclose(found.dequantize(), values, rtol=1e-6)
  assert (found.zero is None) == symmetric
  assert np.any(codes == codes.min()) and found.alphabet == f'int{bits}'
  # What is trained has the same values.
  trained = omniquant.fake_quantize(w_KN, clip, made)
  np.testing.assert_allclose(trained, values, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('group_size', [0, 8])
def test_where_nothing_is_clipped_it_is_round_to_nearest(group_size):
  w_KN, _ = example()
  made = options(group_size=group_size, lwc_init=50.0)
  learned = omniquant.start('a', w_KN.shape, made)
  found = omniquant.quantize(w_KN, omniquant.clip(learned, 'a'), made)
  by = 'group' if group_size else 'channel'
  expected = rtn.quantize(w_KN, rtn.Options(4, by, group_size, False, False))
  jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_gradients_are_those_of_rounding_as_the_identity():
  w_KN, clip = example()
  made = options(bits=3, group_size=8)
  slope_KN = np.random.default_rng(5).normal(size=w_KN.shape).astype('f4')

  def total(w_KN, clip):
    return jnp.sum(slope_KN * omniquant.fake_quantize(w_KN, clip, made))

  dw_KN, (dhigh, dlow) = jax.grad(total, (0, 1))(jnp.asarray(w_KN), clip)
  for g in range(3):
    rows = slice(8 * g, 8 * g + 8)
    for n in range(w_KN.shape[1]):
      w, slope = np.float64(w_KN[rows, n]), np.float64(slope_KN[rows, n])
      shares = [1 / (1 + np.exp(-np.float64(part[g, 0, n]))) for part in clip]
      ends = max(w.max(), 0), min(w.min(), 0)
      scale = np.float64(
        np.float16((shares[0] * ends[0] - shares[1] * ends[1]) / 7)
      )
      zero = np.clip(np.round(-4 - shares[1] * ends[1] / scale), -4, 3)
      codes = np.round(w / scale) + zero
      inside = (codes >= -4) & (codes <= 3)
      # (c - z) s: with c = w / s + const inside, and c = an end outside.
      off = np.clip(codes, -4, 3) - zero
      dscale = np.sum(slope * np.where(inside, off - w / scale, off))
      for found, share, end, sign in zip(
        (dhigh, dlow), shares, ends, (1, -1), strict=True
      ):
        expected = dscale * sign * end * share * (1 - share) / 7
        assert found[g, 0, n] == pytest.approx(expected, rel=1e-3, abs=1e-6)
      # The ends of the range are weights, too: these have a part of dscale.
      middle = (w < w.max()) & (w > w.min())
      np.testing.assert_allclose(
        dw_KN[rows, n][middle], (slope * inside)[middle], rtol=1e-5
      )


def test_a_column_of_zeros_stays_zero_with_finite_gradients():
  w_KN = jnp.zeros((8, 2))
  clip = omniquant.clip(omniquant.start('a', (8, 2), options()), 'a')
  np.testing.assert_array_equal(
    omniquant.quantize(w_KN, clip, options()).dequantize(), 0
  )

  def total(clip):
    return jnp.sum(omniquant.fake_quantize(w_KN, clip, options()))

  assert np.all(np.isfinite(jax.grad(total)(clip)))


def test_a_smaller_range_is_better_for_weights_with_an_outlier():
  w_KN = np.random.default_rng(0).normal(size=(256, 1)).astype('f4')
  w_KN[0] = 6.0
  made = options(bits=2)

  def error(u):
    ends = np.full((1, 1, 1), u, np.float32)
    off = omniquant.quantize(w_KN, (ends, ends), made).dequantize() - w_KN
    return np.mean(np.square(off[1:]))

  assert error(0.0) < 0.7 * error(50.0)


@pytest.mark.parametrize(
  ('fields', 'expected'),
  [
    (dict(bits=5), 'bits=5'),
    (dict(group_size=7), 'group_size=7 .* 24 inputs'),
    (dict(epochs=-1), 'epochs=-1 must be at least 0'),
    (dict(alpha=1.5), 'alpha=1.5 must be from 0 to 1'),
    (dict(let_shift=True), 'let_shift=True with let=False'),
  ],
)
def test_options_that_do_not_fit_are_refused(fields, expected):
  with pytest.raises(ValueError, match=expected):
    omniquant.check(options(**fields), (24, 6))


def test_a_setting_changes_what_the_paper_changes():
  assert config.get_config('w2a16').method.aug_loss
  assert config.get_config('w4a4').activation == 'int4_asym'
  short = config.get_config('zeroqat-w4a4')
  assert short.latent and short.activation == 'int4_asym'
  assert short.method.epochs == 2 and short.method.lwc_init == 3.0
  assert short.method.let_v_ones
  assert not config.get_config('w4a4').latent
  with pytest.raises(ValueError, match="'w9'.*w4a16, w2a16, w4a4"):
    config.get_config('w9')
