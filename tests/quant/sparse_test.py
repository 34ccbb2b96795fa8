"""Values and places of what is not 0."""

import hypothesis
from hypothesis import strategies as st
import numpy as np
import pytest

from qat.quant import sparse


@hypothesis.given(st.lists(st.integers(0, 65535), min_size=1, max_size=40))
def test_near_values_take_an_entry_each_and_come_back(numbers):
  values = np.uint16(numbers)
  kept = np.flatnonzero(values)
  stored, distance = sparse.pack(values, kept)
  assert stored.dtype == distance.dtype == np.uint16
  np.testing.assert_array_equal(stored, values[kept])
  np.testing.assert_array_equal(np.cumsum(distance) - 1, kept)
  again = sparse.unpack(stored, distance, (len(numbers), 1))
  np.testing.assert_array_equal(again[:, 0], values)


@pytest.mark.parametrize(
  ('place', 'entries'),
  [(65534, 1), (65535, 2), (131_069, 2), (131_070, 3), (199_999, 4)],
)
def test_a_far_value_is_walked_to(place, entries):
  values = np.zeros(200_000, np.uint16)
  values[place] = 7
  stored, distance = sparse.pack(values, np.array([place]))
  assert stored.size == entries
  again = sparse.unpack(stored, distance, (200_000,))
  np.testing.assert_array_equal(again, values)


@pytest.mark.parametrize('distance', [[0], [5], [2, 3]])
def test_a_place_that_is_none_is_refused(distance):
  stored = np.ones(len(distance), np.uint16)
  with pytest.raises(ValueError, match='outside of the 4'):
    sparse.unpack(stored, np.uint16(distance), (2, 2))
