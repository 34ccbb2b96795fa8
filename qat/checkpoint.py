"""Saving checkpoints that can be trusted: atomic, with digests, never silent.

Orbax writes the arrays. What it leaves open is done here: a digest of every
leaf, taken on the devices before the state can change; one rename that makes a
step exist; a retention that looks at the disk and not at memory; errors that
reach the training loop. `qat.restore` reads what is written here.

    <directory>/<step>/manifest.json   names, shapes, dtypes, digests, `extra`
    <directory>/<step>/state/          orbax: {leaf name: array}
    <directory>/<step>.tmp/            being written, or being deleted
    <directory>/<step>.corrupt/        failed its check; kept for a look

With several processes all of them call every method in the same order, on one
shared directory; process 0 alone writes manifests, renames and deletes.
"""

import collections
from collections.abc import Callable
import concurrent.futures
import os
from pathlib import Path
import shutil
import threading
from typing import Any

import jax
import orbax.checkpoint as ocp

from qat import digest
from qat import manifest
from qat import restore
from qat import sharding

_SPARE = 1.1  # Free disk space that a save needs, in sizes of the state.


class SaveError(RuntimeError):
  """A step could not be saved; names the step, its path and the cause."""


class Checkpointer:
  """Saves in the background; the end of the `with` block waits.

  Whoever makes one must hold the run's lock (`qat.lock`): it deletes what
  a killed run left half written.
  """

  def __init__(
    self,
    directory: Path,
    *,
    keep_last: int,
    keep_every: int,
    timeout_s: float,
    say: Callable[[str], None] = print,
  ) -> None:
    """Makes the folder, and empties it of half-written steps.

    Args:
      directory: the folder of the checkpoints.
      keep_last: newest steps kept; at least 1.
      keep_every: multiples of it are kept as well; 0: none.
      timeout_s: seconds after which a save has failed.
      say: takes a line for each thing worth telling.

    Raises:
      ValueError: a bound is out of range.
      NotADirectoryError: `directory` is a file.
    """
    if keep_last < 1 or keep_every < 0 or not 0 < timeout_s < float('inf'):
      raise ValueError(
        'A Checkpointer needs keep_last >= 1, keep_every >= 0 and '
        f'0 < timeout_s < inf; got {keep_last}, {keep_every}, {timeout_s}.'
      )
    self._directory = Path(directory).absolute()
    self._keep_last, self._keep_every = keep_last, keep_every
    self._timeout_s, self._say = timeout_s, say
    self._pending: concurrent.futures.Future[None] | None = None
    self._step = -1  # Of `_pending`.
    self._thread: threading.Thread | None = None  # Completes `_pending`.
    self._newest: int | None = None
    self._reached: collections.Counter[str] = collections.Counter()
    self._first = jax.process_index() == 0
    if self._directory.exists() and not self._directory.is_dir():
      raise NotADirectoryError(
        f'{self._directory} is a file; checkpoints need a folder there.'
      )
    if self._first:
      self._directory.mkdir(parents=True, exist_ok=True)
      for step in manifest.numbered(self._directory, '.tmp'):
        say(f'Deleting the half-written checkpoint of step {step}.')
        shutil.rmtree(self._directory / f'{step}.tmp')

  def __enter__(self) -> 'Checkpointer':
    return self

  def __exit__(self, *_: object) -> None:
    self.wait()

  def save(self, step: int, state: Any, extra: dict) -> None:
    """Starts to save; returns when `state` may be changed or donated.

    Args:
      step: larger than every step on disk.
      state: a tree of jax arrays, sharded or not.
      extra: what JSON can hold, exactly: the position in the data, ...

    Raises:
      ValueError, TypeError: the arguments cannot be saved as they are.
      SaveError: this save could not start, or the one before it failed.
    """
    self.wait()
    leaves = manifest.named(state)
    body = manifest.make(step, leaves, extra)
    taken = restore.from_first(
      max(manifest.numbered(self._directory), default=-1)
    )
    if step <= taken:
      raise ValueError(
        f'Step {step} cannot be saved after step {taken}, which is in '
        f'{self._directory}; steps only grow.'
      )
    tmp = self._directory / f'{step}.tmp'
    try:
      self._make_room(tmp, sum(leaf.nbytes for leaf in leaves.values()))
      # Dispatched before the caller can donate the state; read by the thread.
      digests = {
        name: sharding.in_turn(digest.digest(leaf))
        for name, leaf in leaves.items()
      }
      # A new one for each save: what a failed save leaves in it is not ours.
      saver = ocp.AsyncCheckpointer(
        ocp.PyTreeCheckpointHandler(),
        async_options=ocp.options.AsyncOptions(
          timeout_secs=max(1, int(self._timeout_s)),
          # Else a save that fails can leave threads that wait for ever.
          create_directories_asynchronously=False,
        ),
      )
      saver.save(tmp / 'state', args=ocp.args.PyTreeSave(leaves))
    except Exception as error:
      self._give_up(tmp)
      raise self._error(step, error) from error
    self._at('save_started')
    self._pending, self._step = concurrent.futures.Future(), step
    self._thread = threading.Thread(
      target=self._finish,
      args=(self._pending, saver, tmp, body, digests),
      name=f'checkpoint-{step}',
      daemon=True,  # `wait` bounds it; the end of the program must not hang.
    )
    self._thread.start()

  def poll(self) -> int | None:
    """The newest step that is on disk for good; never waits.

    Returns:
      The step, or None when there is none.

    Raises:
      SaveError: the save that has ended since the last call failed.
    """
    if self._pending is not None and self._pending.done():
      self.wait()
    seen = self._directory / str(self._newest) / manifest.FILE
    if self._newest is None or not seen.is_file():
      self._newest = max(self.steps(), default=None)
    return self._newest

  def wait(self) -> None:
    """Waits until nothing is being saved.

    Raises:
      SaveError: the save failed, or took longer than `timeout_s`.
    """
    if self._pending is None:
      return
    if concurrent.futures.wait([self._pending], self._timeout_s).done:
      failure = self._pending.exception()
      # It still frees arrays; one freed while Python shuts down aborts it.
      self._thread.join(self._timeout_s)
    else:
      failure = TimeoutError(f'not done after {self._timeout_s:g} s')
    self._pending = self._newest = None
    if failure is not None:
      raise self._error(self._step, failure) from failure

  def restore(self, abstract_state: Any) -> restore.Restored | None:
    """The newest good step; damaged ones are set aside. See `qat.restore`."""
    self.wait()
    return restore.newest(
      self._directory,
      abstract_state,
      partial=False,
      quarantine=True,
      say=self._say,
    )

  def steps(self) -> list[int]:
    """Complete steps on disk, ascending."""
    return manifest.steps(self._directory)

  def _make_room(self, tmp: Path, size: int) -> None:
    """Checks the free space (process 0's word counts) and clears `tmp`."""
    free = shutil.disk_usage(self._directory).free if self._first else 0
    free_mib = restore.from_first(min(free >> 20, 2**31 - 1))
    need_mib = int(size * _SPARE) >> 20
    if free_mib <= need_mib:
      raise OSError(
        f'{free_mib} MiB are free and a checkpoint takes {need_mib + 1} MiB; '
        'free some, or lower keep_last'
      )
    if self._first:
      if tmp.exists():
        shutil.rmtree(tmp)
      tmp.mkdir()  # Not its parents: a folder that vanished is an error.

  def _finish(
    self,
    pending: concurrent.futures.Future[None],
    saver: ocp.AsyncCheckpointer,
    tmp: Path,
    body: dict,
    digests: dict[str, tuple[jax.Array, jax.Array]],
  ) -> None:
    """In the background: waits for orbax, then makes the step exist."""
    try:
      saver.wait_until_finished()
      saver.close()
      if self._first:
        for name, words in digests.items():
          body['leaves'][name]['digest'] = digest.as_hex(words)
        self._commit(tmp, body)
      pending.set_result(None)
    except BaseException as error:  # Whatever it is, the run must hear of it.
      self._give_up(tmp)
      pending.set_exception(error)

  def _commit(self, tmp: Path, body: dict) -> None:
    manifest.write(tmp, body)
    # Orbax syncs its arrays, not its metadata nor its folders.
    for folder, _, files in os.walk(tmp):
      for file in files:
        _sync(Path(folder, file))
      _sync(Path(folder))
    final = self._directory / str(body['step'])
    self._at('before_commit')
    tmp.rename(final)
    _sync(self._directory)
    self._at('after_commit')
    if manifest.read(final) != body:
      raise manifest.CorruptError(f'{final} reads back as something else')
    self._prune()

  def _prune(self) -> None:
    """Deletes what retention does not keep; a newer step is on disk by now."""
    complete = self.steps()
    for step in complete[: -self._keep_last]:
      if self._keep_every and step % self._keep_every == 0:
        continue
      doomed = self._directory / f'{step}.tmp'  # Half deleted is no step.
      (self._directory / str(step)).rename(doomed)
      shutil.rmtree(doomed)

  def _give_up(self, tmp: Path) -> None:
    if self._first:
      shutil.rmtree(tmp, ignore_errors=True)  # The error is on its way already.

  def _error(self, step: int, cause: BaseException) -> SaveError:
    return SaveError(
      f'The checkpoint of step {step} could not be saved to '
      f'{self._directory / str(step)}: {type(cause).__name__}: {cause}'
    )

  def _at(self, point: str) -> None:
    """Dies like a killed process where a test asked for it.

    QAT_FAULT_AT=<point>[:n] is the n-th time, from 1, that `point` is reached.
    """
    self._reached[point] += 1
    wanted, _, n = os.environ.get('QAT_FAULT_AT', '').partition(':')
    if wanted == point and self._reached[point] == int(n or 1):
      os._exit(137)


def _sync(path: Path) -> None:
  """Makes a file, or the entries of a folder, survive a loss of power."""
  fd = os.open(path, os.O_RDONLY)
  try:
    os.fsync(fd)
  finally:
    os.close(fd)
