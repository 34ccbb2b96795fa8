"""A step of generation from packed weights as a program, for compilers.

It has shapes for arguments, so that it can be compiled for a device that is not
there and for a model that does not exist.
"""

from collections.abc import Callable
import functools
from typing import Any
from typing import NamedTuple

import jax
from jax import numpy as jnp
from ml_collections import ConfigDict

from pallas_kernels import dispatch
from qat.infer import generate
from qat.infer import pack
from qat.nn import transformer


class Program(NamedTuple):
  """`jax.jit(function, donate_argnums=donate).lower(*arguments)`.

  Attributes:
    function: (params, tokens_BT, caches, start) -> logits `[B, V]` after the
      last token, and the caches with T more positions.
    arguments: shapes of its arguments.
    donate: the arguments whose memory it gives to what it returns.
  """

  function: Callable[..., Any]
  arguments: tuple[Any, ...]
  donate: tuple[int, ...]


def decode_program(
  config: ConfigDict,
  target: dispatch.Target,
  batch: int,
  length: int,
  *,
  tokens: int = 1,
  cache: str | None = None,
  floats: str | None = None,
) -> Program:
  """Some new tokens of each text, from packed weights.

  Args:
    config: of the model, as for training.
    target: the device it is compiled for; need not be there.
    batch: texts, B.
    length: positions that the KV cache has room for.
    tokens: T; 1 is a step of generation, more is a prompt.
    cache: of `generate.CACHES`; None: the model's `dot_dtype`.
    floats: see `pack.leaves`.
  """
  trained = transformer.build(config, target.platform, 1)
  # Of cuDNN's form even shapes cannot be computed without cuDNN. Attention that
  # reads a cache has one form only.
  trained = transformer.changed(trained, attention='xla')
  params = pack.abstract(
    trained, transformer.abstract_params(trained), target, floats
  )
  model = pack.for_packed(trained, target)

  def function(params, tokens_BT, caches, start):
    last_B = jnp.full(tokens_BT.shape[:1], tokens_BT.shape[1] - 1)
    return generate.advance(model, params, tokens_BT, caches, start, last_B)

  caches = jax.eval_shape(
    functools.partial(generate.empty_caches, model, batch, length, cache)
  )
  # Rows of a batch may stand at different places.
  start = jax.ShapeDtypeStruct((batch,) if batch > 1 else (), jnp.int32)
  tokens_BT = jax.ShapeDtypeStruct((batch, tokens), jnp.int32)
  return Program(function, (params, tokens_BT, caches, start), (2,))
