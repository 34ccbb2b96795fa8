"""Loading a model to use it: a run's checkpoint, a model folder, or others'."""

from collections.abc import Iterator
import pathlib
import sys
from typing import Any
from typing import NamedTuple

import jax
from jax import numpy as jnp
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict
import numpy as np
import tokenizers

from pallas_kernels import dispatch
from qat import carried
from qat import config as config_lib
from qat import estimators
from qat import manifest as manifest_lib
from qat import restore
from qat import sharding
from qat.data import dataset as dataset_lib
from qat.data import prepare
from qat.interop import folder as folder_lib
from qat.interop import foreign
from qat.nn import transformer
from qat.quant import composed
from qat.quant import packed

# The key of a `source` that tells how a model was packed; see `qat.infer.pack`.
PACKED = 'packed'


class Run(NamedTuple):
  """A trained model on one device.

  Attributes:
    config: the run's config, apart from `mesh`, which is one device, and
      `model.scan_layers`, which is False unless layers were left stacked.
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


class Loaded(NamedTuple):
  """A model on one device, wherever it comes from.

  Attributes:
    config: its config; `mesh` is one device, `model.scan_layers` False unless
      layers were left stacked.
    mesh: that device.
    model: the transformer.
    params: its parameters; kernels may be quantized matrices.
    tokenizer: `.encode(text, add_special_tokens=False).ids`, `.decode(ids)`;
      `.encode('').ids` is what it puts before a text.
    begin: the token id that an empty prompt begins with.
    end: the token id that ends a text.
    dataset: what a run was trained on; None for other models.
    source: where it comes from; JSON.
  """

  config: ConfigDict
  mesh: Mesh
  model: transformer.Transformer
  params: Any
  tokenizer: tokenizers.Tokenizer
  begin: int
  end: int
  dataset: dataset_lib.Dataset | None
  source: dict[str, Any]


def load_model(
  name: str | pathlib.Path, base: ConfigDict | None, by_layer: bool = True
) -> Loaded:
  """Loads a model from wherever it lies; floats become float32.

  Those of a packed model stay as they are.

  Args:
    name: a run's workdir, a model folder, or, with `base`, a GGUF file, a
      folder of transformers', or 'org/name' on the hub.
    base: a config of `configs.common`, for what another program's model does
      not say; None where no such model is expected.
    by_layer: whether a model that scans over its layers becomes one that does
      not, for which its parameters are in memory twice.

  Returns:
    The model, on the first device.

  Raises:
    FileNotFoundError: there is no model, or a file of it is missing.
    ValueError: a file does not fit the others, or is not supported.
    CorruptError: a file is damaged.
  """
  path = pathlib.Path(name)
  if (path / manifest_lib.FILE).is_file() or any(path.glob('params-*')):
    return _load_folder(path)
  # Without a base a name that does not exist is a mistyped workdir.
  on_hub = base is not None and not path.exists()
  if not foreign.is_foreign(path) and not on_hub:
    run = load_run(path, by_layer)
    end = run.dataset.eot_id
    return Loaded(
      *run[:4],
      tokenizer=run.dataset.tokenizer,
      begin=end,  # As in training: a document follows an end of text.
      end=end,
      dataset=run.dataset,
      source={'format': 'run', 'name': run.config.name, 'step': run.step},
    )
  if base is None:
    raise ValueError(
      f'{name} is a model of another program; make a model folder of it first:'
      f' python scripts/import_model.py {name} --out <folder>'
    )
  source = foreign.open_model(str(name))
  config = foreign.config(source, base, 'float32')
  leaves = foreign.leaves(source, config)
  return _loaded(config, leaves, source, source.about, str(name))


def _load_folder(path: pathlib.Path) -> Loaded:
  folder = folder_lib.open_folder(path)
  config = folder.config.copy_and_resolve_references().unlock()
  config.mesh.data = config.mesh.fsdp = 1
  config.lock()
  leaves = folder_lib.leaves(folder)
  return _loaded(config, leaves, folder, folder.source, str(path))


def _loaded(
  config: ConfigDict,
  leaves: Iterator[tuple[str, Any]],
  text: Any,
  source: dict[str, Any],
  name: str,
) -> Loaded:
  """A model from its leaves; `text` has tokenizer, begin and end."""
  mesh, model, shapes = _built(config)
  return Loaded(
    config=config,
    mesh=mesh,
    model=model,
    params=_on_device(leaves, model, shapes, mesh, name, PACKED in source),
    tokenizer=text.tokenizer,
    begin=text.begin,
    end=text.end,
    dataset=None,
    source=source,
  )


def _built(config: ConfigDict) -> tuple[Mesh, transformer.Transformer, Any]:
  """The mesh of one device, the model, and its parameters' shapes."""
  mesh = sharding.make_mesh(config.mesh, jax.local_devices()[:1])
  model = transformer.build(config, jax.default_backend(), mesh.size)
  return mesh, model, transformer.abstract_params(model)


