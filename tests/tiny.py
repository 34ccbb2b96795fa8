"""A model that compiles in seconds, batches for it, and a data set.

Any config of the repository, at a width where every part is still there: two
heads, an expert's three matrices, a vocabulary that is cut into chunks.
"""

from collections.abc import Iterator
from collections.abc import Mapping
import contextlib
import importlib
import json
import pathlib
from typing import Any

import jax
from jax import numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict
import numpy as np

from qat import sharding
from qat import step as step_lib
from qat.data import prepare
from qat.nn import transformer

# Names of what the tests train: a config's stem and fields of it.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
  'fp': ('fp', {}),
  'bitnet': ('bitnet', {}),
  'b158': ('bitnet_b158', {}),
  'pquant': ('pquant', {}),
  'pquant4': ('pquant', {'model.n_experts': 4}),
  'pquant8': ('pquant', {'model.n_experts': 8}),
  'onebit': ('onebit', {}),
  'lsq': ('lsq', {}),
  'paretoq': ('paretoq', {}),
  'integer': ('integer', {}),
}
_SMALL = {
  'model.vocab_size': 64,
  'model.d_model': 32,
  'model.n_layers': 1,
  'model.n_heads': 2,
  'model.n_kv_heads': 2,
  'model.d_ff': 48,
  'model.branch_width': 8,
  'model.loss_chunk': 8,
  'model.init_std': 0.1,
  'optim.warmup_steps': 4,
  'data.batch_size': 8,
  'data.seq_len': 16,
  'eval.batch_size': 8,
  'train.steps': 60,
}
# Sums of floats in another order differ in the last bits of float32 alone.
EXACT = {'model.dot_dtype': 'float32', 'model.quantized_dot': 'float'}


def config(method: str, fields: Mapping[str, Any] | None = None) -> ConfigDict:
  """A small locked config of a method; `fields` go over everything else."""
  stem, own = METHODS[method]
  made = importlib.import_module(f'configs.{stem}').get_config('tiny')
  made.update_from_flattened_dict({**_SMALL, **own, **(fields or {})})
  return made


@contextlib.contextmanager
def compiled_quickly() -> Iterator[None]:
  """XLA leaves most optimizations out: the same program, in half the time."""
  before = jax.config.read('jax_disable_most_optimizations')
  jax.config.update('jax_disable_most_optimizations', True)
  try:
    yield
  finally:
    jax.config.update('jax_disable_most_optimizations', before)


def params(model: transformer.Transformer, seed: int = 0) -> dict:
  """Random parameters without compiling an initialization."""
  leaves, tree = jax.tree.flatten(transformer.abstract_params(model))
  rng = np.random.default_rng(seed)
  return jax.tree.unflatten(
    tree,
    [
      jnp.float32(0.2 * rng.normal(size=p.shape) + (p.ndim < 2)) for p in leaves
    ],
  )


def state(program: step_lib.Program) -> step_lib.State:
  """A program's first state, of random parameters."""
  return program.init(params(program.model))


def mesh(config: ConfigDict, devices: int = 1) -> Mesh:
  """The config's mesh over the first devices."""
  return sharding.make_mesh(config.mesh, jax.devices()[:devices])


def batch(config: ConfigDict, seed: int = 0) -> dict[str, np.ndarray]:
  """Tokens of a noisy arithmetic: predictable, but not from one example."""
  rng = np.random.default_rng(seed)
  shape = (config.data.batch_size, config.data.seq_len + 1)
  steps = rng.integers(1, 4, shape)
  window = (rng.integers(0, 64, (shape[0], 1)) + steps.cumsum(1)) % 64
  window = window.astype(np.int32)
  return {'tokens': window[:, :-1], 'targets': window[:, 1:]}


def options(**changes: object) -> prepare.Options:
  """How a small text is prepared, with `changes`."""
  fields = dict(
    vocab_size=280,
    tokenizer=None,
    tokenizer_bytes=1 << 30,
    end_of_text='<|endoftext|>',
    field='text',
    split=None,
    valid_fraction=0.2,
    seed=0,
    shard_tokens=100_000,
  )
  return prepare.Options(**fields | changes)


def dataset(folder: pathlib.Path, seed: int = 0) -> pathlib.Path:
  """A data set of 280 tokens in `folder / 'set'`, prepared from words."""
  rng = np.random.default_rng(seed)
  words = 'the sea was calm and a ship, Élise said; under “grey” skies: 日本 🙂'
  texts = [
    f'{i} ' + ' '.join(rng.choice(words.split(), rng.integers(1, 200)))
    for i in range(60)
  ]
  source = folder / 'texts.jsonl'
  source.write_text(''.join(json.dumps({'text': t}) + '\n' for t in texts))
  return prepare.prepare([str(source)], folder / 'set', options())
