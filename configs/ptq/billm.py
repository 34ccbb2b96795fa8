r"""BiLLM (2402.04291): one bit a weight, two for salient inputs.

  python scripts/quantize.py --config=configs/ptq/billm.py --model=MODEL \
      --dataset=DATA --out=models/billm

What papers count as 1.1 bits is more than 2 when all that tells the parts of a
matrix apart is stored.
"""

from ml_collections import ConfigDict

from configs.ptq import common


def get_config() -> ConfigDict:
  """BiLLM as its code has it."""
  config = common.base('billm')
  config.method = options(rest_order=2)
  config.true_sequential = False  # As its code.
  return config.lock()


def options(rest_order: int) -> ConfigDict:
  """The fields of BiLLM, for methods that build on it as well.

  Args:
    rest_order: how often what is not salient is binarized while the number of
      salient inputs is looked for.
  """
  return ConfigDict(
    dict(
      block_size=128,  # Inputs that share the levels of an output.
      percdamp=0.01,  # Added to the Hessian's diagonal: a share of its mean.
      salient_limit=50,  # A block has fewer salient inputs than this.
      rest_order=rest_order,  # 2 in BiLLM's code, 1 in DBellQuant's.
    )
  )
