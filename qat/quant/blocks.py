"""Which weights of a matrix share a scale, and a matrix seen block by block."""

import jax

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
