"""What a block keeps for the backward pass; the rest is computed again.

Under `model.remat='dots'` a block keeps, beside its input, what is named here:

  product    what a product of floats returns, as the backward pass reads it
  attention  what attention returns

What a product of int8 codes returns is not among them: it is as large as that
of a float product, but to multiply again costs half as much. Nor are codes, for
no product can be left out where only they are kept.
"""

import jax
from jax import ad_checkpoint

from qat.quant import rules

_NAMED = jax.checkpoint_policies.save_only_these_names('product', 'attention')


def _dots(primitive, *avals, **parameters) -> bool:
  # cuDNN's attention returns, beside the output, what its backward pass reads.
  if primitive.name.startswith('dot_product_attention_fwd'):
    return True
  return _NAMED(primitive, *avals, **parameters)


# By `model.remat`; None keeps a block's input alone. 'none' has no policy.
POLICIES = {'block': None, 'dots': _dots}


def product(
  y: jax.Array, spec: rules.Spec, mix: jax.Array | None = None
) -> jax.Array:
  """Names what a linear layer with `spec` returned, if it multiplied floats.

  Args:
    y: the output, in the dtype in which it is read.
    spec: the layer's.
    mix: as in `operand_lib.make_input`; annealed products are of floats.
  """
  codes = mix is None and 'none' not in (spec.weight, spec.activation)
  return y if codes else ad_checkpoint.checkpoint_name(y, 'product')


def attention(y_BTNH: jax.Array, form: str) -> jax.Array:
  """Names the output of attention; cuDNN's is kept as it is.

  Args:
    y_BTNH: the output.
    form: as in `attention.causal_attention`.
  """
  if form == 'cudnn':
    return y_BTNH
  return ad_checkpoint.checkpoint_name(y_BTNH, 'attention')
