"""Small unsigned numbers packed into bytes, and back.

NumPy on the host, in pieces that stay in the processor's cache.
"""

import numpy as np

_PIECE = 1 << 18  # Codes that are packed at once; a multiple of 8.
_TRITS = 3 ** np.arange(5, dtype=np.uint8)


def planes(codes: np.ndarray, bits: int) -> np.ndarray:
  """Bit planes of unsigned codes.

  Args:
    codes: uint8 of any shape, below 2^bits.
    bits: 0 to 8.

  Returns:
    uint8 `[bits, ceil(size / 8)]`; bit i of a plane's byte j is of code
    8 j + i, and the last byte is filled up with zeros.
  """
  flat = codes.reshape(-1)
  packed = np.empty((bits, -(-flat.size // 8)), np.uint8)
  for start in range(0, flat.size, _PIECE):
    piece = flat[start : start + _PIECE]
    for b in range(bits):
      bytes_ = np.packbits(piece & np.uint8(1 << b), bitorder='little')
      packed[b, start // 8 : start // 8 + bytes_.size] = bytes_
  return packed


def unplane(
  packed: np.ndarray, bits: int, shape: tuple[int, ...]
) -> np.ndarray:
  """The codes of `planes`, uint8 of `shape`."""
  size = int(np.prod(shape))
  want = (bits, -(-size // 8))
  check_array(packed, want)
  flat = np.zeros(size, np.uint8)
  for start in range(0, size, _PIECE):
    piece = flat[start : start + _PIECE]
    for b in range(bits):
      bytes_ = packed[b, start // 8 : -(-(start + piece.size) // 8)]
      ones = np.unpackbits(bytes_, count=piece.size, bitorder='little')
      piece |= ones << np.uint8(b)
  return flat.reshape(shape)


def trits(codes: np.ndarray) -> np.ndarray:
  """Five codes below 3 to a byte: those that lie a fifth of all apart."""
  flat = codes.reshape(-1)
  width = -(-flat.size // 5)
  packed = np.zeros(width, np.uint8)
  for i in range(5):
    fifth = flat[i * width : (i + 1) * width]
    packed[: fifth.size] += fifth * _TRITS[i]
  return packed


def untrit(packed: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """The codes of `trits`, uint8 of `shape`."""
  size = int(np.prod(shape))
  width = -(-size // 5)
  check_array(packed, (width,))
  check_below(packed, 3**5, 'five trits')
  digits = np.arange(256)[:, None] // _TRITS % 3
  fifths = [digits.astype(np.uint8)[:, i][packed] for i in range(5)]
  return np.concatenate(fifths)[:size].reshape(shape)


def signed(codes: np.ndarray, bits: int) -> np.ndarray:
  """Two's complement of `bits` bits, uint8, as int8."""
  free = np.uint8(8 - bits)
  return (codes << free).view(np.int8) >> free.view(np.int8)


def check_array(packed: np.ndarray, shape: tuple[int, ...]) -> None:
  """Raises a ValueError for packed codes of another shape or dtype."""
  if packed.dtype != np.uint8 or packed.shape != shape:
    raise ValueError(
      f'Packed codes are {packed.dtype}{list(packed.shape)}; these weights'
      f' need uint8{list(shape)}.'
    )


def check_below(values: np.ndarray, limit: int, what: str) -> None:
  """Raises a ValueError where one of the unsigned values is too large."""
  if limit < 256 and values.size and values.max() >= limit:
    raise ValueError(f'{what} is {values.max()}; it has to be below {limit}.')
