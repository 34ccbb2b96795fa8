"""Loading what a run left in its folder: config, parameters, data set."""

import pathlib
import sys
from typing import Any
from typing import NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from qat import config as config_lib
from qat import restore
from qat import sharding
from qat.data import dataset as dataset_lib
from qat.data import prepare
from qat.nn import transformer


class Run(NamedTuple):
  """A trained model on one device.

  Attributes:
    config: the run's config, apart from `mesh`, which is one device, and
      `model.scan_layers`, which is False.
    mesh: that device.
    model: the transformer.
    params: its parameters.
    dataset: what it was trained on, open.
    step: of the checkpoint.
  """

  config: ConfigDict
  mesh: Mesh
  model: transformer.Transformer
  params: Any
  dataset: dataset_lib.Dataset
  step: int


def load_run(workdir: pathlib.Path) -> Run:
  """Loads the newest good checkpoint of a run; changes nothing in its folder.

  A checkpoint that is passed over because it is damaged is told of on stderr.

  Args:
    workdir: folder of the run, which may still be going on.

  Returns:
    The run, on the first device.

  Raises:
    FileNotFoundError: there is no run, no checkpoint yet, or its data set,
      which has the tokenizer, is gone.
    ValueError: the data set is another than the one the run was trained on.
    CorruptError: all checkpoints are damaged.
  """
  config = config_lib.load(workdir).unlock()
  config.mesh.data = config.mesh.fsdp = 1
  config.lock()
  mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
  model = transformer.build(config, jax.default_backend(), mesh.size)
  shapes = transformer.abstract_params(model)
  shardings = sharding.state_shardings(mesh, shapes, shapes)
  abstract = jax.tree.map(
    lambda leaf, where: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=where
    ),
    shapes,
    shardings,
  )
  restored = restore.newest(
    workdir / 'checkpoints',
    {'params': abstract},
    partial=True,
    quarantine=False,
    say=lambda line: print(line, file=sys.stderr),
  )
  if restored is None:
    raise FileNotFoundError(
      f'{workdir} has no checkpoint yet: the run saves every'
      f' {config.checkpoint.every} steps (config.checkpoint.every) and when it'
      ' is stopped. Start it again with the command that began it.'
    )
  dataset = open_dataset(config)
  trained_on = restored.extra['data']['fingerprint']['dataset']
  if dataset.digest != trained_on:
    raise ValueError(
      f'{dataset.path} is not the data set that {workdir} was trained on: its'
      f' digest is {dataset.digest[:16]}..., that one had'
      f' {trained_on[:16]}.... Put back the one that was there.'
    )
  model, params = transformer.unscanned(model, restored.state['params'])
  with config.unlocked():
    config.model.scan_layers = False
  return Run(config, mesh, model, params, dataset, restored.step)


def open_dataset(config: ConfigDict) -> dataset_lib.Dataset:
  """The data set of a config; the embedded one is prepared on first use.

  Raises:
    FileNotFoundError: it is not there.
    ValueError: it is damaged, or has more tokens than the model.
  """
  path = config.data.dataset
  if path == 'austen':
    try:
      path = prepare.ensure_embedded(
        config.data.cache_dir, config.model.vocab_size
      )
    except ValueError as error:
      raise config_lib.ConfigError(
        f'config.model.vocab_size={config.model.vocab_size},'
        f' config.data.cache_dir={config.data.cache_dir!r}: {error}'
      ) from error
  dataset = dataset_lib.open_dataset(path)
  config_lib.check_tokenizer(config, dataset.vocab_size, str(path))
  return dataset
