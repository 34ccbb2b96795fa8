"""Batches of prompts: their order, their weights, and their resumption."""

import json

import numpy as np
import pytest

from qat.data import task_loader
from tests import tiny

T, B = 12, 4


def make_prompts(n: int, seed: int = 0) -> list[tuple[np.ndarray, int]]:
  rng = np.random.default_rng(seed)
  found = []
  for i in range(n):
    length = int(rng.integers(3, T + 2))
    ids = rng.integers(1, 99, length).astype(np.int32)
    ids[0] = 100 + i  # Tells prompts apart.
    found.append((ids, int(rng.integers(1, length))))
  return found


PROMPTS = make_prompts(10)


def opened(prompts=PROMPTS, **changes) -> task_loader.TaskLoader:
  fields = dict(
    choices=1,
    dataset='digest',
    seq_len=T,
    batch_size=B,
    seed=3,
    process_index=0,
    process_count=1,
  )
  documents = [
    p if isinstance(p, task_loader.Document) else task_loader.Document([p], 0)
    for p in prompts
  ]
  return task_loader.TaskLoader(documents, **fields | changes)


def take(loader, n):
  return [next(loader) for _ in range(n)]


def assert_same(found, expected):
  assert len(found) == len(expected)
  for a, b in zip(found, expected, strict=True):
    assert a.keys() == b.keys()
    for key in a:
      np.testing.assert_array_equal(a[key], b[key], strict=True)


def test_a_row_is_a_prompt_and_weighs_its_continuation():
  seen = 0
  for batch in take(opened(), 5):
    assert {k: v.dtype.name for k, v in batch.items()} == {
      'tokens': 'int32',
      'targets': 'int32',
      'weights': 'float32',
    }
    for tokens, targets, weights in zip(*batch.values(), strict=True):
      ids, scored = PROMPTS[tokens[0] - 100]
      n = len(ids) - 1
      np.testing.assert_array_equal(tokens[:n], ids[:-1])
      np.testing.assert_array_equal(targets[:n], ids[1:])
      assert not tokens[n:].any() and not targets[n:].any()
      expected = np.zeros(T, np.float32)
      expected[n - scored : n] = 1 / scored
      np.testing.assert_array_equal(weights, expected)
      seen += 1
  assert seen == 5 * B


def test_each_epoch_has_every_prompt_once_in_its_own_order():
  # Batches run on across the end of an epoch: B does not divide 10.
  rows = np.concatenate([b['tokens'][:, 0] for b in take(opened(), 8)])
  epochs = rows[:30].reshape(3, 10)
  for epoch in epochs:
    assert sorted(epoch) == [*range(100, 110)]
  assert len({tuple(epoch) for epoch in epochs}) == 3
  other = np.concatenate([b['tokens'][:, 0] for b in take(opened(seed=4), 8)])
  assert rows.tolist() != other.tolist()


def test_processes_share_the_same_batches():
  whole = take(opened(), 6)
  for count in (2, 4):
    parts = [
      take(opened(process_index=i, process_count=count), 6)
      for i in range(count)
    ]
    joined = [
      {k: np.concatenate([part[k] for part in at]) for k in at[0]}
      for at in zip(*parts, strict=True)
    ]
    assert_same(joined, whole)


