"""Int8 codes of a few tokens, normed or not, in one call of the C++ extension.

XLA:CPU takes an operation for each step of it, and each of them takes longer
to begin than to do for a token.
"""

import jax
from jax import numpy as jnp
import numpy as np

from pallas_kernels import dispatch
from pallas_kernels import native


def act_quant(
  x_MD: jax.Array,
  gain_D: jax.Array,
  eps: float,
  target: dispatch.Target,
  variant: str | None = None,
) -> tuple[jax.Array, jax.Array]:
  """See `api.act_quant`; `variant` as of `codes`."""
  del target  # Its processor is asked what it can do.
  return _call(x_MD, gain_D.astype(jnp.float32), True, eps, variant)


def codes(
  x_MD: jax.Array, variant: str | None = None
) -> tuple[jax.Array, jax.Array]:
  """The codes and scales of x itself: with `act_quant` for y = x.

  XLA does not know how to split it over devices.

  Args:
    x_MD: bfloat16 or float32 `[M, D]`.
    variant: of `native.variants()`; None: the fastest.

  Returns:
    As `api.act_quant`.

  Raises:
    ValueError: no extension, or not this variant.
  """
  return _call(x_MD, jnp.zeros((0,), jnp.float32), False, 0.0, variant)


def _call(x_MD, gain_D, norm, eps, variant):
  call = jax.ffi.ffi_call(
    'qat_act_quant',
    (
      jax.ShapeDtypeStruct(x_MD.shape, jnp.int8),
      jax.ShapeDtypeStruct((x_MD.shape[0], 1), jnp.float32),
    ),
    vmap_method='sequential',
  )
  return call(
    *(x_MD, gain_D),
    norm=norm,
    eps=np.float32(eps),
    variant=native.number(variant),
  )
