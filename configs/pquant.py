"""pQuant (arXiv 2602.22592): a wide 1-bit branch beside a narrow 8-bit one.

  python -m qat.main --config=configs/pquant.py:tiny --workdir=/tmp/pquant
  python -m qat.main --config=configs/pquant.py:tiny \
      --config.model.n_experts=8 --workdir=/tmp/pquant-8

Attention is BitNet's. Of the feed-forward layer's d_ff hidden units,
branch_width (the paper's r) form an 8-bit branch and the rest a 1-bit branch;
two learnable scalars weigh them. With n_experts > 1 a top-1 router chooses
among as many 8-bit branches.
"""

from configs import bitnet
from configs import common


def get_config(size: str = 'tiny'):
  """pQuant at `size` (a key of `common.SIZES`)."""
  config = common.base(size)
  config.name = f'pquant-{size}'
  bitnet.low_bit_recipe(config, size)
  config.model.ffn = 'decoupled'
  config.quant.rules = (('.*/ffn/narrow/.*', 'narrow'), ('.*', 'binary'))
  config.quant.specs = {
    'narrow': common.spec('int8', 'int8'),
    'binary': common.spec('binary', 'int8'),
  }
  return config.lock()
