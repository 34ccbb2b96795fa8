r"""OmniQuant (2308.13137): clipping and transformations trained block by block.

  python scripts/quantize.py --config=configs/ptq/omniquant.py --model=MODEL \
      --dataset=DATA --out=models/omniquant-w4
  python scripts/quantize.py --config=configs/ptq/omniquant.py:w2a16 \
      --model=MODEL --dataset=DATA --out=models/omniquant-w2
  python scripts/quantize.py --config=configs/ptq/omniquant.py:w4a4 \
      --model=MODEL --dataset=DATA --out=models/omniquant-w4a4
  python scripts/quantize.py --config=configs/ptq/omniquant.py:zeroqat-w4a4 \
      --model=MODEL --dataset=DATA --out=models/zeroqat-start

Each block is trained for `epochs` times 128 steps, of one sequence of 2048
tokens each. Fewer sequences, or epochs, take as much less. The settings of
ZeroQAT (2509.00031) are a short such training, and a model to be trained on.
"""

from typing import Any

from ml_collections import ConfigDict

from configs.ptq import common

_ZEROQAT = dict(lwc_init=3.0, lwc_lr=1e-2, let_lr=1e-2, aug_loss=True)

# By the bits of weights and of inputs: fields that differ from the first. Of
# LLaMA; for OPT with quantized inputs the papers shift, too (let_shift=True),
# and OmniQuant starts from alpha 0.5, ZeroQAT from 0.75.
SETTINGS: dict[str, dict[str, Any]] = {
  'w4a16': {},
  'w2a16': dict(bits=2, epochs=40, aug_loss=True),
  'w4a4': dict(let=True, alpha=0.75),
  'zeroqat-w4a4': dict(
    **_ZEROQAT, epochs=2, let=True, let_v_ones=True, alpha=0.75
  ),
  'zeroqat-w2a16': dict(**_ZEROQAT, epochs=4, bits=2, group_size=128),
}


def get_config(setting: str = 'w4a16') -> ConfigDict:
  """OmniQuant as its scripts run it.

  Args:
    setting: a key of `SETTINGS`.
  """
  if setting not in SETTINGS:
    raise ValueError(
      f'No setting {setting!r}; choose one of {", ".join(SETTINGS)}.'
    )
  config = common.base('omniquant')
  config.method = ConfigDict(
    dict(
      bits=4,  # Of a code: 2, 3, 4, 6 or 8.
      group_size=0,  # Inputs of an output that share a grid; 0: all.
      symmetric=False,  # No zero point.
      # u and l of the clipping at the start: 0.982 of the range.
      lwc_init=4.0,
      lwc_lr=1e-2,
      # Equivalent transformations. Without quantized inputs they help OPT only,
      # and the paper leaves LLaMA without.
      let=False,
      let_shift=False,  # Where norms and layers have biases.
      # Queries against keys, as the paper does, whose products are of quantized
      # numbers. Here they are not, and such scales change nothing.
      let_qk=False,
      let_v_ones=False,  # Scales of v against o start at 1.
      let_lr=5e-3,  # 1e-3 in some of the released scripts.
      alpha=0.5,  # Of SmoothQuant's scales, from which they start.
      epochs=20,
      batch_size=1,
      # The block is also to give what it gives in full precision on the inputs
      # that the quantized model has.
      aug_loss=False,
    )
  )
  config.method.update(SETTINGS[setting])
  # Matrices stay in float, with transformations folded in and u and l beside
  # them, in the formats 'lwc2', ... of quant.rules: a model to be trained on.
  config.latent = setting.startswith('zeroqat')
  if setting.endswith('a4'):
    config.activation = 'int4_asym'
  return config.lock()
