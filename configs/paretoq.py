"""ParetoQ (arXiv 2502.02631): 1, 1.58 or 2 bits with learned scales.

  python -m qat.main --config=configs/paretoq.py:tiny --workdir=/tmp/paretoq
  python -m qat.main --config=configs/paretoq.py:tiny \
      --config.quant.specs.paretoq.weight=paretoq_ternary \
      --workdir=/tmp/paretoq3

One learned scale for each output column; 'paretoq1' is sign(w) times it,
'paretoq_ternary' and 'paretoq2' are the stretched elastic quantizer, and the
paper's 3 and 4 bits are 'lsq3' and 'lsq4'. Inputs are not quantized. The paper
fine-tunes a trained model (rate 2e-5); here the model is pretrained.
"""

from configs import common


def get_config(size: str = 'tiny'):
  """ParetoQ at `size` (a key of `common.SIZES`)."""
  config = common.base(size)
  config.name = f'paretoq-{size}'
  config.optim.peak_lr = {'tiny': 2e-3, 'small': 2e-3}.get(size, 1e-3)
  config.optim.weight_decay = 0.0  # As the paper's.
  config.quant.rules = (('.*', 'paretoq'),)
  config.quant.specs = {'paretoq': common.spec('paretoq2', 'none', 'channel')}
  return config.lock()
