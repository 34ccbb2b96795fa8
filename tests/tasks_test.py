"""Files of tasks, and the measures that follow from scores."""

import gzip
import json
import math

import numpy as np
import pytest

from qat import scores
from qat import tasks

CHOICES = [' a cellular telephone', ' television', ' airplane']


def row(document, idx, label, continuation, context='Question?\nAnswer:'):
  return {
    'request_type': 'loglikelihood',
    'doc': {'id': 'any'},
    'request': {'context': context, 'continuation': continuation},
    'idx': idx,
    'task_name': 'inventions',
    'doc_id': document,
    'label': label,
  }


def question(document, label, choices=CHOICES):
  return [row(document, i, label, c) for i, c in enumerate(choices)]


def write(folder, rows, name='requests.jsonl'):
  folder.mkdir(parents=True, exist_ok=True)
  data = ''.join(
    (r if isinstance(r, str) else json.dumps(r)) + '\n' for r in rows
  ).encode()
  path = folder / name
  path.write_bytes(gzip.compress(data) if name.endswith('.gz') else data)
  return path


ROWS = [
  *question(0, 2),
  *question(3, 0, CHOICES[:2]),
  *question(4, 1),
  *question(1_000_000, 2),
  *question(1_000_003, 0, CHOICES[:2]),
]


@pytest.mark.parametrize('name', tasks.FILES)
def test_lines_of_a_document_are_its_choices(tmp_path, name):
  path = write(tmp_path / 'inventions' / 'rc_0shot', ROWS, name)
  task = tasks.read(path)
  assert (task.name, task.variant) == ('inventions', 'rc_0shot')
  assert [d.label for d in task.documents] == [2, 0, 1]
  assert [len(d.requests) for d in task.documents] == [3, 2, 3]
  assert task.documents[0].requests[1] == scores.Request(
    'Question?\nAnswer:', ' television'
  )
  assert task.requests == [r for d in task.documents for r in d.requests]
  assert tasks.read(path.parent) == task
  assert tasks.read(path, limit=2).documents == task.documents[:2]
  assert tasks.read(path, limit=9) == task


def test_a_text_as_label_is_a_word_to_find(tmp_path):
  rows = [row(0, 0, ['signs'], ' signs'), row(1, 0, 'sea', ' sea')]
  task = tasks.read(write(tmp_path, rows))
  assert [d.label for d in task.documents] == [None, None]
  assert [r.continuation for r in task.requests] == [' signs', ' sea']


def without(field):
  return {k: v for k, v in row(0, 0, 0, ' a').items() if k != field}


@pytest.mark.parametrize(
  ('rows', 'expected'),
  [
    (['{'], 'line 1: not JSON'),
    (['[' * 100_000], 'line 1: not JSON'),
    (['3'], 'line 1: not an object but int'),
    ([without('label')], "line 1: no field 'label'.*docs/evaluation.md"),
    ([without('request')], "no field 'request'"),
    ([row(0, 0, None, ' a')], "field 'label' is None"),
    ([row(0, True, 0, ' a')], "field 'idx' is True"),
    ([row(0, 0, 0, None)], "no text 'continuation'"),
    ([row(0, 0, 0, ' a', context=3)], "no text 'context'"),
    ([row(0, 0, 0, '')], 'its continuation is empty'),
    ([], 'has no documents'),
    (question(1_000_000, 0), 'has no documents'),
    (question(0, 3), r'document 0: labels \[3, 3, 3\] of 3'),
    ([*question(0, 0), row(1, 0, 0, ' a'), row(1, 1, 1, ' b')], 'line 4.*0, 1'),
    ([*question(0, 0), *question(1, 0), row(0, 3, 0, ' c')], r'\[3\], not'),
    ([row(0, 1, 0, ' a'), row(0, 0, 0, ' b')], r'\[1, 0\], not \[0, 1\]'),
    (question(0, 'television'), "label 'television' of 3 choices"),
    ([*question(0, 1), row(1, 0, 'a', ' a')], 'one kind'),
  ],
)
def test_a_file_that_is_no_task_is_told(tmp_path, rows, expected):
  path = write(tmp_path, rows)
  with pytest.raises(ValueError, match=expected) as caught:
    tasks.read(path)
  assert str(path) in str(caught.value)


def test_a_damaged_file_is_told(tmp_path):
  path = write(tmp_path, ROWS * 50, 'requests.jsonl.gz')
  whole = path.read_bytes()
  for damaged in (whole[:-40], b'not gzip', whole[:200] + b'x' * 99):
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match='damaged after line'):
      tasks.read(path)


