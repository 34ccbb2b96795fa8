"""Batches of tokens for training and evaluation.

Window i of a stream is its tokens [i T, i T + T]: T inputs and, one further, T
targets. Global batch n of a run is a pure function of (data, seed, batch size,
sequence length, n): each epoch shuffles the windows anew, and batch n takes the
next B of them, across the end of an epoch too. So one integer is the whole
position, and threads, workers and processes do not change the data.
"""

from collections.abc import Iterator
from collections.abc import Sequence
import multiprocessing
import os
import signal
import threading
from typing import Any
import weakref

from absl import flags
import grain
import numpy as np

from qat.data import dataset as dataset_lib
from qat.data import position
from qat.data import shards

Batch = dict[str, np.ndarray]

# Windows; grain's own endless repetition overflows in batches of one row.
_FOR_EVER = 1 << 60


class TrainLoader:
  """Iterates over the training batches of one process, for ever.

  A batch is {'tokens': int32 [B / process_count, T], 'targets': the same}.

  Attributes:
    fingerprint: what the batches depend on, as JSON-able fields.
  """

  def __init__(
    self,
    dataset: str | os.PathLike[str],
    *,
    seq_len: int,
    batch_size: int,
    seed: int,
    process_index: int,
    process_count: int,
    workers: int,
    threads: int,
  ):
    """Opens the data at batch 0.

    Args:
      dataset: folder of a prepared data set.
      seq_len: T, tokens of a row.
      batch_size: B, rows of a global batch.
      seed: of the order of the windows.
      process_index: this process, of those that share a global batch.
      process_count: how many they are; divides `batch_size`.
      workers: reader processes; 0 reads in threads of this process.
      threads: reader threads of each reader process; 0 reads when asked.

    Raises:
      FileNotFoundError: no data set is there.
      ValueError: the arguments do not fit the data or one another.
    """
    rows = position.local_rows(
      batch_size, seq_len, process_index, process_count
    )
    if workers < 0 or threads < 0:
      raise ValueError(f'workers {workers} or threads {threads} is negative.')
    opened = dataset_lib.open_dataset(dataset)
    windows = _Windows(dataset_lib.Stream(opened, 'train'), seq_len)
    if len(windows) < batch_size:
      raise ValueError(
        f'{os.fspath(dataset)!r} has {len(windows)} training sequences of'
        f' {seq_len} tokens, fewer than one batch of {batch_size}. Lower the'
        ' batch size or the sequence length, or prepare more text.'
      )
    # grain shuffles epoch e with its seed + e: hashed, so that the second
    # epoch of seed 0 is not the first of seed 1.
    order = shards.hash64(f'order/{seed}'.encode()) % (1 << 32)
    first = grain.MapDataset.range(len(windows)).shuffle(order)
    self.fingerprint = {
      'seed': seed,
      'seq_len': seq_len,
      'batch_size': batch_size,
      'dataset': opened.digest,
      # A grain that shuffles in another way is noticed.
      'first_windows': [int(first[i]) for i in range(4)],
    }
    # `rows` windows are one process's part of a global batch, and the parts of
    # a global batch follow one another. Bytes, because grain would send arrays
    # through shared memory, which stays behind when a process is killed.
    parts = grain.MapDataset.source(windows).shuffle(order)
    parts = parts.repeat(_FOR_EVER // len(windows))
    parts = parts.batch(rows, batch_fn=np.stack).map(np.ndarray.tobytes)
    self._parts = parts[process_index::process_count]
    self._shape = rows, seq_len + 1
    self._workers, self._threads = workers, threads
    self._next_batch = 0
    self._iterator = None
    self._stop = lambda: None
    self._unusable = ''

  def __iter__(self) -> Iterator[Batch]:
    return self

  def __next__(self) -> Batch:
    """The next batch.

    Raises:
      ValueError: a damaged shard; names shard and record.
      RuntimeError: a reader process died, or this loader has failed before.
    """
    if self._unusable:
      raise RuntimeError(f'The loader {self._unusable}; restore() a position.')
    if self._iterator is None:
      self._start()
    try:
      part = next(self._iterator)
    except BaseException as error:
      # After an error grain's iterator may skip a batch, or end.
      self._end(f'failed at batch {self._next_batch}: {error!r}')
      if isinstance(error, StopIteration):
        raise RuntimeError('The endless stream of batches ended.') from error
      raise
    self._next_batch += 1
    window = np.frombuffer(part, np.int32).reshape(self._shape)
    return {
      'tokens': np.ascontiguousarray(window[:, :-1]),
      'targets': np.ascontiguousarray(window[:, 1:]),
    }

  def state(self) -> dict[str, Any]:
    """The position: {'next_batch': n, 'fingerprint': {...}}, JSON-able."""
    return {
      'next_batch': self._next_batch,
      'fingerprint': dict(self.fingerprint),
    }

  def restore(self, state: dict[str, Any]) -> None:
    """Goes on from a `state()`; the number of processes may have changed.

    Args:
      state: from `state()`, also through JSON.

    Raises:
      ValueError: if it belongs to other data; lists what differs.
    """
    next_batch = position.read(state, self.fingerprint)
    self._end('')
    self._next_batch = next_batch

  def close(self) -> None:
    """Ends threads and reader processes; can be called again."""
    self._end('is closed')

  def __enter__(self) -> 'TrainLoader':
    return self

  def __exit__(self, *_: Any) -> None:
    self.close()

  def _start(self) -> None:
    parts = self._parts[self._next_batch :].to_iter_dataset(
      grain.ReadOptions(
        num_threads=self._threads, prefetch_buffer_size=2 * self._threads
      )
    )
    if self._workers:
      if not flags.FLAGS.is_parsed():
        # grain reads absl's flags, which only absl's own `app` parses.
        flags.FLAGS.mark_as_parsed()
      parts = parts.mp_prefetch(
        grain.MultiprocessingOptions(
          num_workers=self._workers, per_worker_buffer_size=2
        ),
        worker_init_fn=_begin_worker,
      )
    self._iterator = iter(parts)
    # Also when this object is dropped and when the program ends: the workers
    # ignore the signal by which Python would end them.
    self._stop = weakref.finalize(self, self._iterator.close)

  def _end(self, unusable: str) -> None:
    self._iterator = None
    self._stop()
    self._unusable = unusable


def calibration_batch(
  dataset: str | os.PathLike[str], *, seq_len: int, sequences: int, seed: int
) -> np.ndarray:
  """Tokens `[sequences, seq_len]` of the training split, fixed by the seed.

  The same in every process, and whatever the run reads beside it.
  """
  loader = TrainLoader(
    dataset,
    seq_len=seq_len,
    batch_size=sequences,
    seed=seed,
    process_index=0,
    process_count=1,
    workers=0,
    threads=0,
  )
  with loader:
    return next(loader)['tokens']


class EvalBatches(Sequence[Batch]):
  """The validation split in order, each token predicted exactly once.

  A batch, of the rows of this process: {'tokens', 'targets': int32 `[B /
  process_count, T]`, 'weights': float32, 1 where a target counts and 0 on
  padding}. They are read when they are asked for.
  """

  def __init__(
    self,
    dataset: str | os.PathLike[str],
    *,
    seq_len: int,
    batch_size: int,
    batches: int,
    process_index: int,
    process_count: int,
  ):
    """Opens the split.

    Args:
      dataset: folder of a prepared data set.
      seq_len: T, tokens of a row.
      batch_size: B, rows of a global batch.
      batches: at most so many; 0: all.
      process_index: this process, of those that share a global batch.
      process_count: how many they are; divides `batch_size`. All get equally
        many batches.

    Raises:
      FileNotFoundError: no data set is there.
      ValueError: the arguments do not fit one another.
    """
    self._rows = position.local_rows(
      batch_size, seq_len, process_index, process_count
    )
    if batches < 0:
      raise ValueError(f'batches {batches} is negative; 0 means all.')
    opened = dataset_lib.open_dataset(dataset)
    self._stream = dataset_lib.Stream(opened, 'valid')
    self._pad, self._seq_len = opened.eot_id, seq_len
    total = -(-(len(self._stream) - 1) // (seq_len * batch_size))
    count = min(total, batches) if batches else total
    first = process_index * self._rows
    self._first_rows = range(first, first + count * batch_size, batch_size)

  def __len__(self) -> int:
    return len(self._first_rows)

  def __getitem__(self, index: int) -> Batch:
    first = self._first_rows[index]
    return _eval_batch(
      self._stream, first, self._rows, self._seq_len, self._pad
    )


def _eval_batch(
  stream: dataset_lib.Stream, first: int, rows: int, seq_len: int, pad: int
) -> Batch:
  tokens = np.full((rows, seq_len), pad, np.int32)
  targets = np.full((rows, seq_len), pad, np.int32)
  weights = np.zeros((rows, seq_len), np.float32)
  for row in range(rows):
    start = (first + row) * seq_len
    stop = min(start + seq_len + 1, len(stream))
    if stop - start < 2:
      break
    window = stream.read(start, stop)
    n = len(window) - 1
    tokens[row, :n], targets[row, :n] = window[:-1], window[1:]
    weights[row, :n] = 1
  return {'tokens': tokens, 'targets': targets, 'weights': weights}


class _Windows:
  """Random access to whole windows; what is left at the end is not used."""

  def __init__(self, stream: dataset_lib.Stream, seq_len: int):
    self._stream = stream
    self._seq_len = seq_len

  def __len__(self) -> int:
    return (len(self._stream) - 1) // self._seq_len

  def __getitem__(self, index: int) -> np.ndarray:
    start = index * self._seq_len
    return self._stream.read(start, start + self._seq_len + 1)

  def __repr__(self) -> str:
    return f'_Windows({len(self)} of {self._seq_len} tokens)'


def _begin_worker(index: int, count: int) -> None:
  """Ties a reader process to its parent."""
  del index, count
  # A signal to the whole group asks the parent to finish what it is doing, for
  # which it may need another batch.
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  signal.signal(signal.SIGTERM, signal.SIG_IGN)

  def follow() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)

  threading.Thread(target=follow, daemon=True).start()
