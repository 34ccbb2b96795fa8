"""Matrices in the packed bytes that kernels multiply: weights of inference.

What a quantizer of training returns becomes one where the kernels have a form
for it: codes of an alphabet that fits 1, 2, 4 or 8 bits, one scale (and zero
point) for the matrix or for each column. Scales of groups, float8 and weights
that are kept exactly have none; such a matrix stays what it is.
"""

import dataclasses
import functools

import jax
from jax import numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels import packing
from qat.quant import qtensor

# Of the codes of an alphabet, the smallest that holds them. Those of 'odd2' are
# 2 c + 1 for the codes c of '2bit'.
FORMATS = {
  'binary': '1bit',
  'ternary': '2bit',
  'odd2': '2bit',
  'int2': '2bit',
  'int3': 'int4',
  'int4': 'int4',
  'int6': 'int8',
  'int8': 'int8',
}


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=('data', 'scale', 'shift', 'gain_K'),
  meta_fields=('format', 'inputs', 'outputs', 'axis', 'block'),
)
@dataclasses.dataclass(frozen=True)
class PackedMatrix:
  """gain * (codes * scale + shift): a matrix `[K, N]`, or a stack of them.

  Attributes:
    data: as in `pallas_kernels.packing.Packed`, and so are `format`, `inputs`,
      `outputs`, `axis` and `block`.
    scale: float32 `[..., 1, 1]` or `[..., 1, N]`.
    shift: float32, of the shape of `scale`: what a code of 0 stands for; None:
      0.
    gain_K: float32 `[..., K]`, a factor of each input (OneBit); None: 1.
  """

  data: jax.Array
  scale: jax.Array
  shift: jax.Array | None
  gain_K: jax.Array | None
  format: str
  inputs: int
  outputs: int
  axis: int
  block: int

  @property
  def shape(self) -> tuple[int, ...]:
    """The shape of the array that it stands for."""
    return (*self.data.shape[:-2], self.inputs, self.outputs)

  @property
  def packed(self) -> packing.Packed:
    """What kernels take: codes and scale."""
    return packing.Packed(
      *(self.data, self.scale, self.format, self.inputs, self.outputs),
      *(self.axis, self.block),
    )

  def dequantize(self, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
    """The array that the codes stand for, rounded once."""
    values = packing.unpack(self.packed).astype(jnp.float32) * self.scale
    if self.shift is not None:
      values = values + self.shift
    if self.gain_K is not None:
      values = values * self.gain_K[..., None]
    return values.astype(dtype)


def layout(target: dispatch.Target) -> dict[str, int]:
  """How a target's kernels want matrices: arguments of `packing.pack`."""
  rows = dispatch.rows_for('packed_matmul', target)
  if not rows:  # The reference takes any.
    return {'axis': -2, 'block': packing.BLOCK, 'multiple': 1}
  # Of other widths, a GPU's kernel would copy the matrix at every call.
  multiple = 8 if target.platform == 'gpu' else 1
  return {'axis': rows[0].axis, 'block': rows[0].block, 'multiple': multiple}


def pack(
  quantized: qtensor.QTensor,
  target: dispatch.Target,
  gain_K: jax.Array | None = None,
) -> PackedMatrix | None:
  """A quantized matrix, or a stack of them, for the kernels of a target.

  Args:
    quantized: `[..., K, N]`.
    target: where it will be multiplied.
    gain_K: as in `PackedMatrix`.

  Returns:
    None where no format has all of it.
  """
  q = quantized
  if q.alphabet not in FORMATS or q.exact is not None or q.scale.shape[-2] > 1:
    return None
  codes, scale, shift = q.codes.astype(jnp.int8), q.scale, None
  if q.alphabet == 'odd2':
    codes, scale, shift = (codes - 1) >> 1, 2 * q.scale, q.scale
  if q.zero is not None:
    offset = -q.zero.astype(jnp.float32) * q.scale
    shift = offset if shift is None else shift + offset
  made = packing.pack(codes, scale, FORMATS[q.alphabet], **layout(target))
  return _with(made, shift, gain_K)


def repack(matrix: PackedMatrix, target: dispatch.Target) -> PackedMatrix:
  """The same matrix for the kernels of another target."""
  wanted = layout(target)
  if (matrix.axis, matrix.block) == (
    wanted['axis'],
    wanted['block'],
  ) and matrix.packed.padded_outputs % wanted['multiple'] == 0:
    return matrix
  made = packing.repack(matrix.packed, **wanted)
  return _with(made, matrix.shift, matrix.gain_K)


def check(matrix: PackedMatrix) -> None:
  """Raises a ValueError where bytes and scales do not fit what they are of."""
  m = matrix
  if m.format not in packing.FORMATS or m.axis not in (-2, -1) or m.block < 1:
    raise ValueError(
      f'No packed matrix has format {m.format!r}, axis {m.axis} and blocks of'
      f' {m.block} bytes.'
    )
  unit = packing.FORMATS[m.format].planes * m.block
  length = -(-m.inputs // unit) * m.block
  scales = (1, 1), (1, m.outputs)
  shift, gain_K = m.shift, m.gain_K
  if (
    (m.data is None or m.scale is None)
    or (m.data.dtype, m.data.shape[m.axis]) != (jnp.int8, length)
    or m.data.shape[-3 - m.axis] < m.outputs
    or m.scale.shape[-2:] not in scales
    or (shift is not None and shift.shape[-2:] not in scales)
    or (gain_K is not None and gain_K.shape[-1] != m.inputs)
  ):
    found = [getattr(a, 'shape', None) for a in (m.data, m.scale)]
    raise ValueError(
      f'Bytes and scales of shapes {found} are not those of a matrix of'
      f' {m.inputs} x {m.outputs} in {m.format!r}.'
    )


def _with(made: packing.Packed, shift, gain_K) -> PackedMatrix:
  meta = made.format, made.inputs, made.outputs, made.axis, made.block
  return PackedMatrix(made.data, made.scale, shift, gain_K, *meta)
