"""A run of a tiny model, saved as training saves it."""

import pathlib
import shutil
from typing import NamedTuple

import jax
from ml_collections import ConfigDict
import pytest

from qat import checkpoint
from qat import config as config_lib
from qat import step as step_lib
from qat.data import loader
from qat.nn import transformer
from tests import tiny


class Saved(NamedTuple):
  """A workdir, its config, and the parameters of its checkpoints by step."""

  workdir: pathlib.Path
  config: ConfigDict
  params: dict[int, dict]


def save(workdir: pathlib.Path, dataset: pathlib.Path, steps: list[int]):
  """Writes a run of 8 devices that has saved some steps."""
  fields = {
    'model.vocab_size': 288,
    'data.dataset': str(dataset),
    'mesh.data': 2,
    'mesh.fsdp': 4,
    'sample.tokens': 6,
    'sample.prompts': ('the sea', 'a ship'),
  }
  config = tiny.config('bitnet', {**tiny.EXACT, **fields})
  mesh = tiny.mesh(config, 8)
  model = transformer.build(config, 'cpu', 8)
  init = step_lib.initial_state(config, model)
  with jax.set_mesh(mesh):
    abstract = step_lib.abstract_state(init, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    state = jax.jit(init, out_shardings=shardings)()
  reader = loader.TrainLoader(
    dataset,
    seq_len=config.data.seq_len,
    batch_size=config.data.batch_size,
    seed=config.seed,
    process_index=0,
    process_count=1,
    workers=0,
    threads=0,
  )
  extra = {'data': reader.state(), 'seconds': 1.0}
  reader.close()
  workdir.mkdir()
  (workdir / 'config.json').write_text(config_lib.to_json(config))
  params = {}
  with checkpoint.Checkpointer(
    workdir / 'checkpoints', keep_last=9, keep_every=0, timeout_s=60.0
  ) as checkpoints:
    for step in steps:
      state = state._replace(
        params=jax.tree.map(lambda p: p * 1.25, state.params)
      )
      checkpoints.save(step, state, extra)
      params[step] = jax.device_get(state.params)
  return Saved(workdir, config, params)


@pytest.fixture(scope='session')
def dataset(tmp_path_factory) -> pathlib.Path:
  return tiny.dataset(tmp_path_factory.mktemp('data'))


@pytest.fixture(scope='session')
def saved(tmp_path_factory, dataset) -> Saved:
  """A run that tests do not change."""
  with tiny.compiled_quickly():
    workdir = tmp_path_factory.mktemp('runs') / 'run'
    return save(workdir, dataset, [2, 10])


@pytest.fixture
def copied(saved, dataset, tmp_path) -> Saved:
  """The same with a data set of its own, to be broken."""
  workdir, data = tmp_path / 'run', tmp_path / 'set'
  shutil.copytree(saved.workdir, workdir)
  shutil.copytree(dataset, data)
  config = saved.config.copy_and_resolve_references()
  config.data.dataset = str(data)
  (workdir / 'config.json').write_text(config_lib.to_json(config))
  return Saved(workdir, config, saved.params)
