"""Integers by AbsMax or min and max: the plain formats, 2 to 8 bits.

  python -m qat.main --config=configs/integer.py:tiny --workdir=/tmp/int4
  python -m qat.main --config=configs/integer.py:tiny \
      --config.quant.specs.integer.weight=int2_asym \
      --config.quant.specs.integer.granularity=group --workdir=/tmp/int2

Nothing is learned beside the weights. 'int2' to 'int8' are symmetric, those
with '_asym' have a zero point; a scale for a matrix, an output column, or a
group of 64 of its inputs. Also 'fp8', and 'int4' for inputs.
"""

from configs import common


def get_config(size: str = 'tiny'):
  """Integers at `size` (a key of `common.SIZES`)."""
  config = common.base(size)
  config.name = f'integer-{size}'
  config.optim.peak_lr = {'tiny': 2e-3, 'small': 2e-3}.get(size, 1e-3)
  config.quant.rules = (('.*', 'integer'),)
  config.quant.specs = {'integer': common.spec('int4', 'int8', 'channel')}
  return config.lock()
