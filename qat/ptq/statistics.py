"""What calibration keeps of a linear layer's inputs."""

import dataclasses
import functools

import jax
from jax import numpy as jnp

from qat.quant import blocks


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=('gram_KK', 'tokens', 'absmax_K', 'inputs_SK'),
  meta_fields=(),
)
@dataclasses.dataclass(frozen=True)
class Statistics:
  """Sums over the inputs x of a linear layer, all float32.

  GPTQ's Hessian is 2/n times `gram_KK`, n a number of sequences in its code.
  No method here depends on the factor: damping and thresholds are relative.

  Attributes:
    gram_KK: the sum over tokens of `x^T x`, maybe as a NumPy array on the host;
      None: it is not wanted.
    tokens: how many tokens were added, or the sum of their weights; a scalar.
    absmax_K: the largest |x| of each input.
    inputs_SK: the first rows that were added, as they were; None: none are
      kept.
  """

  gram_KK: jax.Array | None
  tokens: jax.Array
  absmax_K: jax.Array
  inputs_SK: jax.Array | None = None


def empty(inputs: int, gram: bool = True) -> Statistics:
  """Statistics of no tokens.

  Args:
    inputs: K.
    gram: whether `gram_KK` is wanted, most of the work of `add`.
  """
  return Statistics(
    jnp.zeros((inputs, inputs), jnp.float32) if gram else None,
    jnp.zeros((), jnp.float32),
    jnp.zeros(inputs, jnp.float32),
  )


def add(
  statistics: Statistics,
  x_MK: jax.Array,
  weight_M: jax.Array | None = None,
) -> Statistics:
  """Statistics with the tokens of a batch added.

  Args:
    statistics: as yet; its `inputs_SK` stays as it is.
    x_MK: inputs of M tokens.
    weight_M: how often each token counts, at least 0; None: once. A token of
      weight 0 (padding) changes nothing, whatever its inputs are.
  """
  x_MK = x_MK.astype(jnp.float32)
  tokens = jnp.float32(x_MK.shape[0])
  weighted_MK = x_MK
  if weight_M is not None:
    weight_M = weight_M.astype(jnp.float32)
    tokens = jnp.sum(weight_M)
    x_MK = jnp.where(weight_M[:, None] > 0, x_MK, 0)
    weighted_MK = x_MK * weight_M[:, None]
  gram_KK = statistics.gram_KK
  if gram_KK is not None:
    gram_KK += jnp.matmul(x_MK.T, weighted_MK, precision='highest')
  return Statistics(
    gram_KK,
    statistics.tokens + tokens,
    jnp.maximum(statistics.absmax_K, blocks.absmax(x_MK, 0)[0]),
    statistics.inputs_SK,
  )


def of(
  x_MK: jax.Array,
  weight_M: jax.Array | None = None,
  sample: int = 0,
) -> Statistics:
  """Statistics of one batch.

  Args:
    x_MK: inputs of M tokens.
    weight_M: as in `add`.
    sample: how many rows to keep in `inputs_SK`: the first of those that have
      a weight, then zeros where there are fewer; 0: none.
  """
  statistics = add(empty(x_MK.shape[-1]), x_MK, weight_M)
  if not sample:
    return statistics
  x_SK = x_MK
  if weight_M is not None:  # The rows that count first, in their order.
    counts_M = weight_M > 0
    x_SK = jnp.where(counts_M[:, None], x_MK, 0)
    x_SK = x_SK[jnp.argsort(~counts_M, stable=True)]
  return dataclasses.replace(
    statistics, inputs_SK=x_SK[:sample].astype(jnp.float32)
  )
