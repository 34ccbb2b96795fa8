"""pQuant (arXiv 2602.22592): a wide 1-bit branch beside a narrow 8-bit one.

  python -m qat.main --config=configs/pquant.py:tiny --workdir=/tmp/pquant
  python -m qat.main --config=configs/pquant.py:tiny,n8 --workdir=/tmp/pquant-8
  python -m qat.main --config=configs/pquant.py:700m,no_scaling \
      --workdir=/tmp/unscaled

Attention is BitNet's. Of the feed-forward layer's d_ff hidden units,
branch_width (the paper's r) form an 8-bit branch and the rest a 1-bit branch;
two learnable scalars weigh them. With n_experts > 1 a router chooses among as
many 8-bit branches.

After the size and a comma stands the name of an ablation of the paper, a key of
`ABLATIONS`; docs/methods/pquant.md has the paper's number for each.
"""

from configs import bitnet
from configs import common

# BitNet itself, whose scales or weights then change.
_BITNET = {'model.ffn': 'gated', 'quant.rules': (('.*', 'binary'),)}

# By name: the fields that change. Section 4.6 and figures 5(b) and 7.
ABLATIONS: dict[str, dict] = {
  # The scalars of the two branches.
  'no_scaling': {'model.feature_scaling': False},
  'scaling_1_05': {'model.alpha_init': 1.0, 'model.beta_init': 0.5},
  'scaling_2_02': {'model.alpha_init': 2.0, 'model.beta_init': 0.2},
  # The width of the narrow branch, at 700m; its own is 256.
  'r64': {'model.branch_width': 64, 'model.branch_multiple': 64},
  'r128': {'model.branch_width': 128},
  'r256': {'model.branch_width': 256},
  'r384': {'model.branch_width': 384},
  'r512': {'model.branch_width': 512},
  'r768': {'model.branch_width': 768},
  # The number of narrow branches, and how many of them a token meets.
  'n1': {'model.n_experts': 1},
  'n2': {'model.n_experts': 2},
  'n4': {'model.n_experts': 4},
  'n8': {'model.n_experts': 8},
  'r768_n2_both': {
    'model.branch_width': 768,
    'model.n_experts': 2,
    'model.experts_per_token': 2,
  },
  # What the narrow branch is made of, instead of 8-bit integers.
  'fp16': {
    'quant.specs.narrow.weight': 'none',
    'quant.specs.narrow.activation': 'none',
  },
  'fp8': {'quant.specs.narrow.weight': 'fp8'},
  'int4': {'quant.specs.narrow.weight': 'int4'},
  # Instead of a narrow branch: finer scales, or some exact weights, in BitNet.
  'channel': {**_BITNET, 'quant.specs.binary.granularity': 'channel'},
  'group': {
    **_BITNET,
    'quant.specs.binary.granularity': 'group',
    'quant.specs.binary.group_size': 64,
  },
  'native_mix': {
    **_BITNET,
    'quant.specs.binary.weight': 'binary_mix',
    'quant.specs.binary.kept_share': 0.08,
  },
}


def get_config(variant: str = 'tiny'):
  """pQuant, or one of its ablations.

  Args:
    variant: a key of `common.SIZES`; or that, a comma and a key of `ABLATIONS`.

  Raises:
    ValueError: if there is no such size or ablation.
  """
  size, comma, ablation = variant.partition(',')
  config = common.base(size)
  config.name = f'pquant-{size}'
  bitnet.low_bit_recipe(config, size)
  config.model.ffn = 'decoupled'
  config.quant.rules = (('.*/ffn/narrow/.*', 'narrow'), ('.*', 'binary'))
  config.quant.specs = {
    'narrow': common.spec('int8', 'int8'),
    'binary': common.spec('binary', 'int8'),
  }
  if comma:
    if ablation not in ABLATIONS:
      raise ValueError(
        f'No ablation {ablation!r}; choose one of {", ".join(ABLATIONS)}.'
      )
    config.name = f'pquant-{size}-{ablation}'
    config.update_from_flattened_dict(ABLATIONS[ablation])
  return config.lock()
