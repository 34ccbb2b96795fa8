r"""Round to nearest, the baseline that needs nothing but the weights.

  python scripts/quantize.py --config=configs/ptq/rtn.py --model=MODEL \
      --out=models/rtn4 --no-eval

Seconds for a model of 100M parameters on two cores. How much
a model loses depends on how much it has learned: docs/results.md.
"""

from ml_collections import ConfigDict

from configs.ptq import common


def get_config() -> ConfigDict:
  """RTN at 4 bits, a scale and a zero point for each output."""
  config = common.base('rtn')
  config.method = options(bits=4, granularity='channel', symmetric=False)
  return config.lock()


def options(bits: int, granularity: str, symmetric: bool) -> ConfigDict:
  """The fields of RTN, for methods that build on it as well.

  Args:
    bits: of a code.
    granularity: which weights share a scale.
    symmetric: no zero point.
  """
  return ConfigDict(
    dict(
      bits=bits,  # Of a code: 2, 3, 4, 6 or 8.
      granularity=granularity,  # 'tensor', 'channel' (output) or 'group'.
      group_size=128,  # Of 'group': inputs of an output that share a scale.
      symmetric=symmetric,  # No zero point.
      mse=False,  # Search for a smaller range with a smaller error.
    )
  )
