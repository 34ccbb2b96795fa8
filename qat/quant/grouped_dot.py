"""The quantized dot of rows in tiles, each with the matrix of its own expert.

As `dot.quantized_dot`, gradients included, for a stack of matrices of which
each tile of rows meets one. Rows that pad a tile are zeros, as codes, as scales
and as gradients.

The letters besides those of the glossary: G groups of rows, one a device; C
tiles of a group; S rows of a group; T = G * C tiles of t = S / C rows.
"""

from collections.abc import Sequence
import functools

import jax
from jax import lax
from jax import numpy as jnp
import numpy as np

from pallas_kernels.quantized_train_matmul import cpu as scaled_matmul
from qat.quant import dot
from qat.quant import operand as operand_lib
from qat.quant import packed
from qat.quant import packed_dot

# Of tiles: the left operand contracts its last axis, the right its first or
# its last.
_NN = (((2,), (1,)), ((0,), (0,)))
_NT = (((2,), (2,)), ((0,), (0,)))


def grouped_dot(
  x: operand_lib.Operand,
  weight: operand_lib.Operand,
  expert_GC: jax.Array,
  method: dot.Method,
) -> jax.Array:
  """Multiplies each row by the matrix of its tile.

  Args:
    x: `[G, S, K]`, of which a group's C tiles are S / C rows each.
    weight: a stack `[E, K, N]`.
    expert_GC: int32, which matrix each tile meets.
    method: how to multiply.

  Returns:
    float32 `[G, S, N]`.
  """
  if isinstance(weight.quantized, packed.PackedMatrix):
    rest = weight.quantized, expert_GC, method.dtype, method.target
    return packed_dot.by_group(*dot.rows_of(x, method), *rest)
  codes_GSK, scale_GS1 = dot.parts(x, -1, method)
  codes_EKN, scale_E1N = dot.parts(weight, -2, method)
  if scale_E1N is not None:
    stack = (weight.value.shape[0], *scale_E1N.shape[1:])
    scale_E1N = jnp.broadcast_to(scale_E1N, stack)
  return _product(
    x.value,
    codes_GSK,
    scale_GS1,
    weight.value,
    codes_EKN,
    scale_E1N,
    expert_GC,
    method,
  )


def grouped_dots(
  x: operand_lib.Operand,
  weights: Sequence[operand_lib.Operand],
  expert_GC: jax.Array,
  method: dot.Method,
) -> list[jax.Array]:
  """`grouped_dot` with several stacks, side by side as one where that can be.

  An expert's matrices are narrow: one product of them all, and in the backward
  pass one of each kind, costs less than as many small ones.

  Returns:
    For each stack float32 `[G, S, N]`.
  """
  wide = operand_lib.beside(weights)
  if wide is None:
    return [grouped_dot(x, w, expert_GC, method) for w in weights]
  y_GSN = grouped_dot(x, wide, expert_GC, method)
  widths = [w.value.shape[-1] for w in weights]
  return jnp.split(y_GSN, np.cumsum(widths)[:-1], axis=-1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def _product(x, codes_x, scale_x, w, codes_w, scale_w, expert_GC, method):
  arguments = (x, codes_x, scale_x, w, codes_w, scale_w, expert_GC, method)
  return _product_fwd(*arguments)[0]


def _product_fwd(x, codes_x, scale_x, w, codes_w, scale_w, expert_GC, method):
  x_GSK = x.astype(method.dtype) if codes_x is None else codes_x
  w_EKN = w.astype(method.dtype) if codes_w is None else codes_w
  if codes_w is not None:
    w_EKN = dot.hold_codes(w_EKN, method)
  expert_T = expert_GC.reshape(-1)
  x_TtK = _tiles(x_GSK, expert_T)
  if method.native and x_GSK.dtype == w_EKN.dtype == jnp.int8:
    y_TtN = scaled_matmul.grouped_matmul(
      x_TtK, w_EKN, expert_T, scale_x, scale_w
    )
    y_GSN = y_TtN.reshape(*x_GSK.shape[:2], -1)
  else:
    multiply = jax.vmap(functools.partial(dot.product, method=method))
    y_TtN = multiply(x_TtK, w_EKN[expert_T])
    if scale_w is not None:
      y_TtN = y_TtN * scale_w[expert_T]
    y_GSN = y_TtN.reshape(*x_GSK.shape[:2], -1)
    if scale_x is not None:
      y_GSN = y_GSN * scale_x
  like = (jnp.zeros((0,), x.dtype), jnp.zeros((0,), w.dtype))
  return y_GSN, (x_GSK, scale_x, w_EKN, scale_w, expert_GC, like)


def _product_bwd(method, residuals, dy_GSN):
  x_GSK, scale_x, w_EKN, scale_w, expert_GC, (x_like, w_like) = residuals
  expert_T = expert_GC.reshape(-1)
  dy_TtN = _tiles(dy_GSN, expert_T)
  if scale_w is not None:
    dy_TtN = dy_TtN * scale_w[expert_T]
  dx_TtK = lax.dot_general(
    dy_TtN.astype(method.dtype),
    w_EKN[expert_T].astype(method.dtype),
    _NT,
    preferred_element_type=jnp.float32,
  )
  dy_x_GSN = dy_GSN if scale_x is None else dy_GSN * scale_x
  tiled = (*expert_GC.shape, x_GSK.shape[1] // expert_GC.shape[1], -1)
  dw_GEKN = jax.vmap(
    functools.partial(_by_expert, n_experts=len(w_EKN), method=method)
  )(
    x_GSK.reshape(tiled),
    dy_x_GSN.astype(method.dtype).reshape(tiled),
    expert_GC,
  )
  dx = dx_TtK.reshape(x_GSK.shape).astype(x_like.dtype)
  dw = jnp.sum(dw_GEKN, axis=0).astype(w_like.dtype)
  return dx, None, None, dw, None, None, None


_product.defvjp(_product_fwd, _product_bwd)


def _tiles(x_GSK: jax.Array, expert_T: jax.Array) -> jax.Array:
  return x_GSK.reshape(len(expert_T), -1, x_GSK.shape[-1])


def _by_expert(x_CtK, y_CtN, expert_C, n_experts: int, method: dot.Method):
  """x^T @ y of every tile, summed over the tiles of each expert: `[E, K, N]`.

  The narrower operand is the one that is transposed.
  """
  if x_CtK.shape[-1] > y_CtN.shape[-1]:
    return _by_expert(y_CtN, x_CtK, expert_C, n_experts, method).swapaxes(1, 2)
  x_CKt = x_CtK.swapaxes(1, 2)
  shape = (n_experts, x_CKt.shape[1], y_CtN.shape[2])
  if method.transpose_in_loop:

    def add(total_EKN, tile):
      x_Kt, y_tN, expert = tile
      part_KN = lax.dot(
        x_Kt.astype(method.dtype),
        y_tN.astype(method.dtype),
        preferred_element_type=jnp.float32,
      )
      return total_EKN.at[expert].add(part_KN), None

    zeros_EKN = jnp.zeros(shape, jnp.float32)
    return lax.scan(add, zeros_EKN, (x_CKt, y_CtN, expert_C))[0]
  part_CKN = lax.dot_general(
    x_CKt.astype(method.dtype),
    y_CtN.astype(method.dtype),
    _NN,
    preferred_element_type=jnp.float32,
  )
  mine_EC = jax.nn.one_hot(expert_C, n_experts, axis=0)
  # 'highest': accelerators would round the sums of the tiles.
  return jnp.tensordot(mine_EC, part_CKN, 1, precision='highest')
