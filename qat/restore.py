"""Reading checkpoints: the newest step whose digests are right, on any mesh.

Orbax reads the arrays; a digest of every leaf is then computed on the devices
and compared with the manifest's. With several processes all of them call
`newest` together; process 0 alone looks at the folder and renames in it.
"""

from collections.abc import Callable
from collections.abc import Iterator
import errno
from pathlib import Path
import re
import shutil
from typing import Any
from typing import NamedTuple

from etils import epath
import jax
from jax.experimental import multihost_utils
import numpy as np
import orbax.checkpoint as ocp

from qat import digest
from qat import manifest
from qat import sharding

_LONGEST = 400  # Characters of tensorstore's errors, which are pages.
# Status codes in the errors of tensorstore and XLA that tell of this machine's
# limits and rights, not of damaged files.
_NOT_DAMAGE = re.compile(
  'RESOURCE_EXHAUSTED|PERMISSION_DENIED|UNAVAILABLE|DEADLINE_EXCEEDED'
)
# Likewise of the operating system: files and memory that there are no more of,
# rights, and a file system that does not answer.
_LIMITS = frozenset(
  (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN)
  + (errno.EACCES, errno.EPERM, errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN)
)


class Restored(NamedTuple):
  """What `newest` found: the step, the state, and what was saved with it."""

  step: int
  state: Any
  extra: dict


def newest(
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
  directory = Path(directory).absolute()  # orbax reads no other.
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
  while (step := from_first(candidates.pop() if candidates else -1)) >= 0:
    path = directory / str(step)
    try:
      arrays, extra = _read_step(path, wanted, partial)
    except manifest.CorruptError as error:
      say(f'Checkpoint {step} is damaged and passed over: {error}')
      damaged.append(step)
      if quarantine and first:
        _set_aside(path)
      continue
    state = jax.tree.unflatten(
      jax.tree.structure(abstract_state), [arrays[name] for name in wanted]
    )
    return Restored(step, state, extra)
  if from_first(len(damaged)):
    raise manifest.CorruptError(
      f'No checkpoint in {directory} can be restored; damaged: steps '
      f'{sorted(set(damaged))}. To start afresh, delete that folder or take '
      'another workdir.'
    )
  return None


def from_first(value: int) -> int:
  """Process 0's value, in every process."""
  if jax.process_count() == 1:
    return value
  return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def _read_step(path: Path, wanted: dict, partial: bool) -> tuple[dict, dict]:
  """({name: array}, extra) of one step; a CorruptError when it is damaged."""
  problem, saved, arrays = None, {}, {}
  try:
    saved = manifest.read(path)
    manifest.refuse_mismatch(path, saved, wanted, partial=partial)
    arrays = _read_arrays(path, wanted)
  except manifest.CorruptError as error:
    problem = error
  if not _everywhere(problem is None):  # The digests need every process.
    raise problem or manifest.CorruptError(
      f'{path} cannot be read by another process'
    )
  found = {
    name: sharding.in_turn(digest.digest(array))
    for name, array in arrays.items()
  }
  wrong = [
    name
    for name, words in found.items()
    if digest.as_hex(words) != saved['leaves'][name]['digest']
  ]
  if wrong:
    raise manifest.CorruptError(
      f'{path}: the digest of {len(wrong)} of {len(found)} leaves is wrong: '
      + ', '.join(wrong[:5] + ['...'] * (len(wrong) > 5))
    )
  return arrays, saved['extra']


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
  except Exception as error:  # Damage comes as nearly any type.
    if any(map(_is_limit, _causes(error))):
      raise
    why = f'{type(error).__name__}: {error}'[:_LONGEST]
    raise manifest.CorruptError(f'{path} cannot be read: {why}') from error


def _is_limit(error: BaseException) -> bool:
  """Whether an error is of this machine, and the files may be good."""
  return (
    isinstance(error, MemoryError)
    or (isinstance(error, OSError) and error.errno in _LIMITS)
    or bool(_NOT_DAMAGE.search(str(error)))
  )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
  """An error, what it was raised from, and so on."""
  while error is not None:
    yield error
    error = error.__cause__ or error.__context__


def _everywhere(ok: bool) -> bool:
  """Whether `ok` holds in every process."""
  if jax.process_count() == 1:
    return ok
  return bool(multihost_utils.process_allgather(np.bool_(ok)).all())


def _set_aside(path: Path) -> None:
  corrupt = path.with_name(path.name + '.corrupt')
  if corrupt.exists():
    shutil.rmtree(corrupt)
  path.rename(corrupt)
