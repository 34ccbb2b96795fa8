r"""SmoothQuant (2211.10438): outliers of inputs moved into the weights.

  python scripts/quantize.py --config=configs/ptq/smoothquant.py --model=MODEL \
      --dataset=DATA --out=models/smooth-w8a8

Weights and inputs of 8 bits; the norm's gain takes the scales, so that nothing
is left to be done when the model runs.
"""

from ml_collections import ConfigDict

from configs.ptq import billm
from configs.ptq import common
from configs.ptq import rtn


def get_config(quantizer: str = 'rtn') -> ConfigDict:
  """The paper's O1: weights by matrix, inputs by token.

  Args:
    quantizer: 'rtn'; or 'billm', with alpha 0.85 and inputs of 16 bits: what
      DBellQuant's code does for OPT.
  """
  config = common.base('smoothquant')
  if quantizer == 'billm':
    config.method = ConfigDict(dict(alpha=0.85))
    config.quantizer = 'billm'
    config.quantizer_options = billm.options(rest_order=1)
    config.true_sequential = False
    return config.lock()
  if quantizer != 'rtn':
    raise ValueError(f'No setting {quantizer!r}; choose rtn or billm.')
  # The share of the difficulty that moves from the inputs to the weights. The
  # paper's for OPT; LLaMA takes 0.85.
  config.method = ConfigDict(dict(alpha=0.5))
  config.quantizer = 'rtn'
  config.quantizer_options = rtn.options(
    bits=8, granularity='tensor', symmetric=True
  )
  config.activation = 'int8'
  return config.lock()
