"""Folders of small runs of several methods, for a study of them."""

from collections.abc import Mapping
import pathlib
from typing import Any

import jax
from jax import numpy as jnp
import numpy as np

from qat import checkpoint
from qat import config as config_lib
from qat.data import dataset as dataset_lib
from qat.nn import transformer
from tests import tiny


def save(
  workdir: pathlib.Path,
  method: str,
  dataset: pathlib.Path,
  fields: Mapping[str, Any] | None = None,
) -> tuple[transformer.Transformer, dict]:
  """Writes a run of step 3 with random parameters; returns it as model, params.

  Args:
    workdir: the folder to make.
    method: a key of `tiny.METHODS`.
    dataset: of `tiny.dataset`.
    fields: go over the config.
  """
  own = {
    'model.vocab_size': 288,
    'model.n_layers': 2,
    'data.dataset': str(dataset),
    'sensitivity.sequences': 4,
    # All matrices of all runs are 32 x 32, so that little is compiled.
    'model.d_ff': 64 if method.startswith('pquant') else 32,
    'model.branch_width': 32,
  }
  config = tiny.config(method, {**tiny.EXACT, **own, **(fields or {})})
  model = transformer.build(config, 'cpu', 1)
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda p: jnp.float32(0.2 * rng.normal(size=p.shape) + (p.ndim < 2)),
    transformer.abstract_params(model),
  )
  digest = dataset_lib.open_dataset(dataset).digest
  workdir.mkdir()
  (workdir / 'config.json').write_text(config_lib.to_json(config))
  with checkpoint.Checkpointer(
    workdir / 'checkpoints', keep_last=1, keep_every=0, timeout_s=60.0
  ) as checkpoints:
    extra = {'data': {'fingerprint': {'dataset': digest}}}
    checkpoints.save(3, {'params': params}, extra)
  return model, params
