"""OmniQuant (2308.13137): a grid's ends are learned, weights are not.

Learnable weight clipping (`qat.quant.clipped`): a grid covers shares of the
range of the weights, sigmoid(u) and sigmoid(l) of its ends, and u and l are
trained so that a block of the model gives what it gave before.

Beside it the paper trains equivalent transformations, which change no output
before quantization (`omniquant_transforms`); `omniquant_train` is the training.
"""

from collections.abc import Mapping
import dataclasses
import functools

import jax
from jax import numpy as jnp

from qat.quant import blocks
from qat.quant import clipped
from qat.quant import grid
from qat.quant import qtensor


@dataclasses.dataclass(frozen=True)
class Options:
  """The fields of `config.method`, named as in the released code.

  Attributes:
    bits: of a code: 2, 3, 4, 6 or 8.
    group_size: inputs of an output that share a grid; 0: all.
    symmetric: whether there is no zero point.
    lwc_init: u and l at the start; where sigmoid is 1 it is round to nearest.
    lwc_lr: learning rate of u and l.
    let: whether equivalent transformations are learned.
    let_shift: whether they also shift, where norms and layers have biases.
    let_qk: whether queries and keys are scaled against each other.
    let_v_ones: whether scales of v against o start at 1, as in ZeroQAT's code;
      else at SmoothQuant's.
    let_lr: learning rate of the transformations.
    alpha: of SmoothQuant's scales, at which they start.
    epochs: passes over the calibration sequences for each block.
    batch_size: sequences of a step.
    aug_loss: whether the block is also to give what the block in full precision
      gives on the inputs that the quantized model has.
  """

  bits: int
  group_size: int
  symmetric: bool
  lwc_init: float
  lwc_lr: float
  let: bool
  let_shift: bool
  let_qk: bool
  let_v_ones: bool
  let_lr: float
  alpha: float
  epochs: int
  batch_size: int
  aug_loss: bool


def check(options: Options, shape: tuple[int, int]) -> None:
  """Raises a ValueError for options that do not fit a matrix.

  Args:
    options: to check.
    shape: of the matrix, (K, N).
  """
  grid.check_bits(options.bits)
  if options.group_size:
    blocks.check_groups(options.group_size, shape[0], 'group_size=0')
  for name, fine, want in (
    ('lwc_lr', options.lwc_lr >= 0, 'at least 0'),
    ('let_lr', options.let_lr >= 0, 'at least 0'),
    ('alpha', 0 <= options.alpha <= 1, 'from 0 to 1'),
    ('epochs', options.epochs >= 0, 'at least 0'),
    ('batch_size', options.batch_size >= 1, 'at least 1'),
  ):
    if not fine:
      raise ValueError(f'{name}={getattr(options, name)!r} must be {want}.')
  for name in ('let_shift', 'let_qk', 'let_v_ones'):
    if getattr(options, name) and not options.let:
      raise ValueError(
        f'{name}=True with let=False: a part of the transformations, of which'
        ' there are none. Set let=True too.'
      )


def start(
  name: str, shape: tuple[int, int], options: Options
) -> dict[str, jax.Array]:
  """u and l of a matrix before training, as `clip` finds them.

  Args:
    name: of the layer.
    shape: of the matrix, (K, N).
    options: see there.
  """
  groups = shape[0] // options.group_size if options.group_size else 1
  first = jnp.full((groups, 1, shape[1]), options.lwc_init, jnp.float32)
  return {f'{name}/high': first, f'{name}/low': first}


def clip(learned: Mapping[str, jax.Array], name: str) -> clipped.Clip:
  """u and l of the layer `name` among all that a block has learned."""
  return learned[f'{name}/high'], learned[f'{name}/low']


@functools.partial(jax.jit, static_argnames='options')
def quantize(
  w_KN: jax.Array, clip: clipped.Clip, options: Options
) -> qtensor.QTensor:
  """Weights rounded to the grids of clipped ranges.

  Raises:
    ValueError: for options that do not fit.
  """
  check(options, w_KN.shape)
  w_GIN = _split(w_KN, options)
  return clipped.quantize(w_GIN, clip, options.bits, options.symmetric)


def fake_quantize(
  w_KN: jax.Array, clip: clipped.Clip, options: Options
) -> jax.Array:
  """The values of `quantize`, with gradients for weights, u and l."""
  w_GIN = _split(w_KN, options)
  return clipped.fake_quantize(w_GIN, clip, options.bits, options.symmetric)


def _split(w_KN: jax.Array, options: Options) -> jax.Array:
  by = 'group' if options.group_size else 'channel'
  return blocks.split(w_KN.astype(jnp.float32), by, options.group_size)[0]
