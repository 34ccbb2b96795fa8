"""A quantized array: integer codes, a scale, the name of the alphabet."""

import dataclasses
import functools

import jax
from jax import numpy as jnp

# Every value a code may take. A name, never a number of bits, says what a code
# means: two bits hold ternary codes as well as int2.
ALPHABETS: dict[str, tuple[int, ...]] = {
  'binary': (-1, 1),
  'ternary': (-1, 0, 1),
  'int8': tuple(range(-128, 128)),
}

# Bits that tell the codes of an alphabet apart, as papers count them.
BITS: dict[str, float] = {'binary': 1.0, 'ternary': 1.58, 'int8': 8.0}


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=('codes', 'scale'),
  meta_fields=('alphabet',),
)
@dataclasses.dataclass(frozen=True)
class QTensor:
  """codes * scale.

  Attributes:
    codes: int8, of the shape of the array it stands for.
    scale: float32, broadcastable to `codes`, never zero.
    alphabet: a key of `ALPHABETS`.
  """

  codes: jax.Array
  scale: jax.Array
  alphabet: str

  @property
  def shape(self) -> tuple[int, ...]:
    """The shape of the array that is quantized."""
    return self.codes.shape

  def dequantize(self, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
    """The array that the codes stand for."""
    return (self.codes.astype(jnp.float32) * self.scale).astype(dtype)
