r"""GPTQ (2210.17323): later inputs absorb the rounding errors of earlier ones.

  python scripts/quantize.py --config=configs/ptq/gptq.py --model=MODEL \
      --dataset=DATA --out=models/gptq4
  python scripts/quantize.py --config=configs/ptq/gptq.py --model=MODEL \
      --dataset=DATA --out=models/gptq3 --config.method.bits=3

About 20 seconds for each 10M parameters on two cores, 128 x 512 tokens.
"""

from ml_collections import ConfigDict

from configs.ptq import common


def get_config() -> ConfigDict:
  """GPTQ at 4 bits, a scale and a zero point for each output."""
  config = common.base('gptq')
  config.method = options(bits=4, mse=False)
  return config.lock()


def options(bits: int, mse: bool) -> ConfigDict:
  """The fields of GPTQ, for methods that build on it as well.

  Args:
    bits: of a code.
    mse: search for a smaller range with a smaller error.
  """
  return ConfigDict(
    dict(
      bits=bits,  # Of a code: 2, 3, 4, 6 or 8.
      group_size=0,  # Inputs that share a scale; 0: all of an output.
      symmetric=False,  # No zero point.
      mse=mse,  # Shares 1, 0.99, ..., 0.21 of the range; error |.|^2.4.
      percdamp=0.01,  # Added to the Hessian's diagonal: a share of its mean.
      act_order=False,  # Round inputs of large second moment first.
      static_groups=False,  # Fit the scales of groups before anything.
      block_size=128,  # Inputs between two updates of all later ones.
    )
  )
