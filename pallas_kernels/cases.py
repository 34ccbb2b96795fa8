"""Calls of every kernel, as shapes: what compilers are tried on."""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
from jax import numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels import packing
from pallas_kernels.act_quant import api as act_quant
from pallas_kernels.decoupled_ffn_up import api as decoupled_ffn_up
from pallas_kernels.grouped_matmul import api as grouped_matmul
from pallas_kernels.packed_matmul import api as packed_matmul
from pallas_kernels.quantized_train_matmul import api as quantized_train_matmul

# M, K, N: one token and a few while generating, a batch, many; whole tiles, and
# widths that are no multiple of one.
SHAPES = (
  (1, 2000, 600),
  (16, 2000, 600),
  (128, 2048, 512),
  (2048, 2000, 600),
)
TRAINING_SHAPES = SHAPES[2:]
EXPERTS = 4


@dataclasses.dataclass(frozen=True)
class Case:
  """A call of one implementation.

  Attributes:
    target: a platform and a chip; need not be there.
    row: of `dispatch.TABLE`.
    shape: M, K and N.
    dtype: of the activations.
    format: of the weights; '' where none are packed.
  """

  target: dispatch.Target
  row: dispatch.Row
  shape: tuple[int, int, int]
  dtype: str
  format: str

  @property
  def name(self) -> str:
    """Of those for a target, this one's alone."""
    row, shape = self.row, 'x'.join(map(str, self.shape))
    parts = (row.kernel, row.name, self.format, self.dtype, shape)
    return ' '.join(filter(None, parts))

  @property
  def flops(self) -> int:
    """Multiplications and additions of the products that are asked for."""
    rows, inputs, outputs = self.shape
    return 2 * rows * inputs * int(outputs * _PRODUCTS[self.row.kernel])

  def call(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A function to jit, and its arguments, as shapes."""
    function, arguments = _CALLS[self.row.kernel](self)
    function = functools.partial(
      function, implementation=self.row.name, target=self.target
    )
    return function, arguments


def cases(target: dispatch.Target) -> list[Case]:
  """The calls that must compile for a target: every row of the table for it.

  The 'reference', which is for every platform, is not among them.
  """
  return [
    Case(target, row, shape, dtype, format)
    for row in dispatch.TABLE
    if row in dispatch.rows_for(row.kernel, target)
    for shape in _shapes(row.kernel)
    for dtype in row.dtypes
    for format in row.formats or ('',)
  ]


def packed(
  format: str, shape: tuple[int, ...], row: dispatch.Row
) -> packing.Packed:
  """The shapes of packed matrices, `[..., K, N]`, as a row wants them."""
  pack = functools.partial(
    packing.pack, format=format, axis=row.axis, block=row.block
  )
  scale = _array((*shape[:-2], 1, shape[-1]), 'float32')
  return jax.eval_shape(pack, _array(shape, 'int8'), scale)


def _shapes(kernel: str) -> tuple[tuple[int, int, int], ...]:
  return TRAINING_SHAPES if kernel == 'quantized_train_matmul' else SHAPES


def _packed_matmul(case: Case):
  call = functools.partial(packed_matmul.packed_matmul, out_dtype=jnp.bfloat16)
  return call, (_inputs(case), packed(case.format, case.shape[1:], case.row))


def _act_quant(case: Case):
  call = functools.partial(act_quant.act_quant, eps=1e-5)
  return call, (_inputs(case), _array((case.shape[1],), 'float32'))


def _decoupled_ffn_up(case: Case):
  _, inputs, outputs = case.shape
  return decoupled_ffn_up.decoupled_ffn_up, (
    _inputs(case),
    packed(case.format, (inputs, outputs), case.row),
    packed('int8', (inputs, outputs // 2), case.row),
  )


def _grouped_matmul(case: Case):
  return grouped_matmul.grouped_matmul, (
    _inputs(case),
    packed(case.format, (EXPERTS, *case.shape[1:]), case.row),
    _array(case.shape[:1], 'int32'),
  )


def _quantized_train_matmul(case: Case):
  rows, inputs, outputs = case.shape
  return quantized_train_matmul.quantized_train_matmul, (
    _inputs(case),
    _array((rows, 1), 'float32'),
    _array((inputs, outputs), 'float32'),
    *(_array((1, n), 'float32') for n in (1, outputs)),
  )


_CALLS = {
  'packed_matmul': _packed_matmul,
  'act_quant': _act_quant,
  'decoupled_ffn_up': _decoupled_ffn_up,
  'grouped_matmul': _grouped_matmul,
  'quantized_train_matmul': _quantized_train_matmul,
}
# Products for each token, of K times N.
_PRODUCTS = {
  'packed_matmul': 1,
  'act_quant': 0,
  'decoupled_ffn_up': 1.5,
  'grouped_matmul': 1,
  'quantized_train_matmul': 1,
}


def _inputs(case: Case) -> jax.ShapeDtypeStruct:
  return _array(case.shape[:2], case.dtype)


def _array(shape: tuple[int, ...], dtype: str) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, dtype)
