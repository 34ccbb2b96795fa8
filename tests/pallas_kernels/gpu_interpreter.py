"""Pallas's interpreter of GPU kernels, with what it lacks in jax 0.10.

It runs a kernel on the CPU: grid, warpgroups, copies and barriers. It only
multiplies what lies in shared memory. Added here are a left operand in
registers, setting the sums of the tensor cores, storing to a turned reference,
and loads and values that name their layout; so what runs is the kernel as it is
compiled.
"""

from collections.abc import Iterator
import contextlib
import inspect
from unittest import mock

import jax
from jax import numpy as jnp
from jax._src import callback
from jax._src.pallas.mosaic.interpret import utils as interpret_utils
from jax._src.pallas.mosaic_gpu import core
from jax._src.pallas.mosaic_gpu import primitives
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax._src.pallas.mosaic_gpu.interpret import jaxpr_interpret
from jax._src.pallas.mosaic_gpu.interpret import params
from jax._src.state import types
import numpy as np

# What lies outside an array is read as NaN, or as the largest integer: it may
# reach only outputs that are cut off.
PARAMS = params.InterpretGPUParams(out_of_bounds_reads='uninitialized')

_Interpreter = jaxpr_interpret.JaxprInterpreter
_arithmetic = _Interpreter._interpret_arithmetic_primitive
_swap = gpu_callbacks._swap


@contextlib.contextmanager
def complete() -> Iterator[None]:
  """While it is open, the interpreter knows what is added here."""
  with (
    mock.patch.object(gpu_callbacks, 'wgmma', _multiply),
    mock.patch.object(gpu_callbacks, '_swap', _swap_turned),
    mock.patch.object(
      _Interpreter, '_interpret_arithmetic_primitive', _interpret
    ),
    # Kept from one branch of a condition, it would be used in another.
    mock.patch.object(
      _Interpreter,
      'thread_id_in_block',
      property(_Interpreter.thread_id_in_block.func),
    ),
  ):
    try:
      yield
    finally:
      gpu_callbacks.reset_gpu_interpret_mode_state()


def _interpret(self, eqn, get_invals):
  """One operation that does not touch memory, or that is new."""
  token = jnp.zeros(
    gpu_callbacks.TOKEN_SHAPE_DTYPE.shape, gpu_callbacks.TOKEN_SHAPE_DTYPE.dtype
  )
  place = {
    'device_id': jnp.int32(self.device_info.device_id),
    'grid_point_coords': self.grid_point_coords,
    'thread_id': self.thread_id,
  }
  if eqn.primitive is core.layout_cast_p:
    return get_invals()[0]
  if eqn.primitive is primitives.load_p:
    ref, *indices = get_invals()
    _, value = gpu_callbacks.call_get(
      token=token,
      result_shape_and_dtype=eqn.outvars[0].aval,
      allocation_key_as_array=ref,
      transforms=jax.tree.unflatten(eqn.params['tree'], indices),
      **place,
    )
    return value
  if eqn.primitive is primitives.wgmma_accumulator_store_p:
    sums, value = get_invals()
    callback.io_callback(_set, None, sums, value, place, ordered=True)
    return value
  return _arithmetic(self, eqn, get_invals)


def _thread(device_id, thread_id) -> int:
  memory = gpu_callbacks._get_shared_memory()
  return memory.get_global_thread_id(int(device_id), int(thread_id))


def _key(array):
  return gpu_callbacks.HostAllocationKey.from_array(array)


def _set(sums, value, place) -> None:
  gpu_callbacks._get_shared_memory().store_buffer_content(
    _key(sums),
    (),
    np.asarray(value),
    _thread(place['device_id'], place['thread_id']),
    logging_info=None,
  )


def _multiply(*, token, acc_dtype, device_id, thread_id, **operands):
  """sums += a @ b, where a is a reference or a value."""
  memory = gpu_callbacks._get_shared_memory()
  thread = _thread(device_id, thread_id)

  def read(name):
    array = operands[f'{name}_allocation_key_as_array']
    if array.ndim == 2:
      return np.asarray(array)
    where, turned = _where(operands[f'{name}_transforms'])
    value, _, _ = memory.get_buffer_content(
      _key(array), where, thread, logging_info=None
    )
    return np.asarray(value).T if turned else np.asarray(value)

  sums = read('acc') + np.matmul(
    read('a').astype(acc_dtype), read('b').astype(acc_dtype)
  )
  memory.store_buffer_content(
    _key(operands['acc_allocation_key_as_array']),
    _where(operands['acc_transforms'])[0],
    sums,
    thread,
    logging_info=None,
  )
  return token


def _where(transforms):
  """A place in a buffer, and whether it is read turned."""
  transforms = gpu_callbacks._remove_noop_transforms(transforms)
  turned = [isinstance(t, types.TransposeTransform) for t in transforms]
  if any(turned[:-1]):
    raise NotImplementedError('An index into a turned reference.')
  if any(turned):
    transforms = transforms[:-1]
  transforms = jax.tree.map(int, transforms)
  return interpret_utils.to_range(transforms), any(turned)


def _swap_turned(*arguments, **named):
  """A store; into a turned reference goes the turned value."""
  call = inspect.signature(_swap).bind(*arguments, **named).arguments
  transforms = gpu_callbacks._remove_noop_transforms(call['transforms'])
  kept = tuple(
    t for t in transforms if not isinstance(t, types.TransposeTransform)
  )
  if len(kept) == len(transforms):
    return _swap(**call)
  value = jnp.asarray(call['val']).T
  token, old = _swap(**(call | {'transforms': kept, 'val': value}))
  return token, old.T
