"""A digest of an array's bits that does not depend on where its shards lie."""

import jax
import jax.numpy as jnp
import numpy as np

_UINTS = {
  2: jnp.uint2,
  4: jnp.uint4,
  8: jnp.uint8,
  16: jnp.uint16,
  32: jnp.uint32,
  64: jnp.uint32,  # As two words: the bitcast appends an axis of 2.
}


def check_dtype(dtype: jnp.dtype) -> None:
  """Raises a TypeError for a dtype whose elements have no digest."""
  _bits(dtype)


@jax.jit
def digest(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Sums over all elements of (a hash of the element's bits and position).

  The sums are modulo 2^32, so the order of adding, and with it the sharding,
  does not matter, and only two words leave the devices. At each position the
  hash is a bijection of the word there: no change of one element goes
  unnoticed, and a change of several does with a chance of 2^-64. It guards
  against faults, not against forgery.

  Args:
    x: an array of any shape, of bools, or of integers or floats of 2 to 64
      bits.

  Returns:
    Two uint32 scalars.

  Raises:
    TypeError: the dtype is none of these.
  """
  bits = _bits(x.dtype)
  x = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else x
  words = jax.lax.bitcast_convert_type(x, _UINTS[bits]).astype(jnp.uint32)
  position = jnp.zeros(words.shape, jnp.uint32)
  for axis, size in enumerate(words.shape):
    # Not one iota reshaped: this one is made where the shard is.
    iota = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    position = position * np.uint32(size % 2**32) + iota
  first = _mix(words ^ _mix(position + np.uint32(0x9E3779B9)))
  # Another bijection of the same word: the second half costs no second pass.
  second = _mix(first ^ np.uint32(0x7F4A7C15))
  return jnp.sum(first, dtype=jnp.uint32), jnp.sum(second, dtype=jnp.uint32)


def as_hex(words: tuple[jax.Array, jax.Array]) -> str:
  """Waits for what `digest` returned; 16 hexadecimal digits."""
  return ''.join(f'{int(word):08x}' for word in jax.device_get(words))


def _mix(x: jax.Array) -> jax.Array:
  """MurmurHash3's 32-bit finalizer (Appleby, 2011): a bijection of uint32."""
  x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
  x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
  return x ^ (x >> np.uint32(16))


def _bits(dtype: jnp.dtype) -> int:
  if dtype == jnp.bool_:
    return 8
  for kind, info in (jnp.integer, jnp.iinfo), (jnp.floating, jnp.finfo):
    if jnp.issubdtype(dtype, kind) and info(dtype).bits in _UINTS:
      return info(dtype).bits
  raise TypeError(
    f'An array of dtype {dtype} has no digest; plain integers, floats and '
    'bools have (jax.random.key_data of a key; real and imaginary part).'
  )
