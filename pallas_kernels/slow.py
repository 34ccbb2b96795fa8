"""NumPy, one number at a time: what packing and the kernels are tested by."""

import numpy as np

from pallas_kernels import packing


def pack(
  codes_KN: np.ndarray, format: str, block: int, multiple: int = 1
) -> np.ndarray:
  """The bytes of one matrix, with N last: int8 `[bytes, N]`."""
  planes, base, step, low = packing.FORMATS[format]
  inputs, outputs = codes_KN.shape
  blocks = -(-inputs // (planes * block))
  columns = -(-outputs // multiple) * multiple
  data = np.zeros((blocks * block, columns), np.uint8)
  for k in range(inputs):
    n, inside = divmod(k, planes * block)
    b, r = divmod(inside, block)
    for column in range(outputs):
      index = (int(codes_KN[k, column]) - low) // step
      data[n * block + r, column] += (index * base**b) % 256
  return data.view(np.int8)


def unpack(
  data: np.ndarray, format: str, block: int, inputs: int, outputs: int
) -> np.ndarray:
  """The codes in the bytes of one matrix, with N last: int8 `[K, N]`."""
  planes, base, step, low = packing.FORMATS[format]
  codes_KN = np.zeros((inputs, outputs), np.int8)
  for k in range(inputs):
    n, inside = divmod(k, planes * block)
    b, r = divmod(inside, block)
    for column in range(outputs):
      byte = int(data[n * block + r, column])
      index = byte if planes == 1 else (byte % 256) // base**b % base
      codes_KN[k, column] = step * index + low
  return codes_KN


def matmul(x_MK, codes_KN, scale_M1, scale_1N) -> np.ndarray:
  """(x @ codes) * scales in float64; exact sums where x holds integers."""
  y_MN = np.asarray(x_MK, np.float64) @ np.asarray(codes_KN, np.float64)
  return y_MN * np.asarray(scale_M1, np.float64) * np.asarray(scale_1N)
