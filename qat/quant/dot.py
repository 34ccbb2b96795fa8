"""The quantized dot: an input times a weight, with straight-through gradients.

Forward, for the codes c and the scales s of an input and of a weight:

  y = (c_x @ c_w) * s_x * s_w

Backward, with the straight-through estimator (the gradient of quantization is
taken as 1; BitNet 2310.11453 section 2.2, pQuant 2602.22592 section 3.1):

  dx = dy @ (c_w s_w)^T        dw = (c_x s_x)^T @ dy

Autodiff of the textbook form `w + stop_gradient(q(w) - w)` computes the same,
but keeps float copies of the quantized input and of the quantized weight until
the backward pass. Here int8 codes and the scales are all that stays.
"""

import dataclasses
import functools
import pathlib
import re

import jax
from jax import lax
from jax import numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np

from qat.quant import qtensor
from qat.quant import rules

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
  """

  int8: bool
  dtype: str
  transpose_in_loop: bool = False
  gather_codes: bool = False


@dataclasses.dataclass(frozen=True)
class Input:
  """An input of linear layers, quantized once for all that read it.

  Attributes:
    value_MK: the float input; carries the gradient. Where all readers use the
      codes, its value is never computed.
    quantized: its codes and scales, or None.
  """

  value_MK: jax.Array
  quantized: qtensor.QTensor | None


def make_input(x_MK: jax.Array, spec: rules.Spec) -> Input:
  """Quantizes the input of layers with `spec`; the gradient passes through."""
  return Input(x_MK, spec.quantize_input(lax.stop_gradient(x_MK)))


def choose_method(
  name: str, dtype: str, platform: str, split_parameters: bool = False
) -> Method:
  """Resolves a config's 'auto', 'int8' or 'float' for a platform.

  Int8 products are faster on accelerators, and on CPUs with AMX tiles; on
  others XLA multiplies bfloat16 at least as fast as int8.

  Args:
    name: 'auto', 'int8' or 'float'.
    dtype: of float products: 'bfloat16' or 'float32'.
    platform: 'cpu', 'gpu' or 'tpu'.
    split_parameters: whether parameters are split over devices.

  Raises:
    ValueError: for another name or dtype.
  """
  if name not in ('auto', 'int8', 'float'):
    raise ValueError(f'model.quantized_dot={name!r}; one of auto, int8, float.')
  if dtype not in ('bfloat16', 'float32'):
    raise ValueError(f'model.dot_dtype={dtype!r}; one of bfloat16, float32.')
  int8 = name == 'int8'
  if name == 'auto':
    int8 = platform != 'cpu' or _cpu_has_tiles()
  return Method(int8, dtype, platform == 'cpu', split_parameters)


@functools.cache
def _cpu_has_tiles() -> bool:
  cpuinfo = pathlib.Path('/proc/cpuinfo')
  return cpuinfo.exists() and bool(
    re.search(r'\bamx_int8\b', cpuinfo.read_text())
  )


def quantized_dot(
  x: Input, weight: jax.Array, spec: rules.Spec, method: Method
) -> jax.Array:
  """Multiplies an input by a weight, or by each weight of a stack.

  Args:
    x: the input, `[..., K]`, made by `make_input` with the same activation.
    weight: latent float `[K, N]`, or a stack `[E, K, N]`.
    spec: how the weight is quantized.
    method: how to multiply.

  Returns:
    float32 `[..., N]`, or `[..., E, N]` for a stack.
  """
  codes_MK, scale_M1 = None, None
  if x.quantized is not None:
    codes_MK = _flat(x.quantized.codes)
    scale_M1 = _flat(x.quantized.scale)
  y_MN = _dot(_flat(x.value_MK), codes_MK, scale_M1, weight, spec, method)
  lead = x.value_MK.shape[:-1]
  stack = weight.shape[:-2]
  return y_MN.reshape(*lead, *stack, weight.shape[-1])


def _flat(x: jax.Array) -> jax.Array:
  return x.reshape(-1, x.shape[-1])


def _columns(w: jax.Array) -> jax.Array:
  """A stack `[E, K, N]` as one matrix `[K, E * N]`; a matrix as it is."""
  return w if w.ndim == 2 else w.swapaxes(0, 1).reshape(w.shape[1], -1)


def _stack(w_KN: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """The inverse of `_columns`."""
  if len(shape) == 2:
    return w_KN
  return w_KN.reshape(shape[1], shape[0], shape[2]).swapaxes(0, 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _dot(value_MK, codes_MK, scale_M1, weight, spec, method):
  return _dot_fwd(value_MK, codes_MK, scale_M1, weight, spec, method)[0]


def _dot_fwd(value_MK, codes_MK, scale_M1, weight, spec, method):
  left_MK = value_MK.astype(method.dtype) if codes_MK is None else codes_MK
  w_scale_1N = None
  if spec.weight == 'none':
    w_KN = _columns(weight).astype(method.dtype)
  else:
    quantized = spec.quantize(weight)
    w_KN = _columns(quantized.codes)
    ones = (*weight.shape[:-2], 1, weight.shape[-1])
    w_scale_1N = _columns(jnp.broadcast_to(quantized.scale, ones))
    if method.gather_codes:
      # Without the barrier XLA exchanges first and converts to int8 after.
      w_KN = lax.optimization_barrier(w_KN)
      w_KN = lax.with_sharding_constraint(w_KN, P())
  y_MN = _product(left_MK, w_KN, method)
  if w_scale_1N is not None:
    y_MN = y_MN * w_scale_1N
  if scale_M1 is not None:
    y_MN = y_MN * scale_M1
  like = (_marker(value_MK), _marker(weight, weight.shape))
  return y_MN, (left_MK, scale_M1, w_KN, w_scale_1N, like)


def _dot_bwd(spec, method, residuals, dy_MN):
  left_MK, scale_M1, w_KN, w_scale_1N, (value_like, weight_like) = residuals
  dy_w_MN = dy_MN if w_scale_1N is None else dy_MN * w_scale_1N
  dx_MK = lax.dot_general(
    dy_w_MN.astype(method.dtype),
    w_KN.astype(method.dtype),
    _NT,
    preferred_element_type=jnp.float32,
  )
  dy_x_MN = dy_MN if scale_M1 is None else dy_MN * scale_M1
  dw_KN = _transposed_product(left_MK, dy_x_MN.astype(method.dtype), method)
  no_gradient = (None, None)
  if scale_M1 is not None:
    # float0 is the cotangent JAX wants for integers.
    no_gradient = (
      np.zeros(left_MK.shape, jax.dtypes.float0),
      jnp.zeros_like(scale_M1),
    )
  return (
    dx_MK.astype(value_like.dtype),
    *no_gradient,
    _stack(dw_KN, weight_like.shape[1:]).astype(weight_like.dtype),
  )


_dot.defvjp(_dot_fwd, _dot_bwd)


def _marker(a: jax.Array, shape: tuple[int, ...] = ()) -> jax.Array:
  """An empty array that carries a dtype and a shape to the backward pass."""
  return jnp.zeros((0, *shape), a.dtype)


def _product(x_MK, w_KN, method: Method) -> jax.Array:
  """x @ w as float32; through int32 where both are codes and that is wanted."""
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
