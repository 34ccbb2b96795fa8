"""The order of the batches, its resumption, and evaluation."""

from collections.abc import Callable
import json
import multiprocessing
import pathlib
import shutil
from typing import Any

import numpy as np
import pytest

from qat.data import dataset as dataset_lib
from qat.data import loader as loader_lib

T = 100
B = 4

Open = Callable[..., loader_lib.TrainLoader]


@pytest.fixture
def open_loader(prepared: pathlib.Path) -> Open:
  """Opens a loader of `prepared`; keyword arguments change it."""
  opened = []

  def make(folder: pathlib.Path = prepared, **changes: Any) -> Any:
    fields = dict(
      seq_len=T,
      batch_size=B,
      seed=3,
      process_index=0,
      process_count=1,
      workers=0,
      threads=0,
    )
    opened.append(loader_lib.TrainLoader(folder, **fields | changes))
    return opened[-1]

  yield make
  for loader in opened:
    loader.close()


@pytest.fixture(scope='module')
def stream(prepared: pathlib.Path) -> np.ndarray:
  found = dataset_lib.Stream(dataset_lib.open_dataset(prepared), 'train')
  return found.read(0, len(found))


def take(loader: loader_lib.TrainLoader, n: int) -> list[loader_lib.Batch]:
  return [next(loader) for _ in range(n)]


def assert_same(
  found: list[loader_lib.Batch], expected: list[loader_lib.Batch]
) -> None:
  assert len(found) == len(expected)
  for a, b in zip(found, expected, strict=True):
    assert a.keys() == b.keys()
    for key in a:
      np.testing.assert_array_equal(a[key], b[key], strict=True)


def rows_of(batches: list[loader_lib.Batch]) -> list[bytes]:
  """Each row with its targets."""
  return [
    np.append(tokens, targets[-1]).tobytes()
    for batch in batches
    for tokens, targets in zip(batch['tokens'], batch['targets'], strict=True)
  ]


def test_targets_are_the_tokens_one_further(open_loader: Open) -> None:
  for batch in take(open_loader(), 3):
    assert batch['tokens'].shape == batch['targets'].shape == (B, T)
    assert batch['tokens'].dtype == batch['targets'].dtype == np.int32
    np.testing.assert_array_equal(
      batch['tokens'][:, 1:], batch['targets'][:, :-1]
    )


