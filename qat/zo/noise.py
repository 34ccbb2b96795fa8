"""Normal numbers that a compiler can fuse into what uses them.

The same numbers as `jax.random.normal` gives with partitionable threefry keys,
element by element a function of the key and of the element's place. jax lowers
its generator on a CPU to a loop, whose states are several arrays of the size of
the result; written out, the whole generator can become a part of the loop over
the elements that adds the noise, stores nothing itself, and gives each device
the noise of its own part of a sharded array.
"""

import functools
import math

import jax
from jax import lax
from jax import numpy as jnp
import numpy as np

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = np.uint32(0x1BD11BDA)


@functools.partial(jax.jit, static_argnames='shape', inline=True)
def normal(
  key_data: jax.Array, shape: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
  """Standard normal numbers, and 32 random bits that they do not depend on.

  Args:
    key_data: uint32 `[2]`, of a threefry key; or `[L, 2]`, for each index of
      the first axis a key of its own.
    shape: of the result; `[L, ...]` with several keys.

  Returns:
    float32 and uint32 arrays of `shape`. Numbers are inverted from 23 bits, so
    none lies beyond +-5.5.

  Raises:
    ValueError: one key is to give more than 2**32 numbers.
  """
  high, low = _bits(key_data, shape)
  # 23 bits as the fraction of a float in [1, 2), moved to (-1, 1).
  one = np.uint32(0x3F800000)
  fraction = lax.bitcast_convert_type(
    ((high ^ low) >> np.uint32(9)) | one, jnp.float32
  ) - np.float32(1)
  least = np.nextafter(np.float32(-1), np.float32(0))
  uniform = jnp.maximum(least, fraction * (np.float32(1) - least) + least)
  return np.float32(np.sqrt(2)) * lax.erf_inv(uniform), high


def _bits(
  key_data: jax.Array, shape: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
  """Two independent uint32 arrays: threefry of the index of each element."""
  lead = key_data.ndim - 1
  own = shape[lead:]
  if math.prod(own) > 2**32:
    raise ValueError(
      f'An array of shape {own} has more elements than one key has counters,'
      ' 2**32; give each index of its first axis a key.'
    )
  strides = np.array(
    [math.prod(shape[axis + 1 :]) % 2**32 for axis in range(len(shape))],
    np.uint32,
  )
  # In a loop over keys, what depends on no key would be computed before it, and
  # stored: an array of indices, as large as the noise.
  key_data, strides = lax.optimization_barrier((key_data, strides))
  keys = key_data.reshape(*shape[:lead], *(1 for _ in own), 2)
  counter = jnp.zeros(shape, jnp.uint32)
  for axis in range(lead, len(shape)):
    index = lax.broadcasted_iota(jnp.uint32, shape, axis)
    counter = counter + index * strides[axis]
  return _threefry2x32(
    jnp.broadcast_to(keys[..., 0], shape),
    jnp.broadcast_to(keys[..., 1], shape),
    jnp.zeros(shape, jnp.uint32),
    counter,
  )


def _threefry2x32(
  key_0: jax.Array, key_1: jax.Array, x_0: jax.Array, x_1: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Threefry-2x32 with 20 rounds (Salmon et al. 2011, section 3.3)."""
  keys = (key_0, key_1, key_0 ^ key_1 ^ _PARITY)
  x_0, x_1 = x_0 + keys[0], x_1 + keys[1]
  for group in range(5):
    for rotation in _ROTATIONS[group % 2]:
      x_0 = x_0 + x_1
      left, right = np.uint32(rotation), np.uint32(32 - rotation)
      x_1 = x_0 ^ ((x_1 << left) | (x_1 >> right))
    x_0 = x_0 + keys[(group + 1) % 3]
    x_1 = x_1 + keys[(group + 2) % 3] + np.uint32(group + 1)
  return x_0, x_1
