r"""SpQR (2306.03078): GPTQ on small groups, and outliers kept in 16 bits.

  python scripts/quantize.py --config=configs/ptq/spqr.py --model=MODEL \
      --dataset=DATA --out=models/spqr3

Takes somewhat longer than GPTQ.
"""

from ml_collections import ConfigDict

from configs.ptq import common


def get_config() -> ConfigDict:
  """SpQR at 3 bits with the paper's groups of 16."""
  config = common.base('spqr')
  config.method = ConfigDict(
    dict(
      bits=3,  # Of a code: 2, 3, 4, 6 or 8.
      group_size=16,  # Inputs that share a scale; 0: all of an output.
      scale_bits=3,  # Of a scale's code; 0: scales are float16.
      zero_bits=3,  # Of a zero point's code; 0: integers of `bits`.
      second_group_size=16,  # Outputs whose scales share a grid.
      # A weight is kept where its error is above this share of the mean
      # variance of an input's weights, in the Hessian's units; 0: none is.
      outlier_threshold=0.2,
      simplified_outliers=False,  # Fit scales to likely outliers, too.
      percdamp=0.01,  # Added to the Hessian's diagonal: a share of its mean.
      act_order=False,  # Round inputs of large second moment first.
      block_size=128,  # Inputs between two updates of all later ones.
    )
  )
  return config.lock()
