"""Packed arrays: nothing is lost, and every bit is counted."""

import json

import hypothesis
from hypothesis import strategies as st
import jax
from jax import numpy as jnp
import numpy as np
import pytest

from qat.quant import composed
from qat.quant import packing
from qat.quant import qtensor


def same(leaf, again) -> None:
  """Every array bit for bit, and everything else."""
  assert jax.tree.structure(leaf) == jax.tree.structure(again)
  for a, b in zip(jax.tree.leaves(leaf), jax.tree.leaves(again), strict=True):
    a, b = np.asarray(a), np.asarray(b)
    assert a.dtype == b.dtype and a.shape == b.shape
    assert a.tobytes() == b.tobytes()


def round_trip(leaf) -> None:
  arrays, meta = packing.pack(leaf)
  assert all(type(a) is np.ndarray for a in arrays.values())
  assert all(
    a.dtype.name in ('uint8', 'int8', 'uint16', 'float16', 'float32')
    for a in arrays.values()
  )
  again = packing.unpack(arrays, json.loads(json.dumps(meta)))
  same(leaf, again)


def codes(rng, alphabet: str, shape) -> np.ndarray:
  values = np.array(qtensor.ALPHABETS[alphabet])
  dtype = jnp.float8_e4m3fn if alphabet == 'fp8' else np.int8
  return rng.choice(values, shape).astype(dtype)


def tensor(rng, alphabet: str, shape, half=True, zero=None, exact=None):
  scale = rng.uniform(0.001, 1, (1, *shape[1:])).astype(np.float32)
  if half:
    scale = scale.astype(np.float16).astype(np.float32)
  if zero == 'int8':
    zero = rng.integers(-8, 8, scale.shape).astype(np.int8)
  elif zero == 'float32':
    zero = rng.normal(size=scale.shape).astype(np.float32)
  if exact is not None:
    kept = rng.random(shape) < 0.1
    exact = np.where(kept, rng.normal(size=shape), 0).astype(exact)
  return qtensor.QTensor(
    codes(rng, alphabet, shape), scale, alphabet, zero, exact
  )


@pytest.mark.parametrize('alphabet', qtensor.ALPHABETS)
@hypothesis.given(
  st.lists(st.integers(1, 9), min_size=1, max_size=3),
  st.integers(0, 99),
  st.booleans(),
  st.sampled_from([None, 'int8', 'float32']),
  st.sampled_from([None, jnp.bfloat16, np.float16]),
)
@hypothesis.settings(max_examples=15)
def test_a_qtensor_comes_back(alphabet, shape, seed, half, zero, exact):
  rng = np.random.default_rng(seed)
  round_trip(tensor(rng, alphabet, tuple(shape), half, zero, exact))


