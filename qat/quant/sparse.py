"""The few values of an array that are not 0, with their places, in 32 bits.

NumPy on the host.
"""

import numpy as np

_FAR = 2**16 - 1  # The largest distance that 16 bits hold.


def pack(values: np.ndarray, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Values and the distance of each from the one before it, uint16.

  A distance that 16 bits cannot hold is walked in steps of the largest that
  they can, each onto a value of 0.

  Args:
    values: uint16, one axis.
    kept: indices of those that are not 0, rising.
  """
  gap = np.diff(kept, prepend=-1)
  steps = (gap - 1) // _FAR
  last = np.cumsum(steps + 1) - 1
  distance = np.full(last[-1] + 1 if last.size else 0, _FAR, np.uint16)
  distance[last] = gap - _FAR * steps
  stored = np.zeros_like(distance)
  stored[last] = values[kept]
  return stored, distance


def unpack(
  stored: np.ndarray, distance: np.ndarray, shape: tuple[int, ...]
) -> np.ndarray:
  """The array of `pack`, uint16 of `shape`.

  Raises:
    ValueError: a place is none of such an array.
  """
  values = np.zeros(int(np.prod(shape)), np.uint16)
  position = np.cumsum(distance, dtype=np.int64) - 1
  if position.size and (position[-1] >= values.size or position[0] < 0):
    raise ValueError(
      f'An exact weight lies outside of the {values.size} that there are.'
    )
  values[position] = stored
  return values.reshape(shape)
