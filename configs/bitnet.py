"""BitNet b1 (arXiv 2310.11453): 1-bit weights, 8-bit activations.

  python -m qat.main --config=configs/bitnet.py:tiny --workdir=/tmp/bitnet

sign(W - mean W) times mean |W| in every linear of the blocks; RMSNorm and
per-token absmax int8 inside each; pQuant's two-phase recipe, which the paper
gives its BitNet baseline too.
"""

from configs import common


def get_config(size: str = 'tiny'):
  """BitNet at `size` (a key of `common.SIZES`)."""
  config = common.base(size)
  config.name = f'bitnet-{size}'
  low_bit_recipe(config, size)
  config.quant.rules = (('.*', 'binary'),)
  config.quant.specs = {'binary': common.spec('binary', 'int8')}
  return config.lock()


def low_bit_recipe(config, size: str) -> None:
  """What BitNet, b1.58 and pQuant share: norm placement and the schedule."""
  config.model.norm = 'inside'
  config.optim.schedule = 'two_phase'
  config.optim.second_weight_decay = 0.0
  # TIPS table 2: 1.5e-3 -> 1e-3 at 700M, 1.2e-3 -> 8e-4 above.
  config.optim.peak_lr = {
    'tiny': 4e-3,
    'small': 2e-3,
    '300m': 1.5e-3,
    '700m': 1.5e-3,
  }.get(size, 1.2e-3)
