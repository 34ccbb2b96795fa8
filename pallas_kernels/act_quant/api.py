"""RMSNorm and the int8 codes of each token, in one read of x."""

import jax
from jax import numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.act_quant import cpu
from pallas_kernels.act_quant import gpu
from pallas_kernels.act_quant import reference
from pallas_kernels.act_quant import tpu

IMPLEMENTATIONS = {
  'reference': reference.act_quant,
  'cpu': cpu.act_quant,
  'tpu': tpu.act_quant,
  'gpu': gpu.act_quant,
}


def act_quant(
  x_MD: jax.Array,
  gain_D: jax.Array,
  eps: float,
  *,
  implementation: str | None = None,
  target: dispatch.Target | None = None,
) -> tuple[jax.Array, jax.Array]:
  """y = x / sqrt(mean(x^2) + eps) * gain, rounded to int8 token by token.

  Codes are round(y * 127 / max |y|), half to even; max |y| is at least 1e-5.

  Args:
    x_MD: bfloat16 or float32 `[M, D]`; y is rounded to the same type.
    gain_D: float.
    eps: added to the mean square.
    implementation: of `dispatch.TABLE`; None: the fastest that can run.
    target: the device to compile for; None: that of this process.

  Returns:
    Codes, int8 `[M, D]`, and scales, float32 `[M, 1]`: y is codes * scales.

  Raises:
    ValueError: shapes do not fit, or `implementation` cannot do this.
  """
  if x_MD.ndim != 2 or gain_D.shape != x_MD.shape[1:]:
    raise ValueError(
      f'x has shape {x_MD.shape} and its gain {gain_D.shape}; want [M, D], [D].'
    )
  if x_MD.dtype not in (jnp.bfloat16, jnp.float32):
    raise ValueError(f'x is {x_MD.dtype}; want bfloat16 or float32.')
  target = target or dispatch.here()
  call = dispatch.Call(target, x_MD.dtype.name, x_MD.shape[0])
  name = dispatch.choose('act_quant', call, implementation)
  return IMPLEMENTATIONS[name](x_MD, gain_D, eps, target)