@hypothesis.given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 99))
@hypothesis.settings(max_examples=20)
def test_the_other_kinds_come_back(inputs, outputs, seed):
  rng = np.random.default_rng(seed)
  shape = (inputs, outputs)
  part = tensor(rng, 'int4', shape, zero='int8')
  round_trip(composed.Sum((part, tensor(rng, 'ternary', shape), part)))
  for clusters in (1, 2, 3, 5):
    round_trip(
      composed.Clustered(
        codes(rng, 'int3', shape),
        rng.integers(0, clusters, shape).astype(np.int8),
        rng.normal(size=(clusters, outputs)).astype(np.float32),
        rng.normal(size=(clusters, 1)).astype(np.float32),
        'int3',
      )
    )
  groups = -(-inputs // 8)
  bits_G = rng.integers(1, 9, groups).astype(np.int8)
  bits_K1 = np.repeat(bits_G, 8)[:inputs, None]
  low = np.where(bits_K1 == 1, 0, -(2 ** (bits_K1 - 1.0)))
  mixed = rng.integers(low, low + 2.0**bits_K1, shape).astype(np.int8)
  scale = rng.normal(size=(groups, outputs)).astype(np.float32)
  round_trip(composed.MixedBits(mixed, scale, np.floor(scale), bits_G, 8))
  round_trip(
    composed.Binarized(
      codes(rng, 'binary', shape),
      codes(rng, 'binary', shape),
      rng.random(inputs) < 0.2,
      rng.normal(size=(groups, 7, outputs)).astype(np.float32),
      8,
    )
  )


def levels(rng, bits: int, shape, parts: int) -> composed.Levels:
  base, step = np.float32(np.float16(rng.normal(size=(2, shape[0], parts))))
  codes = rng.integers(0, 2**bits, shape).astype(np.uint8)
  return composed.Levels(codes, base, step, bits)


@pytest.mark.slow
@hypothesis.given(
  st.integers(1, 12),
  st.integers(1, 5),
  st.integers(1, 4),
  st.sampled_from([None, *range(1, 9)]),
  st.sampled_from([None, *range(1, 9)]),
  st.sampled_from([None, jnp.bfloat16, np.float16]),
  st.integers(0, 99),
)
@hypothesis.settings(max_examples=40)
def test_two_levels_come_back(
  groups, neighbours, parts, scale_bits, zero_bits, exact, seed
):
  rng = np.random.default_rng(seed)
  shape = (groups, neighbours * parts)
  plain = tensor(rng, 'int3', (3 * groups, shape[1]), exact=exact)
  scale = rng.normal(size=shape).astype(np.float16).astype(np.float32)
  zero = rng.integers(-4, 4, shape).astype(np.int8)
  if scale_bits:
    scale = levels(rng, scale_bits, shape, parts)
  if zero_bits:
    zero = levels(rng, zero_bits, shape, parts)
  leaf = composed.TwoLevel(plain.codes, scale, 'int3', zero, plain.exact)
  round_trip(leaf)
  arrays, meta = packing.pack(leaf)
  again = packing.unpack(arrays, meta)
  np.testing.assert_array_equal(leaf.dequantize(), again.dequantize())


def test_the_bits_of_scales_that_have_codes():
  rng = np.random.default_rng(0)
  codes_KN = codes(rng, 'int4', (64, 32))
  leaf = composed.TwoLevel(
    codes_KN, levels(rng, 3, (4, 32), 2), 'int4', levels(rng, 5, (4, 32), 2)
  )
  # Codes; codes of two numbers a group; 4 * 2 bases and steps of each.
  expected = 4 * 64 * 32 + (3 + 5) * 4 * 32 + 2 * (16 + 16) * 4 * 2
  assert packing.stored_bits(leaf) == expected
  one = leaf.one_level()
  values = qtensor.QTensor(
    codes_KN, np.asarray(one.scale), 'int4', np.asarray(one.zero)
  )
  assert packing.stored_bits(values) == 4 * 64 * 32 + (16 + 16) * 4 * 32


@pytest.mark.parametrize(
  ('alphabet', 'bits'),
  [
    ('binary', 1),
    ('ternary', 1.6),
    ('odd2', 2),
    ('int2', 2),
    ('int3', 3),
    ('int4', 4),
    ('int8', 8),
    ('fp8', 8),
  ],
)
def test_the_bits_of_a_code(alphabet, bits):
  leaf = tensor(np.random.default_rng(0), alphabet, (80, 50))
  assert packing.stored_bits(leaf) == bits * 80 * 50 + 16 * 50


def test_scales_and_zero_points_are_stored_in_what_they_need():
  rng = np.random.default_rng(0)
  plain = tensor(rng, 'int4', (64, 32))
  bits = packing.stored_bits(plain)
  for zero, more in (
    (np.full((1, 32), -8, np.int8), 4),
    (np.full((1, 32), 7, np.float32), 4),
    (np.full((1, 32), 0.5, np.float32), 16),
    (np.full((1, 32), 0.1, np.float32), 32),
    (np.full((1, 32), 300, np.float32), 16),
    (np.full((1, 32), -0.0, np.float32), 16),
    (np.full((1, 32), np.nan, np.float32), 16),
    (np.full((1, 32), 1e9, np.float32), 32),
  ):
    leaf = qtensor.QTensor(plain.codes, plain.scale, 'int4', zero)
    round_trip(leaf)
    assert packing.stored_bits(leaf) == bits + more * 32
  scale = plain.scale + np.float32(1e-6)
  leaf = qtensor.QTensor(plain.codes, scale, 'int4')
  assert packing.stored_bits(leaf) == bits + 16 * 32


def test_an_exact_weight_costs_32_bits_and_a_mix_a_sign_for_the_others():
  rng = np.random.default_rng(0)
  shape = (640, 320)
  kept = rng.random(shape) < 0.004
  exact = np.where(kept, np.float16(0.5), np.float16(0))
  plain = tensor(rng, 'int2', shape)
  bits = packing.stored_bits(plain)
  leaf = qtensor.QTensor(plain.codes, plain.scale, 'int2', None, exact)
  assert packing.stored_bits(leaf) == bits + 32 * kept.sum()
  signs = np.where(kept, 0, codes(rng, 'binary', shape)).astype(np.int8)
  mix = qtensor.QTensor(signs, plain.scale, 'binary_mix', None, exact)
  round_trip(mix)
  expected = 640 * 320 + 16 * 320 + 32 * kept.sum()
  assert packing.stored_bits(mix) == expected
  # An exact weight of value 0: the positions no longer tell it.
  signs[~kept] = np.where(np.arange((~kept).sum()) == 5, 0, signs[~kept])
  mix = qtensor.QTensor(signs, plain.scale, 'binary_mix', None, exact)
  round_trip(mix)
  assert packing.stored_bits(mix) > 1.59 * 640 * 320


@pytest.mark.parametrize(
  'kept', [[], [0], [999_999], [0, 65535, 65536], [65534, 131_069, 999_999]]
)
def test_exact_weights_however_far_apart(kept):
  exact = np.zeros((1000, 1000), np.float16)
  exact.reshape(-1)[kept] = [-0.0, np.inf, 3.0][: len(kept)]
  zeros = np.zeros((1000, 1000), np.int8)
  scale = np.ones((1, 1), np.float32)
  leaf = qtensor.QTensor(zeros, scale, 'int2', None, exact)
  arrays, meta = packing.pack(leaf)
  assert arrays['exact'].size <= len(kept) + 16
  same(leaf, packing.unpack(arrays, meta))


def test_binarized_is_two_bits_and_its_levels():
  rng = np.random.default_rng(0)
  shape = (256, 64)
  levels = rng.normal(size=(2, 7, 64)).astype(np.float16).astype(np.float32)
  leaf = composed.Binarized(
    codes(rng, 'binary', shape),
    codes(rng, 'binary', shape),
    rng.random(256) < 0.1,
    levels,
    128,
  )
  assert packing.stored_bits(leaf) == 2 * 256 * 64 + 256 + 16 * 2 * 7 * 64


def test_codes_that_do_not_belong_are_refused():
  one = np.ones((1, 1), np.float32)
  for alphabet, code in (
    ('int3', 4),
    ('ternary', 2),
    ('binary', 0),
    ('odd2', 2),
    ('int2', -3),
    ('binary_mix', -2),
  ):
    bad = np.array([[1, code]], np.int8)
    with pytest.raises(ValueError, match=f'code.*{alphabet}'):
      packing.pack(qtensor.QTensor(bad, one, alphabet))
  mixed = composed.MixedBits(np.int8([[0], [2]]), one, one, np.int8([2]), 2)
  with pytest.raises(ValueError, match='2 bits needs more'):
    packing.pack(mixed)
  with pytest.raises(ValueError, match='cluster is 2'):
    packing.pack(
      composed.Clustered(
        np.int8([[1]]),
        np.int8([[2]]),
        np.ones((2, 1), np.float32),
        np.ones((2, 1), np.float32),
        'int2',
      )
    )
  for name in ('scale', 'zero'):
    numbers = {'scale': one, 'zero': one}
    numbers[name] = composed.Levels(np.uint8([[4]]), one, one, 2)
    bad = composed.TwoLevel(np.int8([[1]]), alphabet='int2', **numbers)
    with pytest.raises(ValueError, match=f'code of {name} is 4'):
      packing.pack(bad)
  with pytest.raises(ValueError, match='float16'):
    packing.pack(qtensor.QTensor(np.int8([[1]]), np.float16([[1]]), 'int2'))
  with pytest.raises(ValueError, match='ndarray'):
    packing.pack(one)


def test_a_file_that_lies_is_refused():
  leaf = tensor(np.random.default_rng(0), 'ternary', (10, 10), exact=np.float16)
  arrays, meta = packing.pack(leaf)
  with pytest.raises(ValueError, match='these weights need'):
    packing.unpack(arrays, meta | {'shape': [20, 10]})
  with pytest.raises(ValueError, match='alphabet'):
    packing.unpack(arrays, meta | {'stored_as': 'int5'})
  with pytest.raises(ValueError, match='Other'):
    packing.unpack(arrays, meta | {'kind': 'Other'})
  with pytest.raises(ValueError, match='five trits'):
    packing.unpack(arrays | {'codes': arrays['codes'] | 255}, meta)
  for distance in (arrays['distance'] + 60, arrays['distance'] * 0):
    with pytest.raises(ValueError, match='outside'):
      packing.unpack(arrays | {'distance': distance}, meta)
  rng = np.random.default_rng(0)
  both = (levels(rng, 3, (2, 8), 2) for _ in range(2))
  plain = codes(rng, 'int2', (4, 8))
  arrays, meta = packing.pack(
    composed.TwoLevel(plain, next(both), 'int2', next(both))
  )
  with pytest.raises(ValueError, match='these weights need'):
    packing.unpack(arrays | {'zero': arrays['zero'][:2]}, meta)


def test_a_million_weights_are_packed_in_pieces_and_come_back():
  rng = np.random.default_rng(0)
  round_trip(tensor(rng, 'int3', (1001, 1003)))


def test_jax_arrays_are_packed_and_numpy_arrays_dequantized():
  leaf = tensor(
    np.random.default_rng(0), 'int4', (6, 4), zero='int8', exact=jnp.bfloat16
  )
  again = packing.unpack(*packing.pack(jax.tree.map(jnp.asarray, leaf)))
  same(leaf, again)
  np.testing.assert_array_equal(leaf.dequantize(), again.dequantize())