def test_each_epoch_has_every_window_once(
  open_loader: Open, stream: np.ndarray
) -> None:
  n = (len(stream) - 1) // T
  windows = [stream[i * T : i * T + T + 1].tobytes() for i in range(n)]
  # Batches run on across the end of an epoch: three of them, B not dividing n.
  rows = rows_of(take(open_loader(), 3 * n // B + 1))
  epochs = [rows[i * n : i * n + n] for i in range(3)]
  for epoch in epochs:
    assert sorted(epoch) == sorted(windows)
    assert epoch != windows
  assert epochs[0] != epochs[1]


def test_one_seed_is_not_another_shifted(
  open_loader: Open, stream: np.ndarray
) -> None:
  n = (len(stream) - 1) // T
  rows = rows_of(take(open_loader(seed=3), 2 * n // B + 1))
  assert rows[n : n + 9] != rows_of(take(open_loader(seed=4), 3))[:9]


@pytest.mark.parametrize(('workers', 'threads'), [(0, 3), (1, 0), (2, 2)])
def test_readers_do_not_change_the_batches(
  open_loader: Open, workers: int, threads: int
) -> None:
  expected = take(open_loader(), 12)
  found = take(open_loader(workers=workers, threads=threads), 12)
  assert_same(found, expected)


@pytest.mark.parametrize('process_count', [2, 4])
def test_processes_share_the_rows_of_a_batch(
  open_loader: Open, process_count: int
) -> None:
  parts = [
    take(open_loader(process_index=i, process_count=process_count), 12)
    for i in range(process_count)
  ]
  joined = [
    {key: np.concatenate([p[key] for p in batch]) for key in batch[0]}
    for batch in zip(*parts, strict=True)
  ]
  assert_same(joined, take(open_loader(), 12))


def test_resume_is_exact_at_every_position(
  open_loader: Open, stream: np.ndarray
) -> None:
  total = (len(stream) - 1) // T // B + 3
  straight = open_loader()
  expected, states = [], []
  for _ in range(total):
    states.append(json.loads(json.dumps(straight.state())))
    expected.append(next(straight))
  again = open_loader(threads=1)
  for n in reversed(range(total)):
    again.restore(states[n])
    assert again.state() == states[n]
    assert_same(take(again, 2), (expected + take(straight, 1))[n : n + 2])
    if n == total - 1:
      straight.restore(states[0])
      expected = take(straight, total + 1)


@pytest.mark.parametrize(
  'workers', [pytest.param(1, marks=pytest.mark.slow), 2]
)
def test_resume_is_exact_with_workers(open_loader: Open, workers: int) -> None:
  expected = take(open_loader(), 9)
  first = open_loader(workers=workers)
  assert_same(take(first, 5), expected[:5])
  # The readers were ahead of this position.
  second = open_loader(workers=3 - workers)
  second.restore(first.state())
  assert_same(take(second, 4), expected[5:])


def test_other_data_are_refused_and_named(
  open_loader: Open, prepared: pathlib.Path, tmp_path
) -> None:
  loader = open_loader()
  next(loader)
  state = loader.state()
  # The tokens are the same; the order of the documents may be what changed.
  copy = pathlib.Path(shutil.copytree(prepared, tmp_path / 'copy'))
  manifest = json.loads((copy / 'manifest.json').read_text())
  manifest['splits']['train']['shards'][0]['sha256'] = '0' * 64
  (copy / 'manifest.json').write_text(json.dumps(manifest))
  for changes, lines in (
    (dict(seed=4), ['seed: 3 saved, 4 now', 'first_windows: ']),
    (dict(seq_len=10), ['seq_len: 100 saved, 10 now', 'first_windows: ']),
    (dict(batch_size=8), ['batch_size: 4 saved, 8 now']),
    (dict(folder=copy), ['dataset: ']),
  ):
    other = open_loader(**changes)
    with pytest.raises(ValueError, match='position is in other data') as error:
      other.restore(state)
    listed = [x for x in str(error.value).splitlines() if x.startswith('  ')]
    assert len(listed) == len(lines)
    for line in lines:
      assert line in str(error.value)
    assert other.state()['next_batch'] == 0


@pytest.mark.parametrize('n', [-1, 1.0, True, None, '1'])
def test_a_position_must_be_a_whole_number(open_loader: Open, n: Any) -> None:
  loader = open_loader()
  with pytest.raises(ValueError, match='next_batch'):
    loader.restore(loader.state() | {'next_batch': n})


@pytest.mark.parametrize('state', [{}, None, 3, {'next_batch': 1}, []])
def test_a_state_must_be_a_state(open_loader: Open, state: Any) -> None:
  with pytest.raises(ValueError, match='Not a position'):
    open_loader().restore(state)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (dict(batch_size=10_000), r'sequences of 100 tokens, fewer than one batch'),
    (dict(seq_len=10**9), 'has 0 training sequences'),
    (dict(batch_size=0), 'not positive'),
    (dict(seq_len=-1), 'not positive'),
    (dict(process_count=3), 'cannot be shared by 3 processes'),
    (dict(process_index=1), r'not in \[0, 1\)'),
    (dict(workers=-1), 'negative'),
  ],
)
def test_arguments_that_do_not_fit(
  open_loader: Open, changes: dict[str, int], message: str
) -> None:
  with pytest.raises(ValueError, match=message):
    open_loader(**changes)


@pytest.mark.parametrize('workers', [0, 1])
def test_damage_is_named_and_not_passed_over(
  prepared: pathlib.Path, open_loader: Open, tmp_path, workers: int
) -> None:
  copy = pathlib.Path(shutil.copytree(prepared, tmp_path / 'copy'))
  for shard in copy.glob('train-*'):
    data = bytearray(shard.read_bytes())
    # After the 64 KiB block header and the chunk's header: in the data.
    data[500] ^= 1
    shard.write_bytes(data)
  loader = open_loader(copy, workers=workers)
  with pytest.raises(ValueError, match=r'train-\d+.*, records 0'):
    take(loader, 100)
  with pytest.raises(RuntimeError, match=r'failed at batch \d+.*restore'):
    next(loader)
  at = loader.state()['next_batch']
  loader.restore(loader.state())
  with pytest.raises(ValueError, match=r'train-\d+.*, records 0'):
    next(loader)
  assert loader.state()['next_batch'] == at


def test_a_killed_reader_is_an_error(open_loader: Open) -> None:
  loader = open_loader(workers=1)
  next(loader)
  (worker,) = multiprocessing.active_children()
  worker.kill()
  with pytest.raises(RuntimeError, match='terminated unexpectedly'):
    take(loader, 100)


def test_close_can_be_called_twice_and_ends_reading(open_loader: Open) -> None:
  with open_loader(threads=2) as loader:
    next(loader)
  loader.close()
  with pytest.raises(RuntimeError, match='is closed'):
    next(loader)


@pytest.fixture(scope='module')
def valid(prepared: pathlib.Path) -> np.ndarray:
  found = dataset_lib.Stream(dataset_lib.open_dataset(prepared), 'valid')
  return found.read(0, len(found))


@pytest.mark.parametrize('process_count', [1, 2])
@pytest.mark.parametrize('seq_len', [7, 100, 100_000])
def test_evaluation_predicts_each_token_once_in_order(
  prepared: pathlib.Path, valid: np.ndarray, seq_len: int, process_count: int
) -> None:
  parts = [
    list(
      loader_lib.EvalBatches(
        prepared,
        seq_len=seq_len,
        batch_size=4,
        batches=0,
        process_index=i,
        process_count=process_count,
      )
    )
    for i in range(process_count)
  ]
  targets, inputs = [], []
  for batch in zip(*parts, strict=True):
    for part in batch:
      assert part['tokens'].shape == (4 // process_count, seq_len)
      assert part['weights'].dtype == np.float32
      counted = part['weights'] == 1
      assert (part['weights'][~counted] == 0).all()
      inputs.append(part['tokens'][counted])
      targets.append(part['targets'][counted])
  np.testing.assert_array_equal(np.concatenate(targets), valid[1:])
  np.testing.assert_array_equal(np.concatenate(inputs), valid[:-1])


def test_evaluation_can_be_cut(prepared: pathlib.Path) -> None:
  def batches(n: int) -> list[loader_lib.Batch]:
    return list(
      loader_lib.EvalBatches(
        prepared,
        seq_len=10,
        batch_size=2,
        batches=n,
        process_index=0,
        process_count=1,
      )
    )

  every = batches(0)
  assert_same(batches(3), every[:3])
  assert len(batches(10**9)) == len(every)
  with pytest.raises(ValueError, match='-1 is negative'):
    batches(-1)