def _on_device(
  leaves: Iterator[tuple[str, Any]],
  model: transformer.Transformer,
  shapes: Any,
  mesh: Mesh,
  name: str,
  as_stored: bool,
) -> Any:
  """The tree of `leaves`, each put on the device before the next is read.

  Args:
    leaves: path and leaf.
    model: what they should be parameters of.
    shapes: of its parameters.
    mesh: of the device.
    name: of where they come from.
    as_stored: whether floats keep their type; else they become float32.

  Raises:
    ValueError: they are not the model's; names them.
  """
  wanted = {
    path: tuple(leaf.shape) for path, leaf in folder_lib.flat(shapes).items()
  }
  found, lines = {}, []
  for path, leaf in leaves:
    if wanted.get(path) != tuple(leaf.shape):
      lines.append(
        f'{path}: {list(leaf.shape)} there, {wanted.get(path, "nothing")} here'
      )
      continue
    if isinstance(leaf, packed.PackedMatrix):
      leaf = packed.repack(leaf, dispatch.here())
    elif not composed.is_quantized(leaf) and not as_stored:
      leaf = np.asarray(leaf, np.float32)
    found[path] = jax.device_put(leaf, NamedSharding(mesh, P()))
  missing = (
    wanted.keys()
    - found.keys()
    - {line.split(':')[0] for line in lines}
    - _folded(model, found)
  )
  lines += [f'{path}: missing' for path in sorted(missing)]
  if lines:
    raise ValueError(
      f'{name} does not hold the model that its config describes:\n  '
      + '\n  '.join(lines[:20])
    )
  return folder_lib.nested(found)


def _folded(model: transformer.Transformer, found: dict[str, Any]) -> set[str]:
  """Paths of what a quantizer learned and a quantized matrix has in itself."""
  layers = [
    path.removesuffix('/kernel')
    for path, leaf in found.items()
    if composed.is_quantized(leaf)
  ]
  return {
    f'{layer}/{name}'
    for layer in layers
    for name in model.rules.find(layer).parameters
  }


def load_run(workdir: pathlib.Path, by_layer: bool = True) -> Run:
  """Loads the newest good checkpoint of a run; changes nothing in its folder.

  A checkpoint that is passed over because it is damaged is told of on stderr.

  Args:
    workdir: folder of the run, which may still be going on.
    by_layer: see `load_model`.

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
  mesh = sharding.make_mesh(config.mesh, jax.local_devices()[:1])
  model = transformer.build(config, jax.default_backend(), mesh.size)
  checkpoints = workdir / 'checkpoints'
  shapes = carried.with_shapes(
    transformer.abstract_params(model), carried.saved(checkpoints)
  )
  shapes = jax.eval_shape(lambda p: estimators.stored(config, p), shapes)
  shardings = sharding.state_shardings(mesh, shapes, shapes)
  abstract = jax.tree.map(
    lambda leaf, where: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=where
    ),
    shapes,
    shardings,
  )
  restored = restore.newest(
    checkpoints,
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
  params = jax.tree.map(
    lambda leaf: (
      carried.unpacked(leaf)
      if composed.is_quantized(leaf)
      else leaf.astype(jnp.float32)
    ),
    restored.state['params'],
    is_leaf=composed.is_quantized,
  )
  if by_layer:
    model, params = transformer.unscanned(model, params)
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
      text = (
        f'config.model.vocab_size={config.model.vocab_size},'
        f' config.data.cache_dir={config.data.cache_dir!r}: {error}'
      )
      if config.init.model:
        text += (
          f' The vocabulary is that of config.init.model={config.init.model!r};'
          ' give data with its tokenizer as config.data.dataset.'
        )
      raise config_lib.ConfigError(text) from error
  dataset = dataset_lib.open_dataset(path)
  config_lib.check_tokenizer(config, dataset.vocab_size, str(path))
  return dataset
