"""Safetensors files, and folders that appear whole or not at all."""

from collections.abc import Iterator
from collections.abc import Mapping
import contextlib
import os
import pathlib
import shutil
from typing import NamedTuple

from jax import numpy as jnp
import numpy as np
import safetensors
from safetensors import numpy as safetensors_numpy

# What the files of models hold, by the format's names.
DTYPES = {
  'F32': np.dtype(np.float32),
  'F16': np.dtype(np.float16),
  'BF16': np.dtype(jnp.bfloat16),
}
# Bytes of a file; a model that is written takes no more memory than this beside
# its parameters.
SHARD_BYTES = 1 << 30


class Tensor(NamedTuple):
  """What a file says of one of its tensors."""

  file: pathlib.Path
  shape: tuple[int, ...]
  dtype: str


def headers(file: pathlib.Path) -> dict[str, Tensor]:
  """The tensors of a safetensors file by name; reads none of them.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is damaged, cut short or no such file.
  """
  with _opened(file) as tensors:
    found = {}
    for name in tensors.keys():
      part = tensors.get_slice(name)
      found[name] = Tensor(file, tuple(part.get_shape()), part.get_dtype())
  return found


def read(file: pathlib.Path, name: str) -> np.ndarray:
  """One tensor of a safetensors file, in the dtype that it is stored in."""
  with _opened(file) as tensors:
    return tensors.get_tensor(name)


@contextlib.contextmanager
def _opened(file: pathlib.Path):
  if not file.is_file():
    raise FileNotFoundError(f'{file} is missing.')
  try:
    with safetensors.safe_open(file, framework='np') as tensors:
      yield tensors
  except (safetensors.SafetensorError, TypeError) as error:
    raise ValueError(
      f'{file} is damaged or no safetensors file: {error}. Copy it again.'
    ) from error


def write(file: pathlib.Path, tensors: Mapping[str, np.ndarray]) -> None:
  """Writes a safetensors file through to the disk.

  Args:
    file: where; replaced if it exists.
    tensors: contiguous or not, by name.

  Raises:
    OSError: it could not be written, on a full disk for example.
  """
  # Not `ascontiguousarray`, which makes `[1]` of a scalar.
  whole = {name: np.asarray(x, order='C') for name, x in tensors.items()}
  try:
    # Its readers tell formats of several libraries apart by this entry.
    safetensors_numpy.save_file(whole, file, metadata={'format': 'pt'})
  except safetensors.SafetensorError as error:
    raise OSError(f'{file} could not be written: {error}') from error
  # The library makes it readable for its owner alone.
  file.chmod(file.parent.stat().st_mode & 0o666)
  with open(file, 'rb+') as written:
    os.fsync(written.fileno())


def shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
  """Names in their order, cut where a file would grow past `limit` bytes.

  Args:
    sizes: bytes by name.
    limit: bytes; a tensor that is larger has a file of its own.

  Returns:
    At least one list.
  """
  found: list[list[str]] = [[]]
  room = limit
  for name, size in sizes.items():
    if size > room and found[-1]:
      found.append([])
      room = limit
    found[-1].append(name)
    room -= size
  return found


def check_new(path: pathlib.Path) -> None:
  """Raises a FileExistsError where `path` is more than an empty folder."""
  if path.is_mount():
    raise FileExistsError(
      f'{path} is a mount point, which no finished folder can take the place'
      ' of; give a folder in it.'
    )
  if path.exists() and not (path.is_dir() and not any(path.iterdir())):
    raise FileExistsError(
      f'{path} exists already; nothing was written. Remove it, or give another'
      ' folder.'
    )


@contextlib.contextmanager
def new_folder(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """A folder to write into, which becomes `path` when all went well.

  What a process that was killed left is removed by the next one.

  Raises:
    FileExistsError: `path` exists and is not an empty folder.
  """
  path = path.resolve()  # Of a link, where it leads.
  check_new(path)
  partial = path.with_name(path.name + '.partial')
  if partial.exists():
    shutil.rmtree(partial)
  partial.mkdir(parents=True)
  try:
    yield partial
    partial.rename(path)  # Over an empty folder too.
  except BaseException:
    shutil.rmtree(partial, ignore_errors=True)
    raise
