"""Files that are there in full or not at all, and a lock on a folder."""

from collections.abc import Iterator
import contextlib
import fcntl
import os
import pathlib
import shutil
from typing import IO

# Of what is being written; a killed process leaves it.
UNFINISHED = '.tmp'


def write(path: pathlib.Path, content: bytes) -> None:
  """Writes a file, so that after a crash it has all of `content` or is not."""
  temporary = unfinished(path)
  with temporary.open('wb') as file:
    file.write(content)
    sync(file)
  rename(temporary, path)


def unfinished(path: pathlib.Path) -> pathlib.Path:
  """The name of `path` while it is written."""
  return path.with_name(path.name + UNFINISHED)


def remove_unfinished(folder: pathlib.Path) -> None:
  """Removes what killed processes were writing in `folder`."""
  for path in folder.glob(f'*{UNFINISHED}'):
    if path.is_dir():
      shutil.rmtree(path)
    else:
      path.unlink()


def sync(file: IO[bytes]) -> None:
  """Waits until what was written to an open file is on the disk."""
  file.flush()
  os.fsync(file.fileno())


def rename(source: pathlib.Path, target: pathlib.Path) -> None:
  """Renames a synced file or a folder of them; the new name lasts."""
  source.replace(target)
  for folder in {source.parent, target.parent}:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
      os.fsync(descriptor)
    finally:
      os.close(descriptor)


@contextlib.contextmanager
def lock(folder: pathlib.Path, wait: bool) -> Iterator[None]:
  """Keeps other processes from writing in `folder`.

  The lock ends with the process, however that ends; its file stays.

  Args:
    folder: an existing folder.
    wait: wait for a process that has the lock.

  Yields:
    Nothing.

  Raises:
    BlockingIOError: without `wait`, if another process has the lock.
  """
  with (folder / '.lock').open('a') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError as error:
      raise BlockingIOError(
        f'Another process is writing in {str(folder)!r}.'
      ) from error
    yield
