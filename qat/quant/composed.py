"""Weights that quantization after training leaves, beyond one QTensor.

Each is a pytree that can stand as 'kernel' in a parameter tree, as a QTensor
can: it has `shape`, and `dequantize` gives the matrix that the layer multiplies
by. Scales are float32 arrays here, or Levels; what a file keeps of them, and in
how many bits, is `packing`'s.
"""

import dataclasses
import functools

import jax
from jax import numpy as jnp

from qat.quant import float16
from qat.quant import packed
from qat.quant import qtensor


def _pytree(*data: str, meta: tuple[str, ...] = ()):
  return functools.partial(
    jax.tree_util.register_dataclass, data_fields=data, meta_fields=meta
  )


@_pytree('parts')
@dataclasses.dataclass(frozen=True)
class Sum:
  """Several layers of one shape whose outputs are added (SplitQuant)."""

  parts: tuple[qtensor.QTensor, ...]

  @property
  def shape(self) -> tuple[int, ...]:
    """The shape of the matrix, `(K, N)`."""
    return self.parts[0].shape

  def dequantize(self, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
    """The sum of the parts, rounded once."""
    values = self.parts[0].dequantize()
    for part in self.parts[1:]:
      values = values + part.dequantize()
    return values.astype(dtype)


@_pytree('codes', 'cluster', 'scale', 'zero', meta=('alphabet',))
@dataclasses.dataclass(frozen=True)
class Clustered:
  """(codes - zero[cluster]) * scale[cluster]: a grid for each cluster.

  Attributes:
    codes: int8 `[K, N]`.
    cluster: int8 `[K, N]`, below C.
    scale: float32 `[C, 1 or N]`.
    zero: float32 `[C, 1 or N]`; not an integer where a cluster's grid does not
      contain 0.
    alphabet: of the codes, a key of `qtensor.ALPHABETS`.
  """

  codes: jax.Array
  cluster: jax.Array
  scale: jax.Array
  zero: jax.Array
  alphabet: str

  @property
  def shape(self) -> tuple[int, ...]:
    """The shape of the matrix, `(K, N)`."""
    return self.codes.shape

  def dequantize(self, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
    """The matrix, rounded once."""
    codes = self.codes.astype(jnp.float32)
    values = jnp.zeros(self.shape, jnp.float32)
    for c in range(self.scale.shape[0]):
      mine = (codes - self.zero[c][None]) * self.scale[c][None]
      values = jnp.where(self.cluster == c, mine, values)
    return values.astype(dtype)


@_pytree('codes', 'scale', 'zero', 'bits_G', meta=('group_size',))
@dataclasses.dataclass(frozen=True)
class MixedBits:
  """(codes - zero) * scale, with a number of bits for each group (SliM-LLM).

  Attributes:
    codes: int8 `[K, N]`; those of a group of b bits lie in two's complement of
      b bits, those of a group of 1 bit are 0 and 1.
    scale: float32 `[G, N]`; groups are equally many inputs that follow each
      other, only the last may be shorter: group g begins at input
      g * `group_size`.
    zero: float32 `[G, N]`.
    bits_G: int8, bits of a code of the group.
    group_size: inputs of a group.
  """

  codes: jax.Array
  scale: jax.Array
  zero: jax.Array
  bits_G: jax.Array
  group_size: int

  @property
  def shape(self) -> tuple[int, ...]:
    """The shape of the matrix, `(K, N)`."""
    return self.codes.shape

  def dequantize(self, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
    """The matrix, rounded once."""
    group_K = jnp.arange(self.shape[0]) // self.group_size
    values = self.codes.astype(jnp.float32) - self.zero[group_K]
    return (values * self.scale[group_K]).astype(dtype)


@_pytree('signs', 'second', 'salient_K', 'levels', meta=('block_size',))
@dataclasses.dataclass(frozen=True)
class Binarized:
  """BiLLM (2402.04291): two binary numbers a weight, levels by block and row.

  In a salient input's column of the paper's matrix a weight is
  `mean + scale * sign + scale2 * second`; elsewhere `second` tells a large
  weight (1) from a small one (-1), and it is `mean + scale * sign` with the
  mean and the scale of its kind.

  Attributes:
    signs: int8 `[K, N]`, -1 or 1.
    second: int8 `[K, N]`, -1 or 1.
    salient_K: bool.
    levels: float32 `[G, 7, N]`: small mean and scale, large mean and scale,
      salient mean, scale and scale2. G blocks; block g begins at input
      g * `block_size`, the last may be shorter.
    block_size: inputs of a block.
  """

  signs: jax.Array
  second: jax.Array
  salient_K: jax.Array
  levels: jax.Array
  block_size: int

  @property
  def shape(self) -> tuple[int, ...]:
    """The shape of the matrix, `(K, N)`."""
    return self.signs.shape

  def dequantize(self, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
    """The matrix, rounded once."""
    block_K = jnp.arange(self.shape[0]) // self.block_size
    small_m, small_s, large_m, large_s, mean, scale, scale2 = (
      self.levels[:, i][block_K] for i in range(7)
    )
    signs, second = (a.astype(jnp.float32) for a in (self.signs, self.second))
    large = self.second > 0
    plain = jnp.where(large, large_m, small_m)
    plain = plain + jnp.where(large, large_s, small_s) * signs
    salient = mean + scale * signs + scale2 * second
    return jnp.where(self.salient_K[:, None], salient, plain).astype(dtype)


@_pytree('codes', 'base', 'step', meta=('bits',))
@dataclasses.dataclass(frozen=True)
class Levels:
  """base + codes * step, rounded to float16: scales that have codes themselves.

  Attributes:
    codes: uint8 `[G, N]`, below 2^bits.
    base: float32 `[G, P]`, for each of P groups of neighbours, equally many
      each.
    step: float32 `[G, P]`.
    bits: of a code, 1 to 8.
  """

  codes: jax.Array
  base: jax.Array
  step: jax.Array
  bits: int

  @property
  def shape(self) -> tuple[int, ...]:
    """The shape of the values, `(G, N)`."""
    return self.codes.shape

  def values(self) -> jax.Array:
    """What the codes stand for, float32."""
    codes = self.codes.astype(jnp.float32)
    base, step = (qtensor.spread(a, self.shape) for a in (self.base, self.step))
    return float16.nearest(base + codes * step)


def numbers(values: jax.Array | Levels) -> jax.Array:
  """The values of Levels; an array as it is."""
  return values.values() if isinstance(values, Levels) else values


@_pytree('codes', 'scale', 'zero', 'exact', meta=('alphabet',))
@dataclasses.dataclass(frozen=True)
class TwoLevel:
  """A QTensor whose scales or zero points have codes themselves (SpQR).

  Attributes:
    codes: as in `qtensor.QTensor`, `[K, N]`.
    scale: `[G, N]`, Levels or as there.
    alphabet: as there.
    zero: `[G, N]`, Levels or as there.
    exact: as there.
  """

  codes: jax.Array
  scale: jax.Array | Levels
  alphabet: str
  zero: jax.Array | Levels
  exact: jax.Array | None = None

  @property
  def shape(self) -> tuple[int, ...]:
    """The shape of the matrix, `(K, N)`."""
    return self.codes.shape

  def one_level(self) -> qtensor.QTensor:
    """The same matrix with numbers for scales and zero points."""
    scale, zero = numbers(self.scale), numbers(self.zero)
    return qtensor.QTensor(self.codes, scale, self.alphabet, zero, self.exact)

  def dequantize(self, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
    """The matrix, rounded once."""
    return self.one_level().dequantize(dtype)


KINDS = (
  *(qtensor.QTensor, Sum, Clustered, MixedBits, Binarized, TwoLevel),
  packed.PackedMatrix,
)
Quantized = (
  qtensor.QTensor
  | Sum
  | Clustered
  | MixedBits
  | Binarized
  | TwoLevel
  | packed.PackedMatrix
)


def is_quantized(leaf: object) -> bool:
  """Whether a node of a parameter tree is a quantized matrix, a leaf to us."""
  return isinstance(leaf, KINDS)
