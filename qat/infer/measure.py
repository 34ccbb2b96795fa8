"""How fast models of a shape read prompts and write texts, with random weights.

It is `generate.batch` that is timed, as text is generated with it. Every round
runs each model in turn, and reads memory, so that a slow moment of the machine
meets all of them.
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
import time
from typing import Any
from typing import NamedTuple

import jax
from jax import numpy as jnp
from ml_collections import ConfigDict
import numpy as np

from pallas_kernels import dispatch
from pallas_kernels import measure
from pallas_kernels import native
from qat.infer import decode
from qat.infer import generate
from qat.infer import pack
from qat.nn import transformer


class Model(NamedTuple):
  """What can be timed.

  Attributes:
    write: (prompts, tokens) -> an iterator that gives the first new token of
      all texts, then the second, ..., each when it is known.
    bytes: of its parameters.
    vocabulary: token ids that a prompt may have.
  """

  write: Callable[[list[list[int]], int], Iterator[Any]]
  bytes: int
  vocabulary: int


def speeds(
  models: Mapping[str, Model],
  *,
  batch: int,
  prompt: int,
  tokens: int,
  rounds: int,
  base: str | None = None,
) -> Iterator[dict[str, Any]]:
  """Measures models.

  Args:
    models: by name.
    batch: texts at once.
    prompt: tokens of each prompt.
    tokens: new tokens of each text; with 1, decoding is not measured.
    rounds: how often each is timed; of a figure it is the median.
    base: the model that decoding is compared with, if there is one.

  Yields:
    For each model: 'model'; 'prefill/s' and 'decode/s', tokens of all texts in
    a second (None where not measured); with a base 'speedup', how many times as
    fast as the base it decodes, the median of the rounds' ratios; 'bytes' of
    its parameters; 'memory/s', the bytes that all threads read in a second,
    where the C++ extension is; and 'of memory', the share of them that decoding
    needs if it reads each parameter once for a step.
  """
  can_read = native.variants() and dispatch.here().platform == 'cpu'
  words = jnp.ones((1 << 24 if can_read else 1,), jnp.int32)
  read = jax.jit(measure.read_memory) if can_read else None
  taken = {name: [] for name in models}
  memory = []
  for i in range(rounds + 1):
    for name, model in models.items():
      found = _time(model, batch, prompt, tokens)
      if i:  # The first compiles.
        taken[name].append(found)
    if read:  # The second time counts: threads are awake.
      jax.block_until_ready(read(words))
      start = time.perf_counter()
      jax.block_until_ready(read(words))
      memory.append(time.perf_counter() - start)
  rate = words.nbytes / np.median(memory[1:]) if read else None
  for name, model in models.items():
    first, rest = np.median(np.array(taken[name]), axis=0)
    step = rest / (tokens - 1) if tokens > 1 else None
    row = {
      'model': name,
      'prefill/s': batch * prompt / first,
      'decode/s': batch / step if step else None,
    }
    if base is not None:
      ratios = [
        theirs / mine
        for (_, theirs), (_, mine) in zip(taken[base], taken[name], strict=True)
      ]
      row['speedup'] = float(np.median(ratios))
    yield row | {
      'bytes': model.bytes,
      'memory/s': rate,
      'of memory': model.bytes / step / rate if step and rate else None,
    }


def _time(
  model: Model, batch: int, prompt: int, tokens: int
) -> tuple[float, float]:
  """Seconds to the first new token of all texts, and to the last from there."""
  rng = np.random.default_rng(0)
  rows = model.write(
    rng.integers(0, model.vocabulary, (batch, prompt)).tolist(), tokens
  )
  start = time.perf_counter()
  next(rows)
  first = time.perf_counter()
  for _ in rows:
    pass
  return first - start, time.perf_counter() - first


def random_model(config: ConfigDict, cache: str | None = None) -> Model:
  """A packed model of random weights; in full precision nothing is packed.

  Args:
    config: as for training.
    cache: of `generate.CACHES`; None: the model's `dot_dtype`.
  """
  trained = transformer.build(config, jax.default_backend(), 1)
  model, params = pack.for_packed(trained, None), random_params(config)

  def write(prompts, tokens):
    return generate.batch(
      *(model, params, prompts),
      tokens=tokens,
      temperature=0.0,
      top_k=0,
      top_p=1.0,
      seeds=[0] * len(prompts),
      stop=-1,
      cache=cache,
    )

  return Model(write, sum(pack.sizes(params).values()), config.model.vocab_size)


def random_params(config: ConfigDict) -> dict[str, Any]:
  """Packed parameters for this machine: random codes, small random floats."""
  program = decode.decode_program(config, dispatch.here(), batch=1, length=1)
  rng = np.random.default_rng(0)

  def one(shape):
    if shape.dtype == jnp.int8:
      return jnp.asarray(rng.integers(-128, 128, shape.shape, np.int8))
    if shape.size < 2:  # A scale: that of weights of the usual size.
      return jnp.full(shape.shape, 0.02, shape.dtype)
    values = rng.standard_normal(shape.shape, np.float32)
    return jnp.asarray(0.02 * values, shape.dtype)

  return jax.tree.map(one, program.arguments[0])
