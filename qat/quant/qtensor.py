"""A quantized array: codes, a scale, the name of the alphabet."""

import dataclasses
import functools

import jax
from jax import numpy as jnp
import numpy as np


def _float8() -> tuple[float, ...]:
  """All finite values of float8 e4m3fn, from -448 to 448."""
  every = np.arange(256, dtype=np.uint8).view(jnp.float8_e4m3fn)
  values = np.float32(every)
  return tuple(float(v) for v in np.unique(values[np.isfinite(values)]))


# Every value a code may take. A name, never a number of bits, says what a code
# means: two bits hold ternary codes as well as int2.
ALPHABETS: dict[str, tuple[float, ...]] = {
  'binary': (-1, 1),
  'binary_mix': (-1, 0, 1),  # 0: this weight stands in `exact`.
  'ternary': (-1, 0, 1),
  'odd2': (-3, -1, 1, 3),  # Four levels around 0, without one at it.
  'int2': tuple(range(-2, 2)),
  'int3': tuple(range(-4, 4)),
  'int4': tuple(range(-8, 8)),
  'int6': tuple(range(-32, 32)),
  'int8': tuple(range(-128, 128)),
  'fp8': _float8(),
}

# Bits that tell the codes of an alphabet apart, as papers count them. What a
# 'binary_mix' needs depends on the share of its exact weights.
BITS: dict[str, float] = {
  'binary': 1.0,
  'ternary': 1.58,
  'odd2': 2.0,
  'int2': 2.0,
  'int3': 3.0,
  'int4': 4.0,
  'int6': 6.0,
  'int8': 8.0,
  'fp8': 8.0,
}


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=('codes', 'scale', 'zero', 'exact'),
  meta_fields=('alphabet',),
)
@dataclasses.dataclass(frozen=True)
class QTensor:
  """(codes - zero) * scale + exact.

  An axis of `scale` and of `zero` is as long as that of `codes`, or 1, or the
  number of groups of neighbours, equally many each, that share an entry.

  Attributes:
    codes: int8, or float8_e4m3fn of 'fp8'; of the shape of the array it stands
      for.
    scale: float32; a quantizer that computes it never makes it zero.
    alphabet: a key of `ALPHABETS`.
    zero: the code of the value 0, of the shape of `scale`: int8, or float32
      where it lies between two codes; None: 0.
    exact: bfloat16 or float16, of the shape of `codes`: what is added to the
      quantized value, 0 but for weights that are not quantized (their code is
      `zero`), or for the rest of those that are kept; None: all are quantized.
  """

  codes: jax.Array
  scale: jax.Array
  alphabet: str
  zero: jax.Array | None = None
  exact: jax.Array | None = None

  @property
  def shape(self) -> tuple[int, ...]:
    """The shape of the array that is quantized."""
    return self.codes.shape

  def dequantize(self, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
    """The array that the codes stand for, rounded once."""
    values = self.codes.astype(jnp.float32)
    if self.zero is not None:
      values = values - spread(self.zero, self.shape).astype(jnp.float32)
    values = values * spread(self.scale, self.shape)
    if self.exact is not None:
      values = values + self.exact.astype(jnp.float32)
    return values.astype(dtype)


def spread(scale: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """A scale with its entry for each group repeated; broadcastable to `shape`.

  Args:
    scale: of as many axes as `shape`.
    shape: of the codes.
  """
  for axis, (have, want) in enumerate(zip(scale.shape, shape, strict=True)):
    if have not in (1, want):
      scale = jnp.repeat(scale, want // have, axis)
  return scale
