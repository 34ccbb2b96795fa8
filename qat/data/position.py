"""Where a loader of training batches stands, and whose rows it has."""

from typing import Any


def read(state: dict[str, Any], fingerprint: dict[str, Any]) -> int:
  """The next batch of a loader's `state()`.

  Args:
    state: from `state()`, also through JSON.
    fingerprint: of the loader that is to go on from it.

  Raises:
    ValueError: if it belongs to other data; lists what differs.
  """
  try:
    next_batch, saved = state['next_batch'], state['fingerprint']
    names = sorted({*saved, *fingerprint})
    changed = [
      f'  {name}: {saved.get(name)!r} saved, {fingerprint.get(name)!r} now'
      for name in names
      if saved.get(name) != fingerprint.get(name)
    ]
  except (KeyError, TypeError, AttributeError) as error:
    raise ValueError(f'Not a position in data: {state!r}') from error
  if changed:
    raise ValueError(
      'The saved position is in other data, so that the run would see some'
      ' text twice and some never:\n'
      + '\n'.join(changed)
      + '\nGo on with the saved values, or begin a new run.'
    )
  if type(next_batch) is not int or next_batch < 0:
    raise ValueError(f'next_batch {next_batch!r} is not a whole number.')
  return next_batch


def local_rows(
  batch_size: int, seq_len: int, process_index: int, process_count: int
) -> int:
  """The rows of a global batch that one process has.

  Raises:
    ValueError: the arguments do not fit one another.
  """
  if batch_size < 1 or seq_len < 1:
    raise ValueError(
      f'batch_size {batch_size} or seq_len {seq_len} is not positive.'
    )
  if not 0 <= process_index < process_count:
    raise ValueError(
      f'process_index {process_index} is not in [0, {process_count}).'
    )
  if batch_size % process_count:
    raise ValueError(
      f'A batch of {batch_size} sequences cannot be shared by'
      f' {process_count} processes; choose a multiple of {process_count}.'
    )
  return batch_size // process_count
