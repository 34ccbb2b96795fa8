"""One side of a product: an input or a weight, quantized for it or not."""

from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses

import jax
from jax import lax
from jax import numpy as jnp

from pallas_kernels import dispatch
from qat.quant import composed
from qat.quant import packed
from qat.quant import packed_dot
from qat.quant import qtensor
from qat.quant import rules


@dataclasses.dataclass(frozen=True)
class Operand:
  """One side of a product.

  Attributes:
    value: the float array; carries the gradient. Where it is quantized, its
      value is never computed. None of a packed matrix.
    quantized: what is multiplied instead, or None.
  """

  value: jax.Array | None
  quantized: composed.Quantized | None


def make_input(
  x_MK: jax.Array, spec: rules.Spec, mix: jax.Array | None = None
) -> Operand:
  """Quantizes the input of layers with `spec`; the gradient passes through.

  Args:
    x_MK: float, `[..., K]`.
    spec: how inputs are quantized.
    mix: share of the quantized value, 0 to 1, while quantization is annealed;
      None: all of it, and products of codes.
  """
  quantized = spec.quantize_input(lax.stop_gradient(x_MK))
  if mix is None or quantized is None:
    # Codes are written once. Left to itself, XLA rounds again wherever they are
    # read, from floats four times as large.
    return Operand(x_MK, lax.optimization_barrier(quantized))
  change = quantized.dequantize() - x_MK
  return Operand(
    x_MK + lax.stop_gradient(mix * change).astype(x_MK.dtype), None
  )


def make_packed_input(
  x_MK: jax.Array, spec: rules.Spec, target: dispatch.Target | None
) -> Operand:
  """`make_input` for packed weights; on a CPU few tokens are one call.

  Args:
    x_MK: float, `[..., K]`.
    spec: how inputs are quantized.
    target: as of `Method`.
  """
  if (spec.activation, spec.activation_granularity) == ('int8', 'token'):
    quantized = packed_dot.few_codes(lax.stop_gradient(x_MK), target)
    if quantized is not None:
      return Operand(x_MK, quantized)
  return make_input(x_MK, spec)


def make_weight(
  layer: Mapping[str, jax.Array],
  spec: rules.Spec,
  mix: jax.Array | None = None,
) -> Operand:
  """Quantizes the weight of a layer.

  Args:
    layer: 'kernel', float `[K, N]` or a stack `[E, K, N]`, and the learned
      parameters of the layer's quantizer, if it has any; or a 'kernel' that
      was quantized after training, which is multiplied as it is.
    spec: how the weight is quantized.
    mix: as in `make_input`.
  """
  kernel = layer['kernel']
  if isinstance(kernel, packed.PackedMatrix):
    return Operand(None, kernel)
  if composed.is_quantized(kernel):
    return Operand(kernel.dequantize(), kernel)
  quantized = spec.quantize(jax.tree.map(lax.stop_gradient, dict(layer)))
  if quantized is None:
    return Operand(kernel, None)
  value = spec.fake_quantize(layer, quantized)
  if mix is None:
    return Operand(value, quantized)
  return Operand((1 - mix) * kernel + mix * value, None)


def beside(weights: Sequence[Operand]) -> Operand | None:
  """Matrices or stacks `[..., K, N]` of one K as one, their columns in a row.

  Returns:
    The weight whose columns are those of all, each with its own scale; None
    where some are quantized in another way than others, or have more to them
    than a code and the scale of a column.
  """
  quantized = [w.quantized for w in weights]
  if any(q is not None for q in quantized):
    for q in quantized:
      if not isinstance(q, qtensor.QTensor) or has_more(q, -2):
        return None
    if len({q.alphabet for q in quantized}) > 1:
      return None
  value = jnp.concatenate([w.value for w in weights], -1)
  if quantized[0] is None:
    return Operand(value, None)
  scales = [
    jnp.broadcast_to(q.scale, (*q.shape[:-2], 1, q.shape[-1]))
    for q in quantized
  ]
  codes = jnp.concatenate([q.codes for q in quantized], -1)
  scale = jnp.concatenate(scales, -1)
  return Operand(value, qtensor.QTensor(codes, scale, quantized[0].alphabet))


def has_more(q: qtensor.QTensor, contracted: int) -> bool:
  """Whether values are more than codes and scales of the other axis."""
  return not (
    q.zero is None and q.exact is None and q.scale.shape[contracted] == 1
  )
