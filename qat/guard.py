"""What protects a run: one writer, signals that lose nothing, bounded waits.

Whatever ends the process from here (`leave`) takes the run's lock and the
loader's processes with it, as the end of a `with` block would have done. Times
are of time.monotonic: setting the clock while the run goes on changes nothing.
"""

from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import faulthandler
import fcntl
import functools
import json
import math
import multiprocessing
import os
from pathlib import Path
import signal
import socket
import subprocess
import sys
import threading
import time

TIMED_OUT = 75  # Exit code of `time_limit`; EX_TEMPFAIL of sysexits.h.
_CODES = {signal.SIGTERM: 143, signal.SIGINT: 130}  # 128 + the number.
_PATIENCE_S = 0.5  # For another process that reads or writes the same lock.
_held: list[Path] = []  # Lock files of this process.


class LockedError(RuntimeError):
  """Another process writes, or may write, into the run's folder."""


def leave(code: int, message: str) -> None:
  """Ends the process at once, from any thread, whatever the others do."""

  def tell() -> None:
    print(message, file=sys.stderr, flush=True)
    sys.stdout.flush()

  try:
    # Aside, for a moment: the stream may be what the process is stuck in.
    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    teller.join(_PATIENCE_S)
    for path in _held:
      _unlock(path)
    for child in multiprocessing.active_children():
      child.kill()
  finally:
    os._exit(code)


# -------------------------------------------------------------------- the lock


@contextlib.contextmanager
def lock(workdir: Path) -> Iterator[None]:
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


# --------------------------------------------------------------------- signals


class Interrupts:
  """SIGTERM and SIGINT as a wish that the loop fulfils when it can.

  The loop looks at `requested`, saves and leaves with `exit_code()`. Signals
  are read by a thread of their own, so they are seen while the main thread is
  deep in a compiler. A second SIGINT ends the process at once. Enter it in the
  main thread, after jax.distributed.initialize, which has a handler of its own.

  Attributes:
    requested: 'SIGTERM' or 'SIGINT', the first that came; None before.
  """

  requested: str | None

  def __init__(self) -> None:
    self.requested = None
    self._nothing_to_lose = False
    self._sigints = 0
    # Guards the fields above: main thread and watcher never decide at once.
    self._mutex = threading.Lock()
    self._undo: list[Callable[[], object]] = []

  def __enter__(self) -> 'Interrupts':
    """Installs the handlers."""
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    watcher = threading.Thread(
      target=self._watch, args=(receiver,), name='signals', daemon=True
    )
    watcher.start()
    old_fd = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    # A handler in Python, though it does nothing: without one the system's
    # default would act, and no byte be sent to the watcher.
    old = {each: signal.signal(each, lambda *_: None) for each in _CODES}
    os.register_at_fork(after_in_child=self._forget)

    def undo() -> None:
      for each, handler in old.items():
        # None: whoever installed it did so outside of Python.
        signal.signal(each, handler or signal.SIG_DFL)
      signal.set_wakeup_fd(old_fd)
      # The watcher reads the end of the stream, though a fork has a copy.
      sender.shutdown(socket.SHUT_WR)
      sender.close()
      watcher.join()
      receiver.close()

    self._undo.append(undo)
    return self

  def __exit__(self, *_: object) -> None:
    """Puts the old handlers back."""
    self._undo.pop()()

  def exit_code(self) -> int:
    """143 after a SIGTERM, 130 after a SIGINT, 0 without a signal."""
    return _CODES[signal.Signals[self.requested]] if self.requested else 0

  @contextlib.contextmanager
  def nothing_to_lose(self) -> Iterator[None]:
    """A phase (data preparation, compiling) that a signal ends at once.

    Raises:
      SystemExit: a signal had come before the phase began.
    """
    with self._mutex:
      if self.requested:
        raise SystemExit(self.exit_code())
      before, self._nothing_to_lose = self._nothing_to_lose, True
    try:
      yield
    finally:
      with self._mutex:
        self._nothing_to_lose = before

  def _forget(self) -> None:
    """In a forked child: signals do there what they do by default.

    Else the child would tell its parent's watcher of its own signals, and be
    deaf to them itself.
    """
    if self._undo:
      self._undo.clear()
      signal.set_wakeup_fd(-1)
      signal.signal(signal.SIGTERM, signal.SIG_DFL)
      signal.signal(signal.SIGINT, signal.default_int_handler)

  def _watch(self, receiver: socket.socket) -> None:
    while received := receiver.recv(1):
      if received[0] in _CODES:  # Others that Python handles arrive too.
        with self._mutex:
          self._on(signal.Signals(received[0]))

  def _on(self, signum: signal.Signals) -> None:
    self.requested = self.requested or signum.name
    self._sigints += signum == signal.SIGINT
    if self._nothing_to_lose:
      leave(self.exit_code(), f'{signum.name}: nothing to save; leaving.')
    if self._sigints > 1:
      leave(_CODES[signum], 'Second SIGINT: leaving without saving.')
    with contextlib.suppress(Exception):  # A closed stderr must not end this.
      print(
        f'{signum.name}: will save, then leave.', file=sys.stderr, flush=True
      )


# ----------------------------------------------------------------- time limits


class _Watchdog:
  """One thread that waits for the earliest of all deadlines."""

  def __init__(self) -> None:
    self._changed = threading.Condition()
    self._limits: dict[object, tuple[float, str, float]] = {}
    self._waiting_until = 0.0  # What the thread has last looked at.
    threading.Thread(target=self._run, name='time limits', daemon=True).start()

  def add(self, what: str, seconds: float) -> object:
    key, deadline = object(), time.monotonic() + seconds
    with self._changed:
      self._limits[key] = deadline, what, seconds
      # A thread that wakes too early looks again; only too late must not be.
      if deadline < self._waiting_until:
        self._changed.notify()
    return key

  def remove(self, key: object) -> None:
    with self._changed:
      del self._limits[key]

  def _run(self) -> None:
    with self._changed:
      while True:
        deadline, what, seconds = min(
          self._limits.values(), default=(math.inf, '', 0.0)
        )
        now = time.monotonic()
        if now >= deadline:
          faulthandler.dump_traceback(file=2)
          leave(
            TIMED_OUT,
            f'{what} took longer than its limit of {seconds:g} s; the stacks '
            f'of all threads are above. Leaving with exit code {TIMED_OUT}.',
          )
        self._waiting_until = deadline
        self._changed.wait(min(deadline - now, threading.TIMEOUT_MAX))


@functools.cache
def _watchdog(pid: int) -> _Watchdog:
  """The watchdog of process `pid`: a fork has its parent's memory, not its."""
  del pid  # Only the cache's key.
  return _Watchdog()


@contextlib.contextmanager
def time_limit(what: str, seconds: float) -> Iterator[None]:
  """Ends the process when the block takes longer, and says what did.

  For waits that cannot be interrupted: a batch, a compilation, a collective.
  All stacks go to stderr and the exit code is TIMED_OUT. It costs microseconds,
  so it can stand around every batch; limits may nest.

  Args:
    what: names the wait, at the start of a sentence: 'The next batch'.
    seconds: more than 0, and finite.

  Raises:
    ValueError: `seconds` is neither.
  """
  if not 0 < seconds < math.inf:
    raise ValueError(f'{what}: a limit of {seconds} s is none; give seconds.')
  watchdog = _watchdog(os.getpid())
  key = watchdog.add(what, seconds)
  try:
    yield
  finally:
    watchdog.remove(key)
