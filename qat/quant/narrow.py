"""Codes of two and of four bits, several to a byte, read as one array.

For matrices that are carried through a training, where a number that takes part
in nothing but a product should not take a byte. jax has int2 and int4, whose
arrays no compiled program takes as arguments (jax 0.10).
"""

import dataclasses
import functools

import jax
from jax import numpy as jnp
import numpy as np

BITS = (2, 4)


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=('bytes',),
  meta_fields=('bits', 'width'),
)
@dataclasses.dataclass(frozen=True)
class Narrow:
  """Integers in two's complement, in the place of an int8 array of codes.

  It has what reads the codes of a quantized matrix: a shape, a dtype, `astype`.
  Unpacking is a function of each element by itself, which a compiler makes a
  part of the loop over the elements that reads them.

  Attributes:
    bytes: uint8 `[..., ceil(N / (8 / bits))]`; number i of a byte is in its
      bits i * `bits` and up, and the last byte is filled up with zeros.
    bits: of a number, one of `BITS`.
    width: N.
  """

  bytes: jax.Array
  bits: int
  width: int

  @property
  def shape(self) -> tuple[int, ...]:
    """Of the array that it stands for, `(..., N)`."""
    return (*self.bytes.shape[:-1], self.width)

  @property
  def ndim(self) -> int:
    """Number of axes."""
    return len(self.shape)

  @property
  def dtype(self) -> jnp.dtype:
    """int2 or int4; not what a product of int8 codes takes."""
    return jnp.dtype(f'int{self.bits}')

  def astype(self, dtype: jax.typing.DTypeLike) -> jax.Array | np.ndarray:
    """The numbers as an array; of NumPy, where the bytes are."""
    free = np.uint8(8 - self.bits)
    shifts = np.arange(0, 8, self.bits, dtype=np.uint8)
    shifts = shifts.reshape((1,) * self.bytes.ndim + (-1,))
    # To the top of the byte; from there the sign comes down.
    top = (self.bytes[..., None] >> shifts) << free
    signed = top.astype(np.int8) >> free.astype(np.int8)
    codes = signed.reshape(*self.bytes.shape[:-1], -1)[..., : self.width]
    return codes.astype(dtype)


def pack(codes: np.ndarray) -> Narrow | np.ndarray:
  """Codes in as few bits as hold all of them; as they are, if these are 8.

  Args:
    codes: int8 `[..., N]`, of NumPy.
  """
  bits = holding(int(codes.min()), int(codes.max()))
  if bits not in BITS:
    return codes
  made = shaped(codes.shape, bits)
  fill = made.bytes.shape[-1] * (8 // bits) - made.width
  index = codes.view(np.uint8) & np.uint8(2**bits - 1)
  index = np.pad(index, [(0, 0)] * (codes.ndim - 1) + [(0, fill)])
  index = index.reshape(*made.bytes.shape, 8 // bits)
  packed = np.zeros(made.bytes.shape, np.uint8)
  for i in range(8 // bits):
    packed |= index[..., i] << np.uint8(i * bits)
  return dataclasses.replace(made, bytes=packed)


def shaped(shape: tuple[int, ...], bits: int) -> Narrow:
  """What codes of a shape become, with a shape in the place of the bytes."""
  *lead, width = shape
  count = -(-width * bits // 8)
  return Narrow(jax.ShapeDtypeStruct((*lead, count), jnp.uint8), bits, width)


def holding(low: int, high: int) -> int:
  """The smallest of `BITS` that holds all from low to high; else 8."""
  for bits in BITS:
    if -(2 ** (bits - 1)) <= low and high < 2 ** (bits - 1):
      return bits
  return 8
