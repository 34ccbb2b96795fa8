"""Models to start a run from, and configs of such runs."""

import pathlib
from typing import Any

import jax
from ml_collections import ConfigDict
import numpy as np

from qat import config as config_lib
from qat import initial
from qat.data import dataset as dataset_lib
from qat.interop import folder
from qat.quant import weights
from tests import clean
from tests import tiny

STEPS = 4
VOCAB = 288


def source_config(**fields: Any) -> ConfigDict:
  """Of the models."""
  return clean.config(model__vocab_size=VOCAB, **fields)


def save(
  path: pathlib.Path,
  config: ConfigDict,
  params: Any,
  data: dataset_lib.Dataset,
) -> pathlib.Path:
  """A model folder, as scripts/import_model.py writes it."""
  folder.save(
    path,
    config,
    folder.flat(params).items(),
    data.tokenizer,
    begin=data.eot_id,
    end=data.eot_id,
    source={'format': 'made up'},
  )
  return path


def full(path: pathlib.Path, data: dataset_lib.Dataset) -> pathlib.Path:
  """A model folder of full precision."""
  config = source_config()
  return save(path, config, clean.params(config), data)


def quantized(path: pathlib.Path, data: dataset_lib.Dataset) -> pathlib.Path:
  """A model folder whose matrices of attention are quantized."""
  config = source_config()
  leaves = folder.flat(clean.params(config))
  for name, leaf in leaves.items():
    if '/attn/' in name and name.endswith('kernel'):
      made = weights.QUANTIZERS['int4'](leaf, 'channel', 1)
      leaves[name] = jax.tree.map(np.asarray, made)
  return save(path, config, folder.nested(leaves), data)


def get(
  method: str,
  source: str | pathlib.Path,
  data: dataset_lib.Dataset,
  **fields: Any,
) -> ConfigDict:
  """A run's config; its own model section is of another shape."""
  small = {
    'init.model': str(source),
    'data.dataset': str(data.path),
    'model.d_model': 48,
    'model.n_layers': 3,
    'train.steps': STEPS,
    'train.log_every': 1,
    'train.health_every': 2,
    'optim.warmup_steps': 1,
    'eval.every': 4,
    'eval.batches': 2,
    'checkpoint.every': 2,
    'sensitivity.sequences': 2,
    'sample.tokens': 0,
  }
  changed = {name.replace('__', '.'): value for name, value in fields.items()}
  return tiny.config(method, {**tiny.EXACT, **small, **changed})


def find(config: ConfigDict, data: dataset_lib.Dataset) -> initial.Start:
  """What a new run of the config starts from."""
  workdir = pathlib.Path('nowhere')
  config = initial.resolve(config, workdir)
  config_lib.check(config, devices=1)
  return initial.find(config, workdir, data)


def same(a: Any, b: Any) -> None:
  """Two trees are equal, bit for bit."""
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(x, y)
