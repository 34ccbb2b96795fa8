"""What a model has to beat: the code length of a text by simpler means."""

from collections.abc import Iterable
import zlib

import numpy as np


def gzip_bits(parts: Iterable[bytes]) -> int:
  """Bits of a text, given in parts, as `gzip -9` packs it."""
  packer = zlib.compressobj(9, zlib.DEFLATED, zlib.MAX_WBITS | 16)
  size = sum(len(packer.compress(part)) for part in parts)
  return 8 * (size + len(packer.flush()))


def unigram_bits(train_V: np.ndarray, valid_V: np.ndarray) -> float:
  """Bits of a text under a unigram model with add-one smoothing.

  Args:
    train_V: how often each token occurs in the text that the model is of.
    valid_V: how often it occurs in the text that is measured.

  Returns:
    The code length of the second text.
  """
  p_V = (train_V + 1) / (train_V.sum() + len(train_V))
  return float(-(valid_V @ np.log2(p_V)))
