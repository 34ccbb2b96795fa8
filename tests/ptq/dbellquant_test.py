"""DBellQuant's scales against its loop in float64."""

import dataclasses
import json

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from qat.ptq import billm
from qat.ptq import dbellquant
from qat.ptq import statistics
from tests import tiny

OPTIONS = dbellquant.Options(0.85, 0.01, 20, 32, 2, 0.0)


@pytest.fixture(autouse=True, scope='module')
def _compiled_quickly():
  with tiny.compiled_quickly():
    yield


def losses(t, w, power: int):
  """DTNP and DTMD of a block; the paper's matrix is the transpose of w."""
  s = w * t[:, None]
  m = s.mean(0)
  b = np.abs(s - m).mean(0)
  upper, lower = np.abs(s - (m + b)), np.abs(s - (m - b))
  d = np.minimum(upper, lower)
  target = np.where(upper < lower, m + b, m - b)
  with np.errstate(invalid='ignore', divide='ignore'):
    ratio = np.where(target == 0, 0, d / np.abs(target))
  return 100 * (ratio**power).mean(), d.mean()


def slope(t, w, power: int, dtmd_weight: float):
  """The gradient, by central differences."""

  def loss(t):
    dtnp, dtmd = losses(t, w, power)
    return dtnp + dtmd_weight * dtmd

  result = np.zeros_like(t)
  for j in range(t.size):
    h = 1e-6 * np.eye(t.size)[j]
    result[j] = (loss(t + h) - loss(t - h)) / 2e-6
  return result


def reference(absmax, w, options):
  """T of one layer, and how many steps each block took."""
  absmax, w = np.float64(absmax), np.float64(w)
  most = np.abs(w).max(1)
  t = np.maximum(
    absmax**options.epsilon / np.maximum(most, 1e-5) ** (1 - options.epsilon),
    1e-5,
  )
  t[(absmax == 0) | (most == 0)] = 1
  steps = []
  for begin in range(0, t.size, options.block_size):
    rows = slice(begin, begin + options.block_size)
    now, part = t[rows].copy(), w[rows]
    previous = best = np.inf
    for step in range(options.epochs + 1):
      if step == options.epochs:
        break
      dtnp, dtmd = losses(now, part, options.power)
      if dtmd > previous:
        break
      previous = dtmd
      now = now - options.lr * slope(
        now, part, options.power, options.dtmd_weight
      )
      total = dtnp + options.dtmd_weight * dtmd
      if total < best:
        best, t[rows] = total, now
    steps.append(step)
  return t, steps


def layer(case: str = 'plain'):
  rng = np.random.default_rng(2)
  w = 0.05 * rng.normal(size=(80, 24)) * np.exp(0.2 * rng.normal(size=(80, 1)))
  absmax = np.exp(0.2 * rng.normal(size=80))
  if case == 'dead':
    absmax[[0, 79]] = 0
    w[5] = 0
    w[:, 7] = 0  # An output without any weight.
  elif case == 'outliers':
    absmax[9] *= 1000
    w[3, 3] *= 1000
  elif case == 'constant':
    w[:] = w[:1]
  elif case == 'stops':
    absmax **= 8
  return np.float32(absmax), np.float32(w)


@pytest.mark.parametrize(
  'case', ['plain', 'dead', 'outliers', 'constant', 'stops']
)
def test_scales_and_steps_are_those_of_the_reference(case):
  absmax, w = layer(case)
  found, notes = dbellquant.train(jnp.asarray(absmax), jnp.asarray(w), OPTIONS)
  expected, steps = reference(absmax, w, OPTIONS)
  np.testing.assert_array_equal(notes['epochs'], steps)
  assert (min(steps) < OPTIONS.epochs) == (case == 'stops')
  np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
  'changes', [dict(power=1), dict(dtmd_weight=300.0), dict(epsilon=0.5)]
)
def test_options_are_those_of_the_reference(changes):
  absmax, w = layer()
  options = dataclasses.replace(OPTIONS, epochs=5, **changes)
  found, _ = dbellquant.train(jnp.asarray(absmax), jnp.asarray(w), options)
  expected, _ = reference(absmax, w, options)
  np.testing.assert_allclose(found, expected, rtol=2e-3, atol=1e-3)
  plain, _ = reference(absmax, w, dataclasses.replace(OPTIONS, epochs=5))
  assert np.abs(plain - expected).max() > 0.01


@pytest.mark.parametrize('dtmd_weight', [0.0, 300.0])
def test_losses_and_their_gradient(dtmd_weight):
  absmax, w = layer()
  t, w = absmax[:12], w[:12]
  padded = jnp.pad(jnp.asarray(w), ((0, 4), (0, 0)))
  real = jnp.arange(16) < 12
  wide = jnp.pad(jnp.asarray(t), (0, 4), constant_values=1)
  for power in (1, 2):
    *found, gradient = jax.jit(dbellquant.slope, static_argnums=(3, 4))(
      wide, padded, real, power, dtmd_weight
    )
    np.testing.assert_allclose(
      found, losses(np.float64(t), np.float64(w), power), rtol=1e-5
    )
    expected = slope(np.float64(t), np.float64(w), power, dtmd_weight)
    np.testing.assert_allclose(
      gradient[:12], expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max()
    )
    np.testing.assert_array_equal(gradient[12:], 0)


