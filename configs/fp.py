"""Full precision: the LLaMA-style baseline that every method is measured by.

  python -m qat.main --config=configs/fp.py:tiny --workdir=/tmp/fp

Cosine schedule, RMSNorm before each sub-layer, nothing quantized.
"""

from configs import common


def get_config(size: str = 'tiny'):
  """Full precision at `size` (a key of `common.SIZES`)."""
  config = common.base(size)
  config.name = f'fp-{size}'
  # TIPS table 2 trains full-precision LLaMA at 2.5e-4 (700M), 2e-4 above.
  config.optim.peak_lr = {
    'tiny': 2e-3,
    'small': 2e-3,
    '300m': 3e-4,
    '700m': 2.5e-4,
  }.get(size, 2e-4)
  if size in common.PAPER_SIZES:
    config.data.batch_size = 2048  # 4M tokens, as the paper's LLaMA baseline.
    config.train.steps = 25_000  # 100B tokens.
  return config.lock()
