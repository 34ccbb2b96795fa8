"""Packed weights: codes of few bits in planar bytes, and what undoes it.

The bytes of K input rows lie in blocks of L ('planar'): plane b of block n
holds the codes of the rows

  k = n * planes * L + b * L + r,   r = 0 .. L - 1

and byte r of the block has the code of every plane. So L neighbouring bytes,
shifted by one amount and masked, are L neighbouring rows; no kernel needs to
move a weight between lanes. A code is stored as its index from 0 on,

  code = step * index + low

and a byte is the sum of index_b * base^b: bits, pairs of bits, nibbles, or five
trits. Rows and columns that fill up a block have the index 0; the logical K and
N say what is real.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
from jax import lax
from jax import numpy as jnp


class Format(NamedTuple):
  """How a byte holds codes.

  Attributes:
    planes: codes in a byte.
    base: how many values an index has.
    step: distance of neighbouring codes.
    low: the code of index 0.
  """

  planes: int
  base: int
  step: int
  low: int

  @property
  def high(self) -> int:
    """The largest code."""
    return self.step * (self.base - 1) + self.low


FORMATS: dict[str, Format] = {
  '1bit': Format(8, 2, 2, -1),  # Codes -1 and 1.
  '2bit': Format(4, 4, 1, -2),  # int2; ternary codes are among them.
  'base3': Format(5, 3, 1, -1),  # Ternary, 1.6 bits; to store, not to multiply.
  'int4': Format(2, 16, 1, -8),
  'int8': Format(1, 256, 1, 0),  # The byte is the code, in two's complement.
}

BLOCK = 128  # L: the lanes of a TPU, so that a plane of inputs is a whole tile.


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=('data', 'scale'),
  meta_fields=('format', 'inputs', 'outputs', 'axis', 'block'),
)
@dataclasses.dataclass(frozen=True)
class Packed:
  """A matrix `[K, N]`, or a stack of them, in packed bytes.

  Attributes:
    data: int8; `[..., bytes, N]` for axis -2, `[..., N, bytes]` for axis -1.
    scale: float32 `[..., 1, 1]` or `[..., 1, N]`: value = code * scale.
    format: a key of `FORMATS`.
    inputs: K, without what fills up the last block.
    outputs: N, without what fills up.
    axis: of `data`, along which K lies.
    block: L, bytes of a block.
  """

  data: jax.Array
  scale: jax.Array
  format: str
  inputs: int
  outputs: int
  axis: int
  block: int

  @property
  def padded_inputs(self) -> int:
    """K with the rows that fill up the last block."""
    return self.data.shape[self.axis] * FORMATS[self.format].planes

  @property
  def padded_outputs(self) -> int:
    """N with the columns that fill up."""
    return self.data.shape[-3 - self.axis]


def pack(
  codes: jax.Array,
  scale: jax.Array,
  format: str,
  *,
  axis: int = -2,
  block: int = BLOCK,
  multiple: int = 1,
) -> Packed:
  """Packs codes; `unpack` gives them back, bit for bit.

  The codes are not looked at, so that this can be compiled: one that the format
  does not hold becomes another one. `check` looks.

  Args:
    codes: int8 `[..., K, N]`, any K and N.
    scale: float32 `[..., 1, 1]` or `[..., 1, N]`.
    format: a key of `FORMATS`.
    axis: -2 keeps N last, -1 turns the matrix: K, in bytes, is last.
    block: L, bytes of a block.
    multiple: N is filled up to a multiple of it.

  Raises:
    ValueError: no such format or axis, or a shape that does not fit.
  """
  if format not in FORMATS:
    raise ValueError(f'No format {format!r}; there are {list(FORMATS)}.')
  if axis not in (-2, -1):
    raise ValueError(f'axis={axis}; want -2 (N last) or -1 (K last).')
  if codes.ndim < 2 or codes.dtype != jnp.int8:
    raise ValueError(
      f'Codes are {codes.dtype}{codes.shape}; want int8 [..., K, N].'
    )
  *stack, inputs, outputs = codes.shape
  if scale.shape not in ((*stack, 1, 1), (*stack, 1, outputs)):
    raise ValueError(
      f'A scale of shape {scale.shape} for codes of shape {codes.shape}; packed'
      ' weights have one number, or one for each column, not one for a group.'
    )
  planes, base, step, low = FORMATS[format]
  index = codes
  if planes > 1:
    index = lax.div(codes - jnp.int8(low), jnp.int8(step))
  rest = -inputs % (planes * block), -outputs % multiple
  index = jnp.pad(index, ((0, 0),) * len(stack) + ((0, rest[0]), (0, rest[1])))
  if planes > 1:
    index = index.astype(jnp.uint8)
    index = index.reshape(*stack, -1, planes, block, outputs + rest[1])
    # A reduction: of a sum of slices XLA for GPUs writes every slice to memory.
    worth = jnp.asarray([base**b for b in range(planes)], jnp.uint8)
    worth = jnp.expand_dims(worth, (*range(len(stack) + 1), -2, -1))
    data = jnp.sum(index * worth, -3, dtype=jnp.int32)
    data = data.astype(jnp.uint8).reshape(*stack, -1, outputs + rest[1])
    index = lax.bitcast_convert_type(data, jnp.int8)
  data = index if axis == -2 else index.swapaxes(-1, -2)
  return Packed(
    data, scale.astype(jnp.float32), format, inputs, outputs, axis, block
  )


def unpack(packed: Packed) -> jax.Array:
  """The codes that were packed: int8 `[..., K, N]`."""
  data = packed.data
  if packed.axis == -1:
    data = data.swapaxes(-1, -2)
  planes, base, step, low = FORMATS[packed.format]
  if planes > 1:
    *stack, _, columns = data.shape
    data = lax.bitcast_convert_type(data, jnp.uint8)
    data = data.reshape(*stack, -1, packed.block, columns)
    index = jnp.stack([_digit(data, base, b) for b in range(planes)], axis=-3)
    index = index.astype(jnp.int8)
    data = index.reshape(*stack, -1, columns) * jnp.int8(step) + jnp.int8(low)
  return data[..., : packed.inputs, : packed.outputs]


def _digit(data: jax.Array, base: int, b: int) -> jax.Array:
  shifted = lax.div(data, lax.full_like(data, base**b))
  return lax.rem(shifted, lax.full_like(data, base))


def repack(
  packed: Packed,
  format: str | None = None,
  *,
  axis: int = -2,
  block: int = BLOCK,
  multiple: int = 1,
) -> Packed:
  """The same weights in another layout; None keeps the format."""
  return pack(
    unpack(packed),
    packed.scale,
    format or packed.format,
    axis=axis,
    block=block,
    multiple=multiple,
  )


def check(codes: jax.Array, format: str) -> None:
  """Raises a ValueError if a code is not one of the format's; not under jit."""
  held = FORMATS[format]
  if held.planes == 1:
    return
  fits = (codes >= held.low) & (codes <= held.high)
  if held.step > 1:
    fits &= (codes - held.low) % held.step == 0
  if not bool(jnp.all(fits)):
    wrong = int(codes[~fits][0])
    raise ValueError(
      f'{wrong} is no code of {format!r}: {held.low} to {held.high} in steps of'
      f' {held.step}.'
    )
