r"""TaCQ (2504.07389): keep the weights on which a task hangs in 16 bits.

  python scripts/quantize.py --config=configs/ptq/tacq.py --model=MODEL \
      --dataset=DATA --out=models/tacq3
  python scripts/quantize.py --config=configs/ptq/tacq.py --model=MODEL \
      --out=models/tacq2-task --config.quantizer_options.bits=2 \
      --config.calibration.prompts=task.jsonl --no-eval

Takes about twice as long as GPTQ, and the gradients of every example beside it.
"""

from ml_collections import ConfigDict

from configs.ptq import common
from configs.ptq import gptq


def get_config() -> ConfigDict:
  """TaCQ at 3 bits, 0.35 % of the weights kept, as the paper's scripts do."""
  config = common.base('tacq')
  config.method = ConfigDict(dict(share=0.0035))  # Of all weights: those kept.
  config.quantizer = 'gptq'
  config.quantizer_options = gptq.options(bits=3, mse=True)
  # The copy that tells how wrong each weight would be: GPTQ's own script, with
  # as many bits, and without the search for a range.
  config.corrupt = gptq.options(bits=3, mse=False)
  config.corrupt.bits = config.quantizer_options.get_ref('bits')
  return config.lock()
