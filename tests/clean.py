"""A small model of full precision, to be quantized after training.

Two blocks, whose matrices are all of one shape, so that little is compiled, and
some inputs that are larger than others, which methods take advantage of.
"""

import functools
import importlib
from typing import Any

import jax
from jax import numpy as jnp
from ml_collections import ConfigDict
import numpy as np

from qat.interop import folder
from qat.nn import transformer
from qat.ptq import examples as examples_lib
from tests import tiny

WIDTH = 32


def config(**fields: Any) -> ConfigDict:
  """Of the model; names of `fields` have '__' for the dots of the config's."""
  square = {
    'model.n_layers': 2,
    'model.d_model': WIDTH,
    'model.d_ff': WIDTH,
    'model.scan_layers': False,
  }
  changed = {name.replace('__', '.'): value for name, value in fields.items()}
  return tiny.config('fp', {**tiny.EXACT, **square, **changed})


def params(config: ConfigDict, seed: int = 0) -> dict[str, Any]:
  """Parameters, with gains of norms that differ and biases that are not 0."""
  model = transformer.build(config, 'cpu', 1)
  shapes = transformer.abstract_params(model)
  rng = np.random.default_rng(seed)

  def draw(path: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    if path.endswith('scale'):
      values = rng.lognormal(0, 0.7, leaf.shape)
    else:
      values = rng.normal(0, 0.2, leaf.shape)
    return jnp.asarray(values, leaf.dtype)

  leaves = {p: draw(p, leaf) for p, leaf in folder.flat(shapes).items()}
  return folder.nested(leaves)


def examples(
  count: int = 6, length: int = 16, vocabulary: int = 64, seed: int = 1
) -> examples_lib.Examples:
  """Random tokens; the last sequence is half as long as the others."""
  rng = np.random.default_rng(seed)
  tokens_ST = rng.integers(0, vocabulary, (count, length)).astype(np.int32)
  weights_ST = np.ones((count, length), np.float32)
  tokens_ST[-1, length // 2 :] = weights_ST[-1, length // 2 :] = 0
  return examples_lib.Examples(tokens_ST, weights_ST, 'made up')


def ptq(stem: str, **fields: Any) -> ConfigDict:
  """A config of `configs/ptq` for this model, with `fields` as in `config`."""
  made = importlib.import_module(f'configs.ptq.{stem}').get_config()
  small = {
    'true_sequential': False,
    'calibration.sequences': 6,
    'calibration.length': 16,
    'calibration.gradient_batch': 4,
  }
  changed = {name.replace('__', '.'): value for name, value in fields.items()}
  made.update_from_flattened_dict({**small, **changed})
  return made


def logits(
  config: ConfigDict, params: Any, tokens_BT: np.ndarray
) -> np.ndarray:
  """What a model of the config gives, `[B, T, V]`."""
  model = transformer.build(config, 'cpu', 1)
  return np.asarray(_logits(model, params, tokens_BT))


def inputs(config: ConfigDict, params: Any, path: str) -> np.ndarray:
  """What the layer at `path` reads of `examples()`, `[M, K]`, no padding."""
  made = examples()
  model = transformer.build(config, 'cpu', 1)
  node = _inputs(model, params, made.tokens_ST)
  for name in path.split('/'):
    node = node[name]
  return np.asarray(node['x'][0])[made.weights_ST > 0]


# At the top of the module, so that what was compiled is found again.


@functools.partial(jax.jit, static_argnums=0)
def _logits(model: transformer.Transformer, params: Any, tokens_BT: jax.Array):
  return model.apply({'params': params}, tokens_BT, method='logits')[0]


@functools.partial(jax.jit, static_argnums=0)
def _inputs(model: transformer.Transformer, params: Any, tokens_BT: jax.Array):
  _, sown = model.apply({'params': params}, tokens_BT, mutable=['inputs'])
  return sown['inputs']