def test_a_folder_without_a_task_tells_of_those_below(tmp_path):
  for variant in ('arc/rc_0shot', 'arc/mc_5shot'):
    write(tmp_path / variant, ROWS, 'requests.jsonl.gz')
  with pytest.raises(FileNotFoundError, match='mc_5shot, rc_0shot'):
    tasks.read(tmp_path / 'arc')
  (tmp_path / 'empty').mkdir()
  with pytest.raises(FileNotFoundError, match='it is no task'):
    tasks.read(tmp_path / 'empty')
  with pytest.raises(FileNotFoundError, match='No file or folder'):
    tasks.read(tmp_path / 'nowhere')
  with pytest.raises(ValueError, match='limit -1'):
    tasks.read(tmp_path / 'arc' / 'rc_0shot', limit=-1)


def score(nats, greedy=False):
  return scores.Score(nats, greedy)


def test_the_likeliest_choice_is_taken(tmp_path):
  task = tasks.read(write(tmp_path, ROWS))
  # Characters of a choice: 20, 10, 8.
  nats = [
    *(9.0, 9.1, 9.2),  # The first; by character the first: .45, .91, 1.15.
    *(9.0, 3.0),  # The second; by character .45, .3.
    *(20.0, 9.0, 8.0),  # The third; by character 1, .9, 1.
  ]
  found = tasks.results(task, [score(n) for n in nats])
  assert found['documents'] == 3
  assert found['acc'] == 0.0
  np.testing.assert_allclose(found['acc_norm'], 1 / 3)
  assert found['acc_stderr'] == 0.0
  shares = np.array([0, 0, 1.0])
  np.testing.assert_allclose(
    found['acc_norm_stderr'], shares.std(ddof=1) / math.sqrt(3)
  )
  right = tasks.results(
    task, [score(-float(d.label == i)) for d in task.documents
           for i in range(len(d.requests))]
  )  # fmt: skip
  assert right['acc'] == right['acc_norm'] == 1.0


def test_of_equal_choices_the_first_is_taken(tmp_path):
  task = tasks.read(write(tmp_path, question(0, 0, [' ab', ' cd'])))
  found = tasks.results(task, [score(2.0), score(2.0)])
  assert found['acc'] == found['acc_norm'] == 1.0
  assert found['acc_stderr'] == 0.0  # One document: no spread is known.


def test_a_word_is_found_when_each_token_is_the_likeliest(tmp_path):
  words = [row(i, 0, ['x'], ' x') for i in range(4)]
  task = tasks.read(write(tmp_path, words))
  found = tasks.results(
    task, [score(1.0, True), score(2.0), score(3.0, True), score(6.0, True)]
  )
  np.testing.assert_allclose(found.pop('acc_stderr'), 0.25)
  assert found == {'documents': 4, 'acc': 0.75, 'perplexity': math.exp(3.0)}
  hopeless = tasks.results(task, [score(1e9)] * 4)
  assert math.isfinite(hopeless['perplexity'])


def test_a_choice_has_the_characters_behind_its_space():
  assert tasks.characters(' Élan ') == 5
  assert tasks.characters('A') == 1
  assert tasks.characters(' ') == 1


def questions(n):
  return [r for d in range(n) for r in question(d, d % 3)]


def places(task, part):
  return [task.documents.index(d) for d in part.documents]


def test_parts_share_no_document(tmp_path):
  rows = [
    row(d, i, d % 2, f' {d} {i}', f'{d}?') for d in range(50) for i in (0, 1)
  ]
  task = tasks.read(write(tmp_path / 'rc', rows))
  parts = tasks.split(task, dict(train=20, dev=10, test=15), 0)
  found = {name: places(task, part) for name, part in parts.items()}
  assert {k: len(v) for k, v in found.items()} == dict(
    train=20, dev=10, test=15
  )
  assert len({i for part in found.values() for i in part}) == 45
  assert parts['dev'].name == task.name and parts['dev'].variant == 'rc'
  # More documents to train on leave the others as they are; a seed does not.
  more = tasks.split(task, dict(train=25, dev=10, test=15), 0)
  assert more['dev'] == parts['dev'] and more['test'] == parts['test']
  assert {*found['train']} < {*places(task, more['train'])}
  other = tasks.split(task, dict(train=20, dev=10, test=15), 1)
  assert other['test'] != parts['test']
  # The same for ever: whoever evaluates must have these documents.
  assert found['test'][:4] == [5, 9, 10, 11]


def test_a_task_with_too_few_documents_is_told(tmp_path):
  task = tasks.read(write(tmp_path / 'rc', questions(9)))
  with pytest.raises(ValueError, match='has 9 documents, fewer.* = 10') as text:
    tasks.split(task, dict(train=5, dev=3, test=2), 0)
  assert 'config.data.task_train' in str(text.value)


def test_the_right_request_of_a_document(tmp_path):
  task = tasks.read(write(tmp_path, ROWS))
  assert [d.right for d in task.documents] == [2, 0, 1]
  words = tasks.read(write(tmp_path, [row(0, 0, ['signs'], ' signs')]))
  assert words.documents[0].right == 0
