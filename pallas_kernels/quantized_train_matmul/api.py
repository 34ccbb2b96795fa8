"""Int8 inputs times a latent weight that is quantized on the way."""

import jax
from jax import numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.quantized_train_matmul import gpu
from pallas_kernels.quantized_train_matmul import reference
from pallas_kernels.quantized_train_matmul import tpu

IMPLEMENTATIONS = {
  'reference': reference.quantized_train_matmul,
  'tpu': tpu.quantized_train_matmul,
  'gpu': gpu.quantized_train_matmul,
}


def quantized_train_matmul(
  x_MK: jax.Array,
  x_scale_M1: jax.Array,
  w_KN: jax.Array,
  mean_1N: jax.Array,
  scale_1N: jax.Array,
  *,
  implementation: str | None = None,
  target: dispatch.Target | None = None,
) -> jax.Array:
  """(x @ sign(w - mean)) * w_scale * x_scale, with sign(0) = -1.

  The forward pass of BitNet (2310.11453) and pQuant (2602.22592, eq. 3-6). It
  has no derivative: the gradient that a trainer wants, straight-through, is
  not this product's own.

  Args:
    x_MK: int8 codes.
    x_scale_M1: float32 `[M, 1]`.
    w_KN: float32 or bfloat16.
    mean_1N: float32, `[1, 1]` or `[1, N]`.
    scale_1N: float32, `[1, 1]` or `[1, N]`.
    implementation: of `dispatch.TABLE`; None: the fastest that can run.
    target: the device to compile for; None: that of this process.

  Returns:
    float32 `[M, N]`.

  Raises:
    ValueError: shapes do not fit, or `implementation` cannot do this.
  """
  if x_MK.ndim != 2 or w_KN.ndim != 2 or x_MK.shape[1] != w_KN.shape[0]:
    raise ValueError(
      f'x has shape {x_MK.shape} and w {w_KN.shape}; want [M, K], [K, N].'
    )
  if x_MK.dtype != jnp.int8:
    raise ValueError(f'x is {x_MK.dtype}; want int8 codes.')
  for name, a in (('mean_1N', mean_1N), ('scale_1N', scale_1N)):
    if a.shape not in ((1, 1), (1, w_KN.shape[1])):
      raise ValueError(f'{name} has shape {a.shape}; want [1, 1] or [1, N].')
  if x_scale_M1.shape != (x_MK.shape[0], 1):
    raise ValueError(
      f'x_scale_M1 has shape {x_scale_M1.shape}; want {(x_MK.shape[0], 1)}.'
    )
  target = target or dispatch.here()
  call = dispatch.Call(target, x_MK.dtype.name, x_MK.shape[0])
  name = dispatch.choose('quantized_train_matmul', call, implementation)
  return IMPLEMENTATIONS[name](
    x_MK, x_scale_M1, w_KN, mean_1N, scale_1N, target
  )
