"""One call or more of every kernel, as shapes: what compilers are tried on."""

from collections.abc import Callable
from collections.abc import Iterator
import functools
from typing import Any
from typing import NamedTuple

import jax
from jax import numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels import packing
from pallas_kernels.act_quant import api as act_quant
from pallas_kernels.decoupled_ffn_up import api as decoupled_ffn_up
from pallas_kernels.grouped_matmul import api as grouped_matmul
from pallas_kernels.packed_matmul import api as packed_matmul
from pallas_kernels.quantized_train_matmul import api as quantized_train_matmul

# Tokens: one and a few while generating, a ragged prompt, a long one.
ROWS = (1, 8, 100, 2048)
# Widths that are no multiple of a tile.
INPUTS, OUTPUTS, NARROW, EXPERTS = 2000, 600, 200, 4


class Case(NamedTuple):
  """A call: `jax.jit(function).trace(*arguments).lower(...)`."""

  name: str
  function: Callable[..., Any]
  arguments: tuple[Any, ...]


def cases(target: dispatch.Target) -> Iterator[Case]:
  """The calls that must compile for a target: every row of the table for it.

  Args:
    target: a platform and a chip; need not be there.

  Yields:
    A name, a function and its arguments, as shapes. The 'reference', which is
    for every platform, is not among them.
  """
  for row in dispatch.TABLE:
    if row not in dispatch.rows_for(row.kernel, target):
      continue
    for rows in ROWS:
      for dtype in row.dtypes:
        for format in row.formats or ('',):
          function, arguments = _CALLS[row.kernel](row, rows, dtype, format)
          parts = row.kernel, row.name, format, dtype, f'M={rows}'
          yield Case(
            ' '.join(filter(None, parts)),
            functools.partial(function, implementation=row.name, target=target),
            arguments,
          )


def packed(
  format: str, shape: tuple[int, ...], row: dispatch.Row
) -> packing.Packed:
  """The shapes of packed matrices, `[..., K, N]`, as a row wants them."""
  pack = functools.partial(
    packing.pack, format=format, axis=row.axis, block=row.block
  )
  scale = _array((*shape[:-2], 1, shape[-1]), 'float32')
  return jax.eval_shape(pack, _array(shape, 'int8'), scale)


def _packed_matmul(row, rows, dtype, format):
  call = functools.partial(packed_matmul.packed_matmul, out_dtype=jnp.bfloat16)
  weights = packed(format, (INPUTS, OUTPUTS), row)
  return call, (_array((rows, INPUTS), dtype), weights)


def _act_quant(row, rows, dtype, format):
  call = functools.partial(act_quant.act_quant, eps=1e-5)
  return call, (_array((rows, INPUTS), dtype), _array((INPUTS,), 'float32'))


def _decoupled_ffn_up(row, rows, dtype, format):
  return decoupled_ffn_up.decoupled_ffn_up, (
    _array((rows, INPUTS), dtype),
    packed(format, (INPUTS, OUTPUTS), row),
    packed('int8', (INPUTS, NARROW), row),
  )


def _grouped_matmul(row, rows, dtype, format):
  return grouped_matmul.grouped_matmul, (
    _array((rows, INPUTS), dtype),
    packed(format, (EXPERTS, INPUTS, OUTPUTS), row),
    _array((rows,), 'int32'),
  )


def _quantized_train_matmul(row, rows, dtype, format):
  return quantized_train_matmul.quantized_train_matmul, (
    _array((rows, INPUTS), dtype),
    _array((rows, 1), 'float32'),
    _array((INPUTS, OUTPUTS), 'float32'),
    *(_array((1, n), 'float32') for n in (1, OUTPUTS)),
  )


_CALLS = {
  'packed_matmul': _packed_matmul,
  'act_quant': _act_quant,
  'decoupled_ffn_up': _decoupled_ffn_up,
  'grouped_matmul': _grouped_matmul,
  'quantized_train_matmul': _quantized_train_matmul,
}


def _array(shape: tuple[int, ...], dtype: str) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, dtype)
