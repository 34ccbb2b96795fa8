r"""SliM-LLM (2405.14917): more bits for salient groups, fewer for others.

  python scripts/quantize.py --config=configs/ptq/slim_llm.py --model=MODEL \
      --dataset=DATA --out=models/slim2

As many groups get a bit more as get a bit less: the average is `bits`.
"""

from ml_collections import ConfigDict

from configs.ptq import common


def get_config() -> ConfigDict:
  """SliM-LLM at 2 bits with the groups of its paper's commands."""
  config = common.base('slim_llm')
  config.method = ConfigDict(
    dict(
      bits=2,  # Of a weight on average: 2 to 7.
      group_size=128,  # Inputs of a group; 0: one group.
      percdamp=0.01,  # Added to the Hessian's diagonal: a share of its mean.
      # Standard deviations above the mean of its group from which a weight's
      # salience makes it salient.
      salient_deviations=2.0,
      salient_weight=1.0,  # Of their errors in the search; 1: as any other.
      search_range=0.1,  # Shares of a group's range that are tried: 1 -+ this.
      search_steps=50,  # How many to each side.
    )
  )
  config.calibration.rows = 1024  # Inputs on which outputs are compared.
  config.true_sequential = False  # As its code.
  return config.lock()
