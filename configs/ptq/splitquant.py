r"""SplitQuantV2 (2503.07657): three clusters of weights, a grid for each.

  python scripts/quantize.py --config=configs/ptq/splitquant.py --model=MODEL \
      --out=models/splitquant4 --no-eval

No calibration data and no accelerator. Three codes of 4 bits are stored for
each weight; --config.method.storage=masked stores one and its cluster, which
is an extension of ours.
"""

from ml_collections import ConfigDict

from configs.ptq import common


def get_config() -> ConfigDict:
  """SplitQuantV2 at 4 bits as far as it is published."""
  config = common.base('splitquant')
  config.method = ConfigDict(
    dict(
      bits=4,  # Of a code: 2, 3, 4, 6 or 8.
      # What shares a scale in each of the three layers: 'tensor', a
      # reconstruction, for the paper does not say, or 'channel'.
      granularity='tensor',
      storage='sum',  # 'sum': three layers; 'masked': one and its clusters.
      bias='split',  # 'split': as a matrix; 'keep': as it is.
    )
  )
  return config.lock()
