"""OneBit (arXiv 2402.11295): signs with two learned vectors of scales.

  python -m qat.main --config=configs/onebit.py:tiny --workdir=/tmp/onebit

A weight is gain_in[k] * sign(w[k, n]) * gain_out[n]; the vectors start as the
rank-1 approximation of |W|. A LayerNorm without parameters ends each linear.
Inputs are not quantized. The paper distils from a trained model; here the model
is pretrained.
"""

from configs import common


def get_config(size: str = 'tiny'):
  """OneBit at `size` (a key of `common.SIZES`)."""
  config = common.base(size)
  config.name = f'onebit-{size}'
  # The paper gives no rate to pretrain with.
  config.optim.peak_lr = {'tiny': 2e-3, 'small': 2e-3}.get(size, 1e-3)
  config.quant.rules = (('.*', 'onebit'),)
  config.quant.specs = {
    'onebit': common.spec('onebit', 'none', 'channel', output_norm=True)
  }
  return config.lock()
