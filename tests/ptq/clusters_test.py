"""One-dimensional 3-means, against all cuts and against Lloyd's algorithm."""

import hypothesis
from hypothesis import strategies as st
from jax import numpy as jnp
import numpy as np
import pytest

from qat.ptq import clusters


def cost(parts) -> float:
  """The sum of squared distances to the mean of each part."""
  return sum(((p - p.mean()) ** 2).sum() for p in parts if p.size)


def parts(w, cut):
  w = np.float64(np.asarray(w, np.float32)).reshape(-1)
  low, high = cut
  return w[w <= low], w[(w > low) & (w < high)], w[w >= high]


def least_cost(w) -> float:
  """The cost of the best two cuts, by trying all of them."""
  w = np.sort(np.float64(w).reshape(-1))
  places = range(w.size + 1)
  return min(
    cost((w[:i], w[i:j], w[j:])) for i in places for j in places if i <= j
  )


def cuts(w):
  return clusters.cuts(clusters.seen(clusters.narrow(w)))


@hypothesis.given(
  st.lists(
    st.one_of(st.integers(-3, 3), st.floats(-1e4, 1e4, width=16)),
    min_size=1,
    max_size=18,
  ),
  st.sampled_from([np.float32, np.float16, jnp.bfloat16]),
)
def test_no_two_cuts_are_better(values, dtype):
  w = np.array(values, dtype)
  found = parts(w, cuts(w))
  assert sum(p.size for p in found) == w.size
  best = least_cost(w)
  assert cost(found) <= best + 1e-9 * (1 + np.square(np.float64(w)).sum())


@pytest.mark.parametrize('dtype', [np.float32, jnp.bfloat16])
def test_many_weights_are_cut_where_no_lloyd_run_is_better(dtype):
  # Three humps and outliers, where a bad start ends elsewhere.
  rng = np.random.default_rng(0)
  w = rng.normal(size=100_000) + rng.choice([-9, -8, 0, 8], 100_000)
  w[:20] *= 100
  w = w.astype(dtype)
  found = cost(parts(w, cuts(w)))
  exact = np.float64(np.asarray(w, np.float32))
  for start in ([0.02, 0.5, 0.98], [0.2, 0.4, 0.6], [1e-5, 0.5, 0.99999]):
    means = np.quantile(exact, start)
    for _ in range(40):
      nearest = np.abs(exact[:, None] - means).argmin(1)
      counts = np.bincount(nearest, minlength=3)
      means = np.bincount(nearest, exact, 3) / np.maximum(counts, 1)
    groups = [exact[nearest == c] for c in range(3)]
    assert found <= cost(groups) * (1 + 1e-9)


def test_more_distinct_weights_than_cells_end_at_a_fixed_point():
  rng = np.random.default_rng(0)
  w = rng.normal(size=300_000).astype(np.float32)
  assert np.unique(w).size > clusters.WORDS
  lower, middle, upper = parts(w, cuts(w))
  first = (lower.mean() + middle.mean()) / 2
  second = (middle.mean() + upper.mean()) / 2
  assert lower.max() <= first <= middle.min()
  assert middle.max() <= second <= upper.min()
  # Of a normal distribution: 27, 46 and 27 %.
  assert lower.size / w.size == pytest.approx(0.27, abs=0.01)
  assert upper.size / w.size == pytest.approx(0.27, abs=0.01)


def test_sixteen_bits_are_found_again_in_float32():
  rng = np.random.default_rng(0)
  w = rng.normal(size=(30, 40)).astype(np.float32)
  assert clusters.narrow(w).dtype == np.float32
  for dtype in (jnp.bfloat16, np.float16):
    short = w.astype(dtype)
    assert clusters.narrow(short).dtype == dtype
    again = clusters.narrow(short.astype(np.float32))
    assert again.dtype == dtype
    assert again.tobytes() == short.tobytes()
    assert cuts(short) == cuts(jnp.asarray(short, jnp.float32))


def test_distinct_weights_are_counted():
  w = np.array([[3, -1, -1], [-0.0, 0, 3]], np.float32)
  for dtype in (np.float32, np.float16):
    seen = clusters.seen(w.astype(dtype))
    np.testing.assert_array_equal(
      np.repeat(seen.values, seen.counts), np.sort(w.reshape(-1))
    )
    if dtype == np.float16:
      np.testing.assert_array_equal(seen.words.view(dtype), seen.values)


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize('dtype', [np.float32, np.float16])
def test_weights_that_are_not_finite_are_refused(bad, dtype):
  w = np.array([[1.1, bad], [2, 3]], dtype)
  with pytest.raises(ValueError, match='not all finite'):
    cuts(w)
