"""The device mesh, and which axis of an array is split over which devices."""

from collections.abc import Callable
import functools
import re
from typing import Any

import jax
from jax.sharding import AxisType
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict
import numpy as np

from qat.nn import stacked

# Every batch axis is split over all devices of the mesh.
BATCH = P(('data', 'fsdp'))

# The first regex that covers a parameter's whole path decides. Each matrix is
# split along the axis of width d_model, the one axis all of them have and the
# one whose divisibility a single check covers.
RULES: tuple[tuple[str, P], ...] = (
  (r'.*/kernel/.*', P()),  # Parts of a matrix quantized after training.
  (r'embed/embedding|head|positions', P(None, 'fsdp')),
  (r'.*/narrow/(gate|up)/kernel', P('?', 'fsdp', None)),
  (r'.*/narrow/down/kernel', P('?', None, 'fsdp')),
  (r'.*/(q|k|v|gate|up)/kernel', P('fsdp', None)),
  (r'.*/(o|down)/kernel', P(None, 'fsdp')),
  (r'.*/router', P('fsdp', None)),
  (r'.*(scale|bias|alpha|beta|gain_in|gain_out|clip_high|clip_low)', P()),
)


def make_mesh(config: ConfigDict, devices: list | None = None) -> Mesh:
  """A mesh with axes 'data' and 'fsdp' from a config's `mesh` section.

  Raises:
    ValueError: if the axes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  shape = mesh_shape(config, len(devices))
  grid = np.array(devices).reshape(shape)
  return Mesh(grid, ('data', 'fsdp'), axis_types=(AxisType.Auto,) * 2)


def mesh_shape(config: ConfigDict, devices: int) -> tuple[int, int]:
  """(data, fsdp), with -1 replaced by what is left of `devices`."""
  sizes = {'data': config.data, 'fsdp': config.fsdp}
  given = [size for size in sizes.values() if size != -1]
  known = int(np.prod(given))
  if not given or min(given) < 1 or devices % known:
    raise ValueError(
      f'mesh.data={config.data}, mesh.fsdp={config.fsdp} do not fit'
      f' {devices} devices; give sizes whose product is {devices}, one of'
      ' them may be -1.'
    )
  data, fsdp = (
    devices // known if size == -1 else size for size in sizes.values()
  )
  if data * fsdp != devices:
    raise ValueError(
      f'mesh.data={data} times mesh.fsdp={fsdp} is {data * fsdp}, but there'
      f' are {devices} devices; set one of them to -1.'
    )
  return data, fsdp


def partition_spec(path: str, ndim: int) -> P:
  """How the parameter at `path` is split; a '?' axis may be missing.

  The axis of the layers of a scanned model never is: a device would have to
  fetch whole layers in every turn of the loop.
  """
  layer_path = stacked.one_layer(path)
  if layer_path != path:
    return P(None, *partition_spec(layer_path, ndim - 1))
  for pattern, spec in RULES:
    if re.fullmatch(pattern, path):
      axes = tuple(spec)
      if axes[:1] == ('?',):
        axes = (None, *axes[1:]) if ndim == len(axes) else axes[1:]
      return P(*axes)
  raise ValueError(
    f'No partition rule covers parameter {path!r}; add one to'
    ' qat.sharding.RULES.'
  )


def state_shardings(mesh: Mesh, abstract_state: Any, params: Any) -> Any:
  """A NamedSharding for each leaf of a training state.

  Optimizer moments are split like the parameter whose path they end with;
  every other leaf is replicated.

  Args:
    mesh: the mesh.
    abstract_state: a tree of ShapeDtypeStructs.
    params: the (abstract) parameter tree.
  """
  specs = {}
  for keys, leaf in jax.tree_util.tree_leaves_with_path(params):
    names = tuple(_name(key) for key in keys)
    specs[names] = partition_spec('/'.join(names), leaf.ndim)

  def one(keys, leaf):
    names = tuple(_name(key) for key in keys)
    for start in range(len(names)):
      if names[start:] in specs:
        return NamedSharding(mesh, specs[names[start:]])
    return NamedSharding(mesh, P())

  return jax.tree_util.tree_map_with_path(one, abstract_state)


def _name(key) -> str:
  return str(
    getattr(key, 'key', getattr(key, 'name', getattr(key, 'idx', key)))
  )


def over_batch(
  mesh: Mesh,
  f: Callable[..., jax.Array],
  batched: tuple[bool, ...],
  *,
  summed: bool = True,
) -> Callable[..., jax.Array]:
  """Computes `f` on all devices, each with its own part of the batch.

  Inside, sums over tokens stay on the device, and one exchange at the end adds
  them up, also for gradients; left to the compiler, a loop over tokens would
  exchange in every turn.

  Args:
    mesh: the mesh; of size one, `f` is returned as it is.
    f: returns a scalar sum over its part of the batch; or, if not `summed`, an
      array whose first axis is its part.
    batched: for each argument, whether its first axis is the batch; the others
      are whole on each device.
    summed: whether the result is the sum over the devices.
  """
  if mesh.size == 1:
    return f

  @functools.partial(
    jax.shard_map,
    mesh=mesh,
    in_specs=tuple(BATCH if b else P() for b in batched),
    out_specs=P() if summed else BATCH,
    check_vma=False,
  )
  def local(*args):
    return jax.lax.psum(f(*args), ('data', 'fsdp')) if summed else f(*args)

  return local


def in_turn(tree: Any) -> Any:
  """Waits for arrays that several CPU devices compute, and returns them.

  Virtual devices share the threads of one process. Two programs in flight, both
  with exchanges between devices, can each hold threads that the other waits
  for; XLA then ends the process. Elsewhere nothing waits.
  """
  devices = {
    device
    for leaf in jax.tree.leaves(tree)
    for device in leaf.sharding.device_set
  }
  if len(devices) > 1 and next(iter(devices)).platform == 'cpu':
    jax.block_until_ready(tree)
  return tree
