"""Scores, the global threshold, and what GPTQ makes of it."""

from jax import numpy as jnp
import numpy as np
import pytest

from qat.ptq import gptq
from qat.ptq import statistics
from qat.ptq import tacq

PAPER = gptq.Options(
  bits=2,
  group_size=0,
  symmetric=False,
  mse=True,
  percdamp=0.01,
  act_order=False,
  static_groups=False,
  block_size=128,
)


def arrays(seed=0):
  rng = np.random.default_rng(seed)
  sizes = ((20, 30), (30, 7), (1, 1))
  return [rng.exponential(size=s).astype(np.float32) ** 4 for s in sizes]


def test_a_score_is_the_product_of_three_sizes():
  rng = np.random.default_rng(0)
  w, g, q = rng.normal(size=(3, 5, 4)).astype(np.float32)
  found = tacq.scores(jnp.asarray(w), jnp.asarray(g), jnp.asarray(q))
  expected = np.abs(w) * np.abs(g) * np.abs(q - w)
  np.testing.assert_allclose(found, expected, rtol=1e-5)
  half = tacq.scores(*(jnp.asarray(a, jnp.float16) for a in (w, g, q)))
  assert half.dtype == jnp.float32


@pytest.mark.parametrize('share', [0, 1e-4, 0.0035, 0.1, 0.5, 0.999, 1])
def test_the_highest_are_kept_exactly(share):
  scores = arrays()
  flat = np.concatenate([a.ravel() for a in scores])
  found = tacq.threshold([jnp.asarray(a) for a in scores], share)
  count = int(share * flat.size)
  highest = np.sort(flat)[::-1][:count]
  np.testing.assert_array_equal(np.sort(flat[flat > found])[::-1], highest)
  on_device = sum(int(jnp.sum(jnp.asarray(a) > found)) for a in scores)
  assert on_device == count


def test_of_equal_scores_none_is_kept_unless_all_are():
  scores = jnp.asarray(np.float32([5, 4, 3, 3, 3, 2, 0, 0, 0, 0]))
  for share, kept in ((0.2, 2), (0.3, 2), (0.4, 2), (0.5, 5), (0.8, 6)):
    assert int(jnp.sum(scores > tacq.threshold([scores], share))) == kept


def test_neighbouring_float32_numbers_are_told_apart():
  scores = np.float32(1) + np.arange(8, dtype=np.float32) * 2.0**-23
  assert tacq.threshold([jnp.asarray(scores)], 0.5) == float(scores[3])


def test_scores_that_cannot_be_are_refused():
  for value in (np.nan, np.inf, -1):
    with pytest.raises(ValueError, match='negative or not finite'):
      tacq.threshold([jnp.float32([1, value])], 0.5)
  with pytest.raises(ValueError, match='share=1.5'):
    tacq.threshold([jnp.ones(3)], 1.5)
  with pytest.raises(ValueError, match='No scores'):
    tacq.threshold([], 0.5)


def test_from_gptq_to_the_original_with_the_share():
  rng = np.random.default_rng(0)
  x_MK = rng.normal(size=(60, 20)) @ rng.normal(size=(20, 20))
  of_inputs = statistics.of(jnp.asarray(x_MK, jnp.float32))
  w_KN = jnp.asarray(0.1 * rng.normal(size=(20, 8)), jnp.float32)
  gradient_KN = jnp.asarray(rng.exponential(size=(20, 8)), jnp.float32)
  plain = gptq.quantize(w_KN, of_inputs, PAPER)
  scores_KN = tacq.scores(w_KN, gradient_KN, plain.dequantize())

  def kept(share):
    threshold = tacq.threshold([scores_KN], share)
    return gptq.quantize(w_KN, of_inputs, PAPER, scores_KN > threshold)

  np.testing.assert_array_equal(kept(0).dequantize(), plain.dequantize())
  np.testing.assert_array_equal(
    kept(1).dequantize(), np.float16(w_KN).astype(np.float32)
  )
  tenth = kept(0.1)
  assert int(jnp.sum(tenth.exact != 0)) == 16
  chosen_KN = np.asarray(tenth.exact != 0)
  assert scores_KN[chosen_KN].min() > scores_KN[~chosen_KN].max()
  loss = [
    float(jnp.sum(gradient_KN * jnp.abs(kept(s).dequantize() - w_KN)))
    for s in (0, 0.1, 0.5, 1)
  ]
  assert loss == sorted(loss, reverse=True)


def test_bits_are_counted_as_in_the_paper():
  assert tacq.average_bits(2, 0.0035) == pytest.approx(2.105)
  assert tacq.average_bits(3, 0.0035) == pytest.approx(3.1015)
  assert tacq.average_bits(4, 0) == 4
