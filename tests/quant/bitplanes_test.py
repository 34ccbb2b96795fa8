"""Codes in bytes, bit by bit."""

import hypothesis
from hypothesis import strategies as st
import numpy as np
import pytest

from qat.quant import bitplanes


@hypothesis.given(st.integers(0, 8), st.integers(0, 40), st.integers(0, 9))
def test_bit_i_of_a_byte_is_that_of_the_ith_code(bits, size, seed):
  rng = np.random.default_rng(seed)
  codes = rng.integers(0, 2**bits, size).astype(np.uint8)
  packed = bitplanes.planes(codes, bits)
  assert packed.shape == (bits, -(-size // 8)) and packed.dtype == np.uint8
  for b in range(bits):
    for j in range(8 * packed.shape[1]):
      bit = int(packed[b, j // 8]) >> (j % 8) & 1
      assert bit == (int(codes[j]) >> b & 1 if j < size else 0)
  again = bitplanes.unplane(packed, bits, (size,))
  np.testing.assert_array_equal(again, codes)


@hypothesis.given(st.integers(0, 40), st.integers(0, 9))
def test_five_trits_to_a_byte(size, seed):
  codes = np.random.default_rng(seed).integers(0, 3, size).astype(np.uint8)
  packed = bitplanes.trits(codes)
  assert packed.shape == (-(-size // 5),)
  values = [
    sum(3**i * int(c) for i, c in enumerate(codes[j :: packed.size]))
    for j in range(packed.size)
  ]
  np.testing.assert_array_equal(packed, values)
  np.testing.assert_array_equal(bitplanes.untrit(packed, (size,)), codes)


def test_pieces_join():
  codes = np.random.default_rng(0).integers(0, 8, (3, 200_001), np.uint8)
  packed = bitplanes.planes(codes, 3)
  np.testing.assert_array_equal(
    bitplanes.unplane(packed, 3, codes.shape), codes
  )
  whole = [np.packbits(codes >> b & 1, bitorder='little') for b in range(3)]
  np.testing.assert_array_equal(packed, whole)


@pytest.mark.parametrize('bits', range(1, 9))
def test_signed_is_twos_complement(bits):
  codes = np.arange(2**bits)
  expected = np.where(codes < 2 ** (bits - 1), codes, codes - 2**bits)
  found = bitplanes.signed(codes.astype(np.uint8), bits)
  assert found.dtype == np.int8
  np.testing.assert_array_equal(found, expected)


def test_what_does_not_belong_is_refused():
  packed = bitplanes.planes(np.ones(20, np.uint8), 2)
  for bits, size in ((2, 30), (3, 20)):
    with pytest.raises(ValueError, match='these weights need'):
      bitplanes.unplane(packed, bits, (size,))
  with pytest.raises(ValueError, match='these weights need'):
    bitplanes.unplane(packed.astype(np.int8), 2, (20,))
  with pytest.raises(ValueError, match='five trits'):
    bitplanes.untrit(np.uint8([243]), (5,))
  with pytest.raises(ValueError, match='a thing is 7'):
    bitplanes.check_below(np.uint8([3, 7]), 7, 'a thing')
