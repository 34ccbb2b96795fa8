"""BitNet b1.58 (arXiv 2402.17764): ternary weights, 8-bit activations.

  python -m qat.main --config=configs/bitnet_b158.py:tiny --workdir=/tmp/b158

round(W / mean |W|) clipped to {-1, 0, 1} in every linear of the blocks, with
the recipe of "The Era of 1-bit LLMs: Training Tips, Code and FAQ" (TIPS).
"""

from configs import bitnet
from configs import common


def get_config(size: str = 'tiny'):
  """BitNet b1.58 at `size` (a key of `common.SIZES`)."""
  config = common.base(size)
  config.name = f'bitnet_b158-{size}'
  bitnet.low_bit_recipe(config, size)
  if size in common.PAPER_SIZES:
    config.optim.warmup_steps = 375  # TIPS table 2.
  config.quant.rules = (('.*', 'ternary'),)
  config.quant.specs = {'ternary': common.spec('ternary', 'int8')}
  return config.lock()