@pytest.mark.parametrize('n', [0, 1, 3, 9])
def test_it_goes_on_where_it_was(n):
  straight = opened()
  take(straight, n)
  state = json.loads(json.dumps(straight.state()))
  expected = take(straight, 5)
  again = opened()
  again.restore(state)
  assert_same(take(again, 5), expected)
  # With another number of processes, too.
  second = opened(process_index=1, process_count=2)
  second.restore(state)
  half = [{k: v[B // 2 :] for k, v in batch.items()} for batch in expected]
  assert_same(take(second, 5), half)
  straight.close()


@pytest.mark.parametrize(
  ('prompts', 'changes', 'named'),
  [
    (PROMPTS, dict(seed=4), 'seed: 3 saved, 4 now'),
    (PROMPTS, dict(batch_size=5), 'batch_size'),
    (PROMPTS, dict(seq_len=T + 1), 'seq_len'),
    (PROMPTS, dict(dataset='another'), 'dataset'),
    (PROMPTS[:-1], {}, 'prompts'),
    ([*PROMPTS[:-1], (PROMPTS[-1][0], PROMPTS[-1][1] + 1)], {}, 'prompts'),
  ],
)
def test_a_position_in_other_prompts_is_refused(prompts, changes, named):
  if prompts[-1][1] >= len(prompts[-1][0]):
    prompts[-1] = prompts[-1][0], 1
  state = opened().state()
  with pytest.raises(ValueError, match='in other data') as caught:
    opened(prompts, **changes).restore(state)
  assert named in str(caught.value)


@pytest.mark.parametrize(
  ('prompts', 'changes', 'expected'),
  [
    (PROMPTS[:3], {}, 'There are 3 prompts, fewer than one batch of 4'),
    ([(np.arange(T + 2), 1)] * 4, {}, 'has 14 tokens'),
    ([(np.arange(3), 3)] * 4, {}, '3 tokens, 3 of which'),
    ([(np.arange(3), 0)] * 4, {}, '3 tokens, 0 of which'),
    (PROMPTS, dict(process_count=3), 'cannot be shared by 3'),
    (PROMPTS, dict(batch_size=0), 'batch_size 0'),
  ],
)
def test_prompts_that_make_no_batch_are_refused(prompts, changes, expected):
  with pytest.raises(ValueError, match=expected):
    opened(prompts, **changes)


@pytest.mark.parametrize(
  ('fields', 'expected'),
  [
    ({}, []),
    ({'data.begin': 'bos'}, ["data.begin='bos'; choose one of end, tokenizer"]),
    ({'data.task_dev': 0}, ['data.task_dev=0 must be at least 1']),
    ({'data.task_seed': -1}, ['data.task_seed=-1']),
    (
      {'data.task': 'x', 'data.task_train': 7},
      ['data.task_train=7', 'the 8 of one step'],
    ),
    ({'data.task_train': 7}, []),
    (
      {'data.task': 'x', 'optim.estimator': 'forward'},
      ["data.task='x'", "take 'spsa'"],
    ),
  ],
)
def test_wrong_fields_are_told(fields, expected):
  found = ' '.join(task_loader.errors(tiny.config('fp', fields)))
  assert bool(found) == bool(expected)
  for part in expected:
    assert part in found


def make_documents(n: int, most: int) -> list[task_loader.Document]:
  rng = np.random.default_rng(5)
  found = []
  for i in range(n):
    choices = make_prompts(int(rng.integers(2, most + 1)), seed=i)
    for c, (ids, _) in enumerate(choices):
      ids[0] = 100 + 10 * i + c
    right = int(rng.integers(len(choices)))
    found.append(task_loader.Document(choices, right))
  return found


def test_choices_of_a_document_are_rows_of_one_micro_batch():
  documents = make_documents(5, most=3)
  loader = opened(documents, choices=3, batch_size=12)
  seen = []
  for batch in take(loader, 5):
    at_once = 4
    for row in range(12):
      c, d = divmod(row, at_once)
      first = batch['tokens'][d, 0]  # Choice 0 of this document.
      document = documents[(first - 100) // 10]
      assert batch['right'][row] == (c == document.right)
      if c >= len(document.choices):
        assert not any(batch[name][row].any() for name in batch)
        continue
      ids, scored = document.choices[c]
      np.testing.assert_array_equal(
        batch['targets'][row, : len(ids) - 1], ids[1:]
      )
      assert batch['weights'][row].sum() == pytest.approx(1)
      assert (batch['weights'][row] > 0).sum() == scored
    seen += [*batch['tokens'][:at_once, 0]]
    # As a step takes its micro-batches: every second row.
    for part in (0, 1):
      rows = batch['tokens'][part::2, 0].reshape(3, -1)
      for a, b in zip(rows[0], rows[1], strict=True):
        assert b == a + 1
  assert len(seen) == 20
  for epoch in np.reshape(seen, (4, 5)):
    assert sorted((epoch - 100) // 10) == [*range(5)]


def test_processes_share_the_choices_of_a_batch():
  documents = make_documents(5, most=3)
  fields = dict(choices=3, batch_size=12)
  whole = take(opened(documents, **fields), 3)
  parts = [
    take(opened(documents, **fields, process_index=i, process_count=2), 3)
    for i in range(2)
  ]
  joined = [
    {key: np.concatenate([a[key], b[key]]) for key in a}
    for a, b in zip(*parts, strict=True)
  ]
  assert_same(joined, whole)


def test_documents_must_fit_the_rows():
  documents = make_documents(5, most=3)
  with pytest.raises(ValueError, match='task_choices'):
    opened(documents, choices=2)
  with pytest.raises(ValueError, match='fewer than one batch'):
    opened(documents, choices=3, batch_size=18)
  with pytest.raises(ValueError, match='do not fill'):
    opened(documents, choices=3, batch_size=8)
  other = [d._replace(right=1 - min(d.right, 1)) for d in documents]
  found = [
    opened(d, choices=3, batch_size=12).fingerprint for d in (documents, other)
  ]
  assert found[0]['prompts'] != found[1]['prompts']
