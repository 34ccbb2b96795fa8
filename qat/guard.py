"""What ends a run early: signals, which lose nothing, and bounded waits.

Whatever ends the process from here (`leave`) takes the run's lock and the
loader's processes with it, as the end of a `with` block would have done. Times
are of time.monotonic: setting the clock while the run goes on changes nothing.
"""

from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import faulthandler
import functools
import math
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time

import jax
from jax import numpy as jnp
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from qat import lock
from qat import sharding

TIMED_OUT = 75  # Exit code of `time_limit`; EX_TEMPFAIL of sysexits.h.
_CODES = {signal.SIGTERM: 143, signal.SIGINT: 130}  # 128 + the number.
_LAST_WORDS_S = 0.5  # For the message of a process that leaves.


def leave(code: int, message: str) -> None:
  """Ends the process at once, from any thread, whatever the others do."""

  def tell() -> None:
    print(message, file=sys.stderr, flush=True)
    sys.stdout.flush()

  try:
    # Aside, for a moment: the stream may be what the process is stuck in.
    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    teller.join(_LAST_WORDS_S)
    lock.release_all()
    for child in multiprocessing.active_children():
      child.kill()
  finally:
    os._exit(code)


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

  def __init__(self) -> None:
    self.requested: str | None = None
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

  def request(self, name: str) -> None:
    """Counts a signal that another process got, if none came to this one."""
    with self._mutex:
      self.requested = self.requested or name

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


class Agreement:
  """The signal that any process of a run has got, as all of them know it.

  A process that is alone knows at once. Several exchange what they know, in a
  program that none waits for: a call reads the exchange that the call before it
  began. So all processes must call alike, and then decide alike.

  Args:
    interrupts: of this process; counts the others' signals from then on.
    mesh: all devices.
  """

  def __init__(self, interrupts: Interrupts, mesh: Mesh):
    self._interrupts = interrupts
    self._agreed: str | None = None
    self._sent: jax.Array | None = None
    self._each = NamedSharding(mesh, P(mesh.axis_names))
    self._most = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, P()))

  def heard(self) -> str | None:
    """'SIGTERM' or 'SIGINT'; None while there was no signal."""
    own = self._interrupts.requested
    if jax.process_count() == 1:
      return own
    before, number = self._sent, signal.Signals[own] if own else 0
    mine = np.full(len(self._each.addressable_devices), number, np.int32)
    numbers = jax.make_array_from_process_local_data(self._each, mine)
    self._sent = sharding.in_turn(self._most(numbers))
    if before is not None and self._agreed is None and (most := int(before)):
      self._agreed = signal.Signals(most).name
      self._interrupts.request(self._agreed)
    return self._agreed


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