def relative_error(s) -> float:
  """Of one mean and scale for each output of a block."""
  m = s.mean(0)
  b = np.abs(s - m).mean(0)
  value = m + np.where(s > m, b, -b)
  return ((s - value) ** 2).sum() / (s**2).sum()


def test_the_loss_falls_and_so_does_the_error_of_binary_weights():
  # Inputs of unequal size: a diagonal cannot change the shape of equal ones.
  rng = np.random.default_rng(0)
  w = rng.normal(size=(16, 256)) * np.exp(0.5 * rng.normal(size=(16, 1)))
  absmax = np.exp(rng.normal(size=16))
  options = dataclasses.replace(OPTIONS, epochs=200)
  w, absmax = jnp.float32(w), jnp.float32(absmax)
  scale_K, notes = dbellquant.scales(absmax, [w], options)
  before = dbellquant.start(absmax, w, 0.85)
  every = jnp.ones(16, bool)
  first, _ = dbellquant.losses(before, w, every, 2)
  last, _ = dbellquant.losses(scale_K, w, every, 2)
  assert last < 0.8 * first
  (note,) = notes
  assert note['dtnp_start'] == pytest.approx(float(first), rel=1e-5)
  assert note['dtnp_end'] == pytest.approx(float(last), rel=1e-5)
  assert note['dtmd_least'] <= note['dtmd_start']
  assert 0 < note['epochs'] <= 200
  json.dumps(notes)
  w = np.asarray(w)
  assert relative_error(w * np.asarray(scale_K)[:, None]) <= relative_error(
    w * np.asarray(before)[:, None]
  )


def test_the_largest_scale_of_the_layers_is_taken_with_its_sign():
  absmax, w = layer()
  other = jnp.asarray(w[:, ::2] * 3)
  kernels = [jnp.asarray(w), other]
  both, notes = dbellquant.scales(jnp.asarray(absmax), kernels, OPTIONS)
  each = np.stack(
    [dbellquant.scales(jnp.asarray(absmax), [k], OPTIONS)[0] for k in kernels]
  )
  assert len(notes) == 2
  best = np.abs(each).argmax(0)
  assert 0 < best.sum() < 80
  np.testing.assert_array_equal(both, each[best, np.arange(80)])


@pytest.mark.parametrize('kind', ['rms', 'layer'])
def test_a_folded_norm_and_its_layers_give_what_they_gave(kind):
  absmax, w = layer('outliers')
  rng = np.random.default_rng(0)
  kernels = [jnp.asarray(w), jnp.asarray(w[:, :5] * 2)]
  norm = {'scale': jnp.float32(rng.normal(size=80))}
  if kind == 'layer':
    norm['bias'] = jnp.float32(rng.normal(size=80))
  scale_K, _ = dbellquant.scales(jnp.asarray(absmax), kernels, OPTIONS)
  folded, changed = dbellquant.fold(norm, kernels, scale_K)
  x = jnp.float32(rng.normal(size=(30, 80)))

  def outputs(norm, w_KN):
    normed = x * norm['scale'][None] + norm.get('bias', jnp.zeros(80))[None]
    return np.float64(normed) @ np.float64(w_KN)

  for w_KN, new_KN in zip(kernels, changed, strict=True):
    before = outputs(norm, w_KN)
    off = np.abs(outputs(folded, new_KN) - before)
    assert off.max() < 1e-4 * np.abs(before).max()
    assert np.abs(np.asarray(new_KN - w_KN)).max() > 0.01


def test_scaled_weights_are_binarized_with_less_error_in_the_outputs():
  rng = np.random.default_rng(0)
  w = 0.05 * rng.normal(size=(32, 64)) * np.exp(rng.normal(size=(32, 1)))
  x = rng.normal(size=(200, 32)) / np.exp(rng.normal(size=32))
  w, x = jnp.float32(w), jnp.float32(x)
  scale_K, _ = dbellquant.scales(
    jnp.max(jnp.abs(x), 0), [w], dataclasses.replace(OPTIONS, epochs=200)
  )
  options = billm.Options(16, 0.01, 8, 1)

  def error(w, x):
    q = billm.quantize(w, statistics.of(x), options).dequantize()
    return float(jnp.sum((x @ (q - w)) ** 2) / jnp.sum((x @ w) ** 2))

  assert error(w * scale_K[:, None], x / scale_K[None]) < error(w, x)


@pytest.mark.parametrize(
  ('field', 'value'),
  [
    ('epsilon', 1.5),
    ('lr', 0.0),
    ('epochs', -1),
    ('block_size', 0),
    ('power', 3),
    ('dtmd_weight', -1.0),
  ],
)
def test_options_that_there_are_none_of_are_refused(field, value):
  options = dataclasses.replace(OPTIONS, **{field: value})
  with pytest.raises(ValueError, match=f'{field}={value}'):
    dbellquant.scales(jnp.ones(4), [jnp.ones((4, 2))], options)


def test_kernels_of_other_inputs_are_refused():
  for kernels in ([], [jnp.ones((4, 2)), jnp.ones((5, 2))]):
    with pytest.raises(ValueError, match='4 inputs'):
      dbellquant.scales(jnp.ones(4), kernels, OPTIONS)
