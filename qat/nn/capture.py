"""Each linear layer with its inputs on a batch, for the sensitivity study."""

from collections.abc import Iterator
import dataclasses
import functools
from typing import Any

import jax
from jax import numpy as jnp

from qat.nn import stacked
from qat.nn import transformer
from qat.quant import composed
from qat.quant import rules as rules_lib


@dataclasses.dataclass(frozen=True)
class LinearRecord:
  """A linear layer, or one expert of a stack, and what it reads.

  Attributes:
    path: 'block_0/attn/q'; of an expert: 'block_0/ffn/narrow/up/3'.
    x_MK: the inputs as the layer multiplies them, float32; rows of tokens that
      go to another expert are zero. The hidden units of experts come in an
      order of their own, with rows of zeros between them.
    latent_KN: the float weights that are trained.
    quantized_KN: the weights that the forward pass uses; None in a layer that
      is not quantized.
  """

  path: str
  x_MK: jax.Array
  latent_KN: jax.Array
  quantized_KN: jax.Array | None


def linear_records(
  model: transformer.Transformer,
  params: Any,
  tokens_BT: jax.Array,
  *,
  full_precision: bool = False,
) -> Iterator[LinearRecord]:
  """Yields a record for every quantized linear layer, in the tree's order.

  The inputs of all layers are computed in one forward pass and held together,
  in the model's dtype. A matrix that was quantized after training has no latent
  weights, and no record.

  Args:
    model: the model.
    params: its parameters.
    tokens_BT: int32, the calibration batch.
    full_precision: yield the layers that are not quantized, too.
  """
  sown = _forward(model, params, tokens_BT)
  params = stacked.unstacked(params)
  inputs = {
    '/'.join(key.key for key in keys[:-1]): leaf
    for keys, leaf in jax.tree_util.tree_leaves_with_path(sown)
  }
  for path, layer in rules_lib.layers(params).items():
    spec = model.rules.find(path)
    if spec.weight == 'none' and not full_precision:
      continue
    kernel, quantized = layer['kernel'], None
    if composed.is_quantized(kernel):
      continue
    if spec.weight != 'none':
      quantized = _fake_quantize(spec, layer)
    x_MK = _rows(inputs[f'{path}/x'])
    if kernel.ndim == 2:
      yield LinearRecord(path, x_MK, kernel, quantized)
      continue
    ffn = path.split('/narrow/')[0]
    kind = 'chosen_hidden' if path.endswith('/down') else 'chosen'
    chosen_ME = _rows(inputs[f'{ffn}/{kind}'])
    for i, weight_KN in enumerate(kernel):
      mine_MK = x_MK * chosen_ME[:, i, None]
      mine_KN = None if quantized is None else quantized[i]
      yield LinearRecord(f'{path}/{i}', mine_MK, weight_KN, mine_KN)


# At the top of the module, so that what was compiled is found again: for the
# next layer of the same shape, and for the next study of the run.


@functools.partial(jax.jit, static_argnums=0)
def _forward(model: transformer.Transformer, params: Any, tokens_BT: jax.Array):
  sown = model.apply({'params': params}, tokens_BT, mutable=['inputs'])[1]
  return stacked.unstacked(sown['inputs'])


@functools.partial(jax.jit, static_argnums=0)
def _fake_quantize(
  spec: rules_lib.Spec, layer: dict[str, jax.Array]
) -> jax.Array:
  return spec.quantize(layer).dequantize()


def _rows(x: jax.Array) -> jax.Array:
  return x.reshape(-1, x.shape[-1]).astype(jnp.float32)
