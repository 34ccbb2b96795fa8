"""Which weights of a matrix share a scale, and a matrix seen block by block."""

from collections.abc import Sequence

import jax
from jax import lax
from jax import numpy as jnp

# By granularity: the axes of `[..., G, K / G, N]` whose entries share a scale.
# 'tensor' is one scale a matrix, 'channel' one for each output column, 'group'
# one for each `group_size` weights of a column that follow each other.
AXES: dict[str, tuple[int, ...]] = {
  'tensor': (-2, -1),
  'channel': (-2,),
  'group': (-2,),
}


def check(granularity: str, group_size: int, width: int) -> None:
  """Raises a ValueError where a matrix of `width` inputs has no such blocks."""
  if granularity not in AXES:
    raise ValueError(
      f'No granularity {granularity!r}; choose one of {list(AXES)}.'
    )
  if granularity == 'group':
    check_groups(group_size, width, "granularity='channel'")


def check_groups(group_size: int, width: int, otherwise: str) -> None:
  """Raises a ValueError where `width` inputs make no whole groups.

  Args:
    group_size: inputs of a group.
    width: inputs of a layer.
    otherwise: what to choose instead of groups, as a config says it.
  """
  if group_size < 1 or width % group_size:
    raise ValueError(
      f'group_size={group_size} does not divide the {width} inputs of a'
      f' layer; take a divisor of them, or {otherwise}.'
    )


def split(
  w_KN: jax.Array, granularity: str, group_size: int
) -> tuple[jax.Array, tuple[int, ...]]:
  """A matrix as its groups of inputs, and the axes whose entries share a scale.

  Args:
    w_KN: `[..., K, N]`.
    granularity: a key of `AXES`.
    group_size: of 'group': inputs that share a scale.

  Returns:
    `w_GIN`, `[..., G, K / G, N]`, where G is 1 unless there are groups, and
    axes of it.
  """
  width = w_KN.shape[-2]
  check(granularity, group_size, width)
  groups = width // group_size if granularity == 'group' else 1
  *stack, _, columns = w_KN.shape
  w_GIN = w_KN.reshape(*stack, groups, width // groups, columns)
  return w_GIN, AXES[granularity]


def merge(w_GIN: jax.Array) -> jax.Array:
  """The matrix `[..., K, N]` of `split`; of scales, `[..., G, 1 or N]`."""
  *stack, groups, inputs, columns = w_GIN.shape
  return w_GIN.reshape(*stack, groups * inputs, columns)


def absmax(x: jax.Array, axes: int | Sequence[int] | None = None) -> jax.Array:
  """max |x| along `axes`, which stay with length 1; NaN where there is one.

  XLA:CPU's maximum of several rows of floats may pass over a NaN. As integers
  such numbers have the same order, and NaN comes last. It has no gradient.

  Args:
    x: float32.
    axes: None: all; 0 of no entries.
  """
  size = jnp.abs(lax.stop_gradient(x))
  bits = lax.bitcast_convert_type(size, jnp.int32)
  most = jnp.max(bits, axes, keepdims=True, initial=0)
  return lax.bitcast_convert_type(most, jnp.float32)


def extent(
  x: jax.Array, axes: int | Sequence[int] | None = None
) -> tuple[jax.Array, jax.Array]:
  """min(x, 0) and max(x, 0) along `axes`; both NaN where there is one.

  Args:
    x: float32.
    axes: as of `absmax`.
  """
  hidden = jnp.isnan(absmax(x, axes))
  ends = (
    reduce(x, axes, keepdims=True, initial=0) for reduce in (jnp.min, jnp.max)
  )
  least, most = (jnp.where(hidden, jnp.nan, end) for end in ends)
  return least, most
