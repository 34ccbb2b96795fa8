"""The quantized dot: an input times a weight, and the gradients of both.

Forward, for the codes c and the scales s of an input and of a weight:

  y = (c_x @ c_w) * s_x * s_w

Backward, the gradients with respect to the quantized input and weight:

  dx = dy @ (c_w s_w)^T        dw = (c_x s_x)^T @ dy

They are handed to the float value that each operand carries. With the
straight-through estimator (the gradient of quantization is taken as 1; BitNet
2310.11453 section 2.2, pQuant 2602.22592 section 3.1) that is the input or the
latent weight itself; a learned quantizer puts its own gradient there.

Autodiff of the textbook form `w + stop_gradient(q(w) - w)` computes the same,
but keeps float copies of the quantized input and of the quantized weight until
the backward pass. Here codes and scales are all that stays. Where scales vary
along the contracted axis (groups), or codes have an offset, the dequantized
operand is multiplied and kept instead.
"""

from collections.abc import Sequence
import dataclasses
import functools

import jax
from jax import lax
from jax import numpy as jnp
from jax.experimental import layout
from jax.sharding import PartitionSpec as P
import numpy as np

from pallas_kernels import dispatch
from pallas_kernels.quantized_train_matmul import cpu as scaled_matmul
from qat.quant import operand as operand_lib
from qat.quant import packed
from qat.quant import packed_dot
from qat.quant import qtensor

# Contracting dimensions: of the left operand, of the right operand.
_NN = (((1,), (0,)), ((), ()))
_NT = (((1,), (1,)), ((), ()))
_TN = (((0,), (0,)), ((), ()))


@dataclasses.dataclass(frozen=True)
class Method:
  """How products are computed; changes nothing beyond rounding.

  Attributes:
    int8: multiply int8 codes to int32; else as `dtype` values to float32, which
      holds the same integers exactly up to 2^24.
    dtype: of the operands of a float product, by name.
    transpose_in_loop: compute x^T @ y with x^T brought into memory first.
      XLA:CPU multiplies a transposed left operand at half the speed.
    gather_codes: under a mesh with split parameters, exchange weight codes
      between devices rather than float weights.
    row_major: hold weight codes in this order in memory. Accelerators want the
      right operand of an int8 product transposed; left to itself, XLA turns the
      float weights for that, of all layers at once where they are stacked.
    native: multiply int8 codes of an input and a weight by the C++ extension,
      which gives the same floats as `int8`, bit for bit.
    few_rows: compute by the C++ extension what a few tokens ask for in
      decoding: attention to a cache, the head, rows of a table.
    target: the device that packed matrices are multiplied on; None: that of
      this process.
  """

  int8: bool
  dtype: str
  transpose_in_loop: bool = False
  gather_codes: bool = False
  row_major: bool = False
  native: bool = False
  few_rows: bool = False
  target: dispatch.Target | None = None

  @property
  def doubles_a_row(self) -> bool:
    """Whether one row of floats is multiplied faster as two.

    XLA:CPU multiplies a row of bfloat16 in a plain loop, and two by a library.
    """
    return self.transpose_in_loop and self.dtype == 'bfloat16'


def quantized_dot(
  x: operand_lib.Operand, weight: operand_lib.Operand, method: Method
) -> jax.Array:
  """Multiplies an input by a weight, or by each weight of a stack.

  Args:
    x: the input, `[..., K]`, from `make_input`.
    weight: `[K, N]`, or a stack `[E, K, N]`, from `make_weight`.
    method: how to multiply.

  Returns:
    float32 `[..., N]`, or `[..., E, N]` for a stack.
  """
  if _is_packed(weight):
    return _packed_dots(x, [weight], method)[0]
  codes_MK, scale_M1 = parts(x, -1, method)
  codes_KN, scale_1N = parts(weight, -2, method)
  stack = weight.value.shape[:-2]
  if scale_1N is not None and stack:
    ones = (*stack, 1, weight.value.shape[-1])
    scale_1N = _columns(jnp.broadcast_to(scale_1N, ones))
  y_MN = _dot(
    _flat(x.value),
    None if codes_MK is None else _flat(codes_MK),
    None if scale_M1 is None else _flat(scale_M1),
    _columns(weight.value),
    None if codes_KN is None else _columns(codes_KN),
    scale_1N,
    method,
  )
  return y_MN.reshape(*x.value.shape[:-1], *stack, weight.value.shape[-1])


