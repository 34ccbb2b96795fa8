"""One writer in the folder of a run; the lock of a dead process is free."""

from collections.abc import Iterator
import contextlib
import fcntl
import json
import os
from pathlib import Path
import socket
import subprocess
import sys
import time

_PATIENCE_S = 0.5  # For another process that reads or writes the same lock.
_held: list[Path] = []  # Lock files of this process.


class LockedError(RuntimeError):
  """Another process writes, or may write, into the run's folder."""


@contextlib.contextmanager
def hold(workdir: Path) -> Iterator[None]:
  """Makes this process the one writer of `workdir` while the block runs.

  The file `lock` says who writes. One that is left by a process that is gone
  (this host, and the process ended or the machine restarted) is taken over;
  the start time tells a process from a later one of the same number.

  Of several processes of one run, process 0 takes it.

  Args:
    workdir: the folder of the run; made when missing.

  Raises:
    LockedError: another live process of this host writes there, or one of
      another host may; says what to do.
  """
  workdir = Path(workdir)
  workdir.mkdir(parents=True, exist_ok=True)
  path = (workdir / 'lock').absolute()
  mine = _identity(os.getpid())
  with _alone_in(workdir):
    if path.exists():
      _refuse_live(path)
    # Written aside and renamed: who reads it never sees a part of it.
    draft = path.with_name('lock.new')
    with draft.open('w') as file:
      json.dump(mine, file)
      file.flush()
      os.fsync(file.fileno())
    draft.rename(path)
  _held.append(path)
  try:
    yield
  finally:
    _held.remove(path)
    _unlock(path)


def release_all() -> None:
  """Deletes this process's locks, when it ends without unwinding its stack."""
  for path in _held:
    _unlock(path)


def _unlock(path: Path) -> None:
  """Deletes a lock if it is this process's: not its parent's, before a fork."""
  with contextlib.suppress(FileNotFoundError, ValueError):
    if json.loads(path.read_text()) == _identity(os.getpid()):
      path.unlink()


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
  """Holds the system's lock of a folder, for the instant of a decision."""
  fd = os.open(folder, os.O_RDONLY)
  deadline = time.monotonic() + _PATIENCE_S
  try:
    while True:
      try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        break
      except BlockingIOError:
        if time.monotonic() > deadline:
          raise LockedError(
            f'Another process keeps {folder} locked (flock); end it first.'
          ) from None
        time.sleep(0.01)
    yield
  finally:
    os.close(fd)


def _refuse_live(path: Path) -> None:
  """Raises a LockedError unless the process that `path` names is gone."""
  try:
    other = json.loads(path.read_text())
    host, pid, _, _ = (other[key] for key in _identity(os.getpid()))
  except (ValueError, KeyError, TypeError):
    raise LockedError(
      f'{path} does not say who writes here. If no run does, delete it.'
    ) from None
  if host != socket.gethostname():
    raise LockedError(
      f'Process {pid} on {host} writes into {path.parent}, or died there. '
      f'If that run has ended, delete {path}.'
    )
  if other == _identity(pid):
    raise LockedError(
      f'Process {pid} on this machine writes into {path.parent}. Wait for it, '
      f'end it (kill {pid}), or take another workdir.'
    )


def _identity(pid: int) -> dict:
  """What tells a process from every other, before it and after it."""
  boot = Path('/proc/sys/kernel/random/boot_id')
  return {
    'host': socket.gethostname(),
    'pid': pid,
    'boot': boot.read_text().strip() if boot.exists() else '',
    'started': _started(pid),
  }


def _started(pid: int) -> str | None:
  """When a process began, in the system's own words; None when it is gone."""
  if sys.platform != 'linux':
    command = ['ps', '-o', 'lstart=', '-p', str(pid)]
    ps = subprocess.run(command, capture_output=True, text=True, check=False)
    return ps.stdout.strip() or None
  try:
    # proc(5): the name may hold anything, so count from behind it: field 3 is
    # the state, field 22 the start in clock ticks after boot.
    fields = Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()
  except (FileNotFoundError, ProcessLookupError):
    return None
  return None if fields[0] in 'ZX' else fields[19]
