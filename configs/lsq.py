"""LSQ (arXiv 1902.08153): 4-bit or 3-bit integers with a learned step.

  python -m qat.main --config=configs/lsq.py:tiny --workdir=/tmp/lsq
  python -m qat.main --config=configs/lsq.py:tiny \
      --config.quant.specs.lsq.weight=lsq3 --workdir=/tmp/lsq3

One step for each output column ('tensor': one for a matrix, as in the paper);
inputs are AbsMax int8 by token rather than the paper's learned steps.
"""

from configs import common


def get_config(size: str = 'tiny'):
  """LSQ at `size` (a key of `common.SIZES`)."""
  config = common.base(size)
  config.name = f'lsq-{size}'
  # The paper's rates are of image models; these are ours.
  config.optim.peak_lr = {'tiny': 2e-3, 'small': 2e-3}.get(size, 1e-3)
  config.quant.rules = (('.*', 'lsq'),)
  config.quant.specs = {'lsq': common.spec('lsq4', 'int8', 'channel')}
  return config.lock()