def quantized_dots(
  pairs: Sequence[tuple[operand_lib.Operand, operand_lib.Operand]],
  method: Method,
) -> list[jax.Array]:
  """`quantized_dot` of each pair of an input and a weight.

  Packed weights that share one input, the same object, are handed to the
  kernels together.
  """
  inputs, weights = zip(*pairs, strict=True)
  if len({id(x) for x in inputs}) == 1 and all(map(_is_packed, weights)):
    return _packed_dots(inputs[0], weights, method)
  return [quantized_dot(*pair, method) for pair in pairs]


def _is_packed(weight: operand_lib.Operand) -> bool:
  return isinstance(weight.quantized, packed.PackedMatrix)


def _packed_dots(
  x: operand_lib.Operand, weights: Sequence[operand_lib.Operand], method: Method
) -> list[jax.Array]:
  rows = jax.tree.map(_flat, rows_of(x, method))
  matrices = [w.quantized for w in weights]
  ys = packed_dot.several(*rows, matrices, method.dtype, method.target)
  return [y.reshape(*x.value.shape[:-1], *y.shape[1:]) for y in ys]


def parts(
  operand: operand_lib.Operand, contracted: int, method: Method
) -> tuple[jax.Array | None, jax.Array | None]:
  """Codes, and the scales that may be applied to the product instead.

  Where there is more to a value than a code and such a scale, the dequantized
  array stands for the codes.
  """
  q = operand.quantized
  if q is None:
    return None, None
  if isinstance(q, qtensor.QTensor) and not operand_lib.has_more(q, contracted):
    return q.codes, q.scale
  return q.dequantize(method.dtype), None


def rows_of(
  x: operand_lib.Operand, method: Method
) -> tuple[jax.Array, jax.Array | None]:
  """Codes `[..., K]` of an input and scales `[..., 1]`, or floats and None."""
  codes_MK, scale_M1 = parts(x, -1, method)
  if codes_MK is None:
    return x.value.astype(method.dtype), None
  if scale_M1 is not None:
    scale_M1 = jnp.broadcast_to(scale_M1, (*codes_MK.shape[:-1], 1))
  return codes_MK, scale_M1


def _flat(x: jax.Array) -> jax.Array:
  return x.reshape(-1, x.shape[-1])


