"""Tests of qat.digest: every bit counts, however an array is split."""

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import ml_dtypes
import numpy as np
import pytest

from qat import digest

# numpy dtype, and bits of an element that mean something.
DTYPES = [
  (np.bool_, 1),
  (np.int8, 8),
  (np.uint16, 16),
  (np.int32, 32),
  (np.float16, 16),
  (ml_dtypes.bfloat16, 16),
  (np.float32, 32),
  (ml_dtypes.float8_e4m3fn, 8),
  (ml_dtypes.float8_e5m2, 8),
  (ml_dtypes.int4, 4),
  (ml_dtypes.uint4, 4),
  (ml_dtypes.int2, 2),
]


def of(x) -> str:
  return digest.as_hex(digest.digest(jnp.asarray(x)))


def reference(words: list[int]) -> str:
  """The definition, in Python's integers, one word after the other."""

  def mix(x):
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) % 2**32
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) % 2**32
    return x ^ (x >> 16)

  first = [
    mix(word ^ mix((i + 0x9E3779B9) % 2**32)) for i, word in enumerate(words)
  ]
  second = [mix(word ^ 0x7F4A7C15) for word in first]
  return f'{sum(first) % 2**32:08x}{sum(second) % 2**32:08x}'


def raw(rng: np.random.Generator, dtype, bits: int, shape) -> np.ndarray:
  """An array of random bits: NaNs, subnormals and all."""
  size = np.dtype(dtype).itemsize
  codes = rng.integers(0, 2**bits, shape).astype(f'u{size}')
  return codes.view(dtype)


def bits_of(x: np.ndarray, bits: int) -> np.ndarray:
  mask = np.uint64(2**bits - 1)  # int4 and smaller lie in a byte, extended.
  return x.view(f'u{x.dtype.itemsize}').astype(np.uint64) & mask


@pytest.mark.parametrize(('dtype', 'bits'), DTYPES)
def test_equals_the_definition(dtype, bits):
  x = raw(np.random.default_rng(0), dtype, bits, (3, 5, 2))
  words = [int(word) for word in bits_of(x, bits).ravel()]
  assert of(x) == reference(words)


@pytest.mark.parametrize(('dtype', 'bits'), DTYPES)
def test_every_flipped_bit_changes_it(dtype, bits):
  x = raw(np.random.default_rng(1), dtype, bits, (2, 3))
  seen = {of(x)}
  for i in range(x.size):
    for bit in range(bits):
      flipped = x.copy()
      codes = flipped.view(f'u{x.dtype.itemsize}')
      codes.flat[i] ^= codes.dtype.type(1 << bit)
      seen.add(of(flipped))
  assert len(seen) == 1 + x.size * bits


@pytest.mark.parametrize('dtype', [np.int64, np.float64])
def test_eight_bytes_are_two_words(dtype):
  with jax.enable_x64(True):
    x = raw(np.random.default_rng(2), dtype, 63, (7,))
    assert of(x) == reference([int(word) for word in x.view(np.uint32)])


def test_scalars_and_positions():
  assert of(jnp.int32(3)) == reference([3])
  assert of(np.float32([1, 2, 3])) != of(np.float32([2, 1, 3]))
  assert of(np.float32([0, 0])) != of(np.float32([0]))
  assert of(np.float32(0.0)) != of(np.float32(-0.0))


SPECS = [P(), P('b', 'a'), P(None, ('a', 'b'))]


@pytest.mark.parametrize('kind', [AxisType.Auto, AxisType.Explicit])
def test_does_not_depend_on_the_sharding(kind):
  x = np.random.default_rng(3).standard_normal((16, 8), np.float32)
  expected = of(x)
  for n in (8, 4):
    devices = np.array(jax.devices()[:n]).reshape(2, n // 2)
    mesh = jax.sharding.Mesh(devices, ('a', 'b'), axis_types=(kind, kind))
    for spec in SPECS:
      with jax.set_mesh(mesh):
        assert of(jax.device_put(x, NamedSharding(mesh, spec))) == expected


def test_gathers_nothing():
  mesh = jax.make_mesh((8,), ('a',), axis_types=(AxisType.Auto,))
  x = jax.ShapeDtypeStruct(
    (64, 64), jnp.float32, sharding=NamedSharding(mesh, P('a'))
  )
  text = digest.digest.lower(x).compile().as_text()
  assert 'all-reduce' in text
  assert 'all-gather' not in text and 'all-to-all' not in text


def test_refuses_what_has_no_plain_bits():
  for x in (jax.random.key(0), jnp.complex64(1j)):
    with pytest.raises(TypeError, match='has no digest'):
      of(x)
