"""Checkpoints that can be trusted: atomic, verified by digest, never silent.

Orbax writes and reads the arrays. What it leaves open is done here: a digest of
every leaf, taken on the devices before the state can change and compared after
every restore; one rename that makes a step exist; a retention that looks at the
disk and not at memory; errors that reach the training loop.

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
import re
import shutil
import threading
from typing import Any
from typing import NamedTuple

from etils import epath
import jax
from jax.experimental import multihost_utils
import numpy as np
import orbax.checkpoint as ocp

from qat import digest
from qat import manifest

_SPARE = 1.1  # Free disk space that a save needs, in sizes of the state.
_LONGEST = 400  # Characters of tensorstore's errors, which are pages.
# Status codes in the errors of tensorstore and XLA that tell of this machine's
# limits and rights, not of damaged files.
_NOT_DAMAGE = re.compile(
  'RESOURCE_EXHAUSTED|PERMISSION_DENIED|UNAVAILABLE|DEADLINE_EXCEEDED'
)


CorruptError = manifest.CorruptError


class SaveError(RuntimeError):
  """A step could not be saved; names the step, its path and the cause."""


class Restored(NamedTuple):
  """What `restore` found: the step, the state, and what was saved with it."""

  step: int
  state: Any
  extra: dict


# ------------------------------------------------------------------- restoring


def _from_first(value: int) -> int:
  """Process 0's value, in every process."""
  if jax.process_count() == 1:
    return value
  return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def _everywhere(ok: bool) -> bool:
  """Whether `ok` holds in every process."""
  if jax.process_count() == 1:
    return ok
  return bool(multihost_utils.process_allgather(np.bool_(ok)).all())


def _read_arrays(path: Path, wanted: dict) -> dict[str, jax.Array]:
  """Orbax's part of a restore; what it raises for damage is a CorruptError."""
  try:
    return ocp.PyTreeCheckpointHandler().restore(
      epath.Path(path / 'state'),
      args=ocp.args.PyTreeRestore(
        item=wanted,
        restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
        partial_restore=True,
      ),
    )
  except (MemoryError, PermissionError):
    raise
  except Exception as error:  # Damage comes as nearly any type.
    if _NOT_DAMAGE.search(str(error)):
      raise
    why = f'{type(error).__name__}: {error}'[:_LONGEST]
    raise CorruptError(f'{path} cannot be read: {why}') from error


def _read_step(path: Path, wanted: dict, partial: bool) -> tuple[dict, dict]:
  """({name: array}, extra) of one step; a CorruptError when it is damaged."""
  problem, saved, arrays = None, {}, {}
  try:
    saved = manifest.read(path)
    manifest.refuse_mismatch(path, saved, wanted, partial=partial)
    arrays = _read_arrays(path, wanted)
  except CorruptError as error:
    problem = error
  if not _everywhere(problem is None):  # The digests need every process.
    raise problem or CorruptError(f'{path} cannot be read by another process')
  found = {name: digest.digest(array) for name, array in arrays.items()}
  wrong = [
    name
    for name, words in found.items()
    if digest.as_hex(words) != saved['leaves'][name]['digest']
  ]
  if wrong:
    raise CorruptError(
      f'{path}: the digest of {len(wrong)} of {len(found)} leaves is wrong: '
      + ', '.join(wrong[:5] + ['...'] * (len(wrong) > 5))
    )
  return arrays, saved['extra']


def restore(
  directory: Path,
  abstract_state: Any,
  *,
  partial: bool,
  quarantine: bool,
  say: Callable[[str], None] = print,
) -> Restored | None:
  """The newest step that passes its check, onto any mesh.

  Args:
    directory: the folder of the checkpoints.
    abstract_state: a tree of jax.ShapeDtypeStruct, each with its sharding.
    partial: whether `abstract_state` may be a part of what was saved (the
      parameters alone, say).
    quarantine: whether a damaged step is renamed to `<step>.corrupt`; only for
      who holds the run's lock.
    say: takes one line for each step that is passed over.

  Returns:
    The step, its state and its `extra`, or None when nothing was ever saved.

  Raises:
    ValueError: the newest good step has other leaves, shapes or dtypes.
    CorruptError: there are steps, and all of them are damaged.
    NotADirectoryError: `directory` is a file.
  """
  directory = Path(directory)
  wanted = manifest.named(abstract_state)
  for name, leaf in wanted.items():
    if leaf.sharding is None:
      raise ValueError(f'Leaf {name!r} of the abstract state has no sharding.')
    try:
      leaf.sharding.shard_shape(leaf.shape)
    except ValueError as error:
      raise ValueError(f'Leaf {name!r} cannot be split: {error}') from None
  first = jax.process_index() == 0
  damaged = manifest.numbered(directory, '.corrupt') if first else []
  candidates = manifest.numbered(directory) if first else []
  while (step := _from_first(candidates.pop() if candidates else -1)) >= 0:
    path = directory / str(step)
    try:
      arrays, extra = _read_step(path, wanted, partial)
    except CorruptError as error:
      say(f'Checkpoint {step} is damaged and passed over: {error}')
      damaged.append(step)
      if quarantine and first:
        _set_aside(path)
      continue
    state = jax.tree.unflatten(
      jax.tree.structure(abstract_state), [arrays[name] for name in wanted]
    )
    return Restored(step, state, extra)
  if _from_first(len(damaged)):
    raise CorruptError(
      f'No checkpoint in {directory} can be restored; damaged: steps '
      f'{sorted(set(damaged))}. To start afresh, delete that folder or take '
      'another workdir.'
    )
  return None


def _sync(path: Path) -> None:
  """Makes a file, or the entries of a folder, survive a loss of power."""
  fd = os.open(path, os.O_RDONLY)
  try:
    os.fsync(fd)
  finally:
    os.close(fd)


def _set_aside(path: Path) -> None:
  corrupt = path.with_name(path.name + '.corrupt')
  if corrupt.exists():
    shutil.rmtree(corrupt)
  path.rename(corrupt)


# ---------------------------------------------------------------------- saving


class Checkpointer:
  """Saves in the background; the end of the `with` block waits.

  Whoever makes one must hold the run's lock (`qat.guard.lock`): it deletes what
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
    """Returns itself."""
    return self

  def __exit__(self, *_: object) -> None:
    """Waits for the last save; a SaveError when it failed."""
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
    taken = _from_first(max(manifest.numbered(self._directory), default=-1))
    if step <= taken:
      raise ValueError(
        f'Step {step} cannot be saved after step {taken}, which is in '
        f'{self._directory}; steps only grow.'
      )
    tmp = self._directory / f'{step}.tmp'
    try:
      self._make_room(tmp, sum(leaf.nbytes for leaf in leaves.values()))
      # Dispatched before the caller can donate the state; read by the thread.
      digests = {name: digest.digest(leaf) for name, leaf in leaves.items()}
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
    threading.Thread(
      target=self._finish,
      args=(self._pending, saver, tmp, body, digests),
      name=f'checkpoint-{step}',
      daemon=True,  # `wait` bounds it; the end of the program must not hang.
    ).start()

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
    else:
      failure = TimeoutError(f'not done after {self._timeout_s:g} s')
    self._pending = self._newest = None
    if failure is not None:
      raise self._error(self._step, failure) from failure

  def restore(self, abstract_state: Any) -> Restored | None:
    """The newest good step, whole; see `restore`. Sets damaged steps aside."""
    self.wait()
    return restore(
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
    free_mib = _from_first(min(free >> 20, 2**31 - 1))
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
      raise CorruptError(f'{final} reads back as something else')
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