def _columns(w: jax.Array) -> jax.Array:
  """A stack `[E, K, N]` as one matrix `[K, E * N]`; a matrix as it is."""
  return w if w.ndim == 2 else w.swapaxes(0, 1).reshape(w.shape[1], -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _dot(value_MK, codes_MK, scale_M1, value_KN, codes_KN, scale_1N, method):
  return _dot_fwd(
    value_MK, codes_MK, scale_M1, value_KN, codes_KN, scale_1N, method
  )[0]


def _dot_fwd(
  value_MK, codes_MK, scale_M1, value_KN, codes_KN, scale_1N, method
):
  x_MK = value_MK.astype(method.dtype) if codes_MK is None else codes_MK
  w_KN = value_KN.astype(method.dtype) if codes_KN is None else codes_KN
  if codes_KN is not None:
    w_KN = hold_codes(w_KN, method)
  if method.native and x_MK.dtype == w_KN.dtype == jnp.int8:
    y_MN = scaled_matmul.matmul(x_MK, w_KN, scale_M1, scale_1N)
  else:
    y_MN = product(x_MK, w_KN, method)
    for scale in (scale_1N, scale_M1):
      if scale is not None:
        y_MN = y_MN * scale
  like = (_marker(value_MK), _marker(value_KN))
  return y_MN, (x_MK, scale_M1, w_KN, scale_1N, like)


def _dot_bwd(method, residuals, dy_MN):
  x_MK, scale_M1, w_KN, scale_1N, (x_like, w_like) = residuals
  dy_x_MN = dy_MN if scale_M1 is None else dy_MN * scale_M1
  dy_x_MN = dy_x_MN.astype(method.dtype)
  if scale_1N is None or scale_1N.shape[-1] > 1:
    dy_w_MN = dy_MN if scale_1N is None else dy_MN * scale_1N
    dx_MK = _to_input(dy_w_MN.astype(method.dtype), w_KN, method)
  else:
    # One scale: both products read the same rounded dy, and what it has been
    # multiplied by, a number for each row, is taken back after the product.
    back = scale_1N if scale_M1 is None else scale_1N / scale_M1
    dx_MK = _to_input(dy_x_MN, w_KN, method) * back
  dw_KN = _transposed_product(x_MK, dy_x_MN, method)
  return (
    dx_MK.astype(x_like.dtype),
    _no_gradient(x_MK),
    _no_gradient(scale_M1),
    dw_KN.astype(w_like.dtype),
    _no_gradient(w_KN),
    _no_gradient(scale_1N),
  )


_dot.defvjp(_dot_fwd, _dot_bwd)


def _no_gradient(a: jax.Array | None) -> np.ndarray | jax.Array | None:
  """The cotangent of what is a constant to the gradient."""
  if a is None:
    return None
  if jnp.issubdtype(a.dtype, jnp.integer):
    return np.zeros(a.shape, jax.dtypes.float0)
  return jnp.zeros_like(a)


def _marker(a: jax.Array) -> jax.Array:
  """An empty array that carries a dtype to the backward pass."""
  return jnp.zeros((0,), a.dtype)


def product(x_MK, w_KN, method: Method) -> jax.Array:
  """x @ w as float32; through int32 where both are codes and that is wanted."""
  if x_MK.shape[0] == 1 and method.doubles_a_row:
    return product(jnp.repeat(x_MK, 2, 0), w_KN, method)[:1]
  if method.int8 and x_MK.dtype == w_KN.dtype == jnp.int8:
    return lax.dot_general(
      x_MK, w_KN, _NN, preferred_element_type=jnp.int32
    ).astype(jnp.float32)
  return lax.dot_general(
    x_MK.astype(method.dtype),
    w_KN.astype(method.dtype),
    _NN,
    preferred_element_type=jnp.float32,
  )


def hold_codes(codes: jax.Array, method: Method) -> jax.Array:
  """Weight codes where and as `method` wants them on a device.

  Args:
    codes: of a matrix or a stack.
    method: see its `gather_codes` and `row_major`.
  """
  if method.gather_codes:
    # Without the barrier XLA exchanges first and converts to codes after.
    codes = lax.optimization_barrier(codes)
    codes = lax.with_sharding_constraint(codes, P())
  if method.row_major:
    order = layout.Layout(tuple(range(codes.ndim)))
    codes = layout.with_layout_constraint(codes, order)
  return codes


def _to_input(dy_MN, w_KN, method: Method) -> jax.Array:
  """dy @ w^T as float32."""
  return lax.dot_general(
    dy_MN, w_KN.astype(method.dtype), _NT, preferred_element_type=jnp.float32
  )


def _transposed_product(x_MK, y_MN, method: Method) -> jax.Array:
  """x^T @ y as float32."""
  blocks, width = 2, x_MK.shape[1]
  if not method.transpose_in_loop or width % blocks:
    return lax.dot_general(
      x_MK.astype(y_MN.dtype), y_MN, _TN, preferred_element_type=jnp.float32
    )
  # A loop's operands have a layout of their own: XLA cannot fold the transpose
  # into the product, where it would cost more than it does alone.
  x_bKM = x_MK.T.reshape(blocks, width // blocks, -1)
  dw_bKN = lax.map(
    lambda x_KM: lax.dot_general(
      x_KM.astype(y_MN.dtype),
      y_MN,
      _NN,
      preferred_element_type=jnp.float32,
    ),
    x_bKM,
  )
  return dw_bKN.reshape(width, -1)
