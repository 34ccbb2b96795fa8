r"""DBellQuant (2507.01027): trained scales of the inputs, then BiLLM.

  python scripts/quantize.py --config=configs/ptq/dbellquant.py --model=MODEL \
      --dataset=DATA --out=models/dbell-a16
  python scripts/quantize.py --config=configs/ptq/dbellquant.py --model=MODEL \
      --dataset=DATA --out=models/dbell-a8 --config.activation=int8

The paper's inputs have 16, 8 and 6 bits. Calibration runs with inputs quantized
as in the result. Its code does not train OPT, but takes SmoothQuant's scales:
--config=configs/ptq/smoothquant.py:billm.
"""

from ml_collections import ConfigDict

from configs.ptq import billm
from configs.ptq import common


def get_config() -> ConfigDict:
  """DBellQuant as its code has it."""
  config = common.base('dbellquant')
  config.method = ConfigDict(
    dict(
      epsilon=0.85,  # How much of an input's range moves at the start: 0 to 1.
      lr=0.01,  # Of plain gradient descent.
      epochs=200,  # Steps at most; 0: the scales stay as at the start.
      block_size=128,  # Inputs that are trained together.
      # Of the distance in the loss: 2 as released; 1, a reconstruction, which
      # the paper's table 5 finds better.
      power=2,
      # Of DTMD in the loss, a reconstruction; 0: it only ends the training.
      dtmd_weight=0.0,
    )
  )
  config.quantizer = 'billm'
  config.quantizer_options = billm.options(rest_order=1)
  config.true_sequential = False  # As BiLLM's code, which it uses.
  return config.lock()
