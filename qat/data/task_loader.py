"""Batches of a task's prompts: to fine-tune a model on continuations.

As MeZO (2305.17333) trains: a prompt is followed by its right continuation, or
in rows of their own by each of its choices, and only the continuation's tokens
count. Each epoch takes every document once, in an order of its own; each global
batch takes the next documents, across the end of an epoch too. So one integer
is the whole position, as in `loader.TrainLoader`.
"""

from collections.abc import Iterator
from collections.abc import Sequence
import hashlib
from typing import Any
from typing import NamedTuple

from ml_collections import ConfigDict
import numpy as np

from qat.data import position

Batch = dict[str, np.ndarray]


class Document(NamedTuple):
  """A prompt with continuations.

  Attributes:
    choices: of each continuation the tokens of prompt and continuation, int32
      of at most T + 1; and how many of them, at the end, are its own.
    right: which one is right.
  """

  choices: Sequence[tuple[np.ndarray, int]]
  right: int


def errors(config: ConfigDict) -> list[str]:
  """What is wrong with a config's fields of tasks: field, value, remedy."""
  found, data = [], config.data
  if data.begin not in ('end', 'tokenizer'):
    found.append(f'data.begin={data.begin!r}; choose one of end, tokenizer.')
  found += [
    f'{field}={value} must be at least {least}.'
    for field, value, least in (
      ('data.task_train', data.task_train, 1),
      ('data.task_dev', data.task_dev, 1),
      ('data.task_test', data.task_test, 1),
      ('data.task_seed', data.task_seed, 0),
      ('data.task_choices', data.task_choices, 1),
    )
    if value < least
  ]
  if found or not data.task:
    return found
  rows, parts = data.task_choices, max(1, config.optim.accumulate)
  if data.batch_size % (rows * parts):
    found.append(
      f'data.batch_size={data.batch_size} is no multiple of data.task_choices='
      f'{rows} rows of a document times optim.accumulate={parts}; take a'
      f' multiple of {rows * parts}.'
    )
  if data.task_train < (documents := data.batch_size // rows):
    found.append(
      f'data.task_train={data.task_train} documents are fewer than the'
      f' {documents} of one step (data.batch_size / data.task_choices).'
    )
  if config.optim.estimator == 'forward':
    found.append(
      f"data.task={data.task!r} with optim.estimator='forward', which reads no"
      " weights of targets; take 'spsa' or 'backprop'."
    )
  return found


class TaskLoader:
  """Iterates over the training batches of one process, for ever.

  A batch is {'tokens', 'targets': int32 [B / process_count, T], 'weights':
  float32}. Behind a prompt there is padding. The weights of each prompt sum to
  1: those of the continuation's targets are alike, all others are 0.

  With C > 1 choices, row c D + d of a global batch is choice c of its document
  d, of D = B / C; so a document's rows are in one micro-batch. 'right', float32
  `[B / process_count]`, is 1 for its right choice and else 0. Where a document
  has fewer choices, all weights of a row are 0.

  Attributes:
    fingerprint: what the batches depend on, as JSON-able fields.
  """

  def __init__(
    self,
    documents: Sequence[Document],
    *,
    choices: int,
    dataset: str,
    seq_len: int,
    batch_size: int,
    seed: int,
    process_index: int,
    process_count: int,
  ):
    """Stands at batch 0.

    Args:
      documents: what is trained on.
      choices: C, rows of a document; each has at most so many.
      dataset: digest of the data set that the run is evaluated on.
      seq_len: T, tokens of a row.
      batch_size: B, rows of a global batch.
      seed: of the order of the documents.
      process_index: this process, of those that share a global batch.
      process_count: how many they are; divides `batch_size`.

    Raises:
      ValueError: the arguments do not fit one another.
    """
    self._rows = position.local_rows(
      batch_size, seq_len, process_index, process_count
    )
    self._at_once = batch_size // choices
    if batch_size % choices or len(documents) < self._at_once:
      raise ValueError(
        f'There are {len(documents)} prompts, fewer than one batch of'
        f' {batch_size} rows holds, {choices} rows each; or these do not fill'
        ' it. Change the batch size, or take more of the documents to train on'
        ' (config.data.task_train).'
      )
    digest = hashlib.sha256()
    for document in documents:
      if not document.right < len(document.choices) <= choices:
        raise ValueError(
          f'A document has {len(document.choices)} choices, and {choices} rows'
          ' of a batch: set config.data.task_choices to as many as one has.'
        )
      for ids, scored in document.choices:
        if not 0 < scored < len(ids) <= seq_len + 1:
          raise ValueError(
            f'A prompt has {len(ids)} tokens, {scored} of which are its'
            f' continuation; a row holds {seq_len} and one more to predict.'
          )
        digest.update(np.array([len(ids), scored, *ids], np.int32).tobytes())
      if choices > 1:
        digest.update(np.array([choices, document.right], np.int32).tobytes())
    self._documents = documents
    self._choices = choices
    self._seq_len = seq_len
    self._seed = seed
    self._first = process_index * self._rows
    self._next_batch = 0
    self.fingerprint = {
      'seed': seed,
      'seq_len': seq_len,
      'batch_size': batch_size,
      'dataset': dataset,
      'prompts': digest.hexdigest(),
      # A NumPy that shuffles in another way is noticed.
      'first_prompts': self._order(0)[:4].tolist(),
    }

  def __iter__(self) -> Iterator[Batch]:
    return self

  def __next__(self) -> Batch:
    """The next batch."""
    start = self._next_batch * self._at_once
    tokens = np.zeros((self._rows, self._seq_len), np.int32)
    targets, weights = np.zeros_like(tokens), np.zeros(tokens.shape, np.float32)
    right = np.zeros(self._rows, np.float32)
    orders = {}
    for row in range(self._rows):
      choice, place = divmod(self._first + row, self._at_once)
      epoch, at = divmod(start + place, len(self._documents))
      if epoch not in orders:
        orders[epoch] = self._order(epoch)
      document = self._documents[orders[epoch][at]]
      right[row] = choice == document.right
      if choice >= len(document.choices):
        continue
      ids, scored = document.choices[choice]
      n = len(ids) - 1
      tokens[row, :n], targets[row, :n] = ids[:-1], ids[1:]
      weights[row, n - scored : n] = 1 / scored
    self._next_batch += 1
    batch = {'tokens': tokens, 'targets': targets, 'weights': weights}
    return batch if self._choices == 1 else {**batch, 'right': right}

  def state(self) -> dict[str, Any]:
    """The position: {'next_batch': n, 'fingerprint': {...}}, JSON-able."""
    return {
      'next_batch': self._next_batch,
      'fingerprint': dict(self.fingerprint),
    }

  def restore(self, state: dict[str, Any]) -> None:
    """Goes on from a `state()`; the number of processes may have changed.

    Raises:
      ValueError: if it belongs to other data; lists what differs.
    """
    self._next_batch = position.read(state, self.fingerprint)

  def close(self) -> None:
    """Nothing is held."""

  def _order(self, epoch: int) -> np.ndarray:
    random = np.random.default_rng([self._seed, epoch])
    return random.permutation(len(self._documents))
