"""A run on a task: its prompts, and what is measured on the other documents.

`config.data.task` names the task. Its documents are taken apart once
(`tasks.split`): some to train on, some to look at every `config.eval.every`
steps, some for the end, as MeZO (2305.17333) has it: 1000, 500 and 1000.
"""

from collections.abc import Callable
from collections.abc import Sequence
import pathlib
from typing import Any
from typing import NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict
import numpy as np

from qat import guard
from qat import scores as scores_lib
from qat import step as step_lib
from qat import tasks
from qat import windows
from qat.data import dataset as dataset_lib
from qat.data import task_loader


class Part(NamedTuple):
  """Some documents of a task, as the model reads them.

  Attributes:
    task: the documents.
    tokens: of `task.requests`, in order.
  """

  task: tasks.Task
  tokens: list[scores_lib.Tokens]


def read_parts(config: ConfigDict) -> dict[str, tasks.Task]:
  """Reads the task of a config, in parts.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: the file is no task, or has too few documents.
  """
  data = config.data
  task = tasks.read(pathlib.Path(data.task))
  sizes = {part: data[f'task_{part}'] for part in tasks.PARTS}
  return tasks.split(task, sizes, data.task_seed)


def open_parts(
  config: ConfigDict, dataset: dataset_lib.Dataset
) -> dict[str, Part]:
  """The parts of a run's task, in tokens; none where it has no task.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: see `read_parts`; or a continuation is too long for
      `config.data.seq_len` tokens.
  """
  if not config.data.task:
    return {}
  start = windows.begin(config, dataset.tokenizer, dataset.eot_id)
  return {
    part: Part(
      task,
      scores_lib.encode(
        dataset.tokenizer,
        task.requests,
        start=start,
        longest=config.data.seq_len,
      ),
    )
    for part, task in read_parts(config).items()
  }


def open_loader(
  config: ConfigDict, dataset: dataset_lib.Dataset, part: Part
) -> task_loader.TaskLoader:
  """Batches of a part for this process: right continuations, or all choices.

  Raises:
    ValueError: a document has more choices than `config.data.task_choices`, or
      has none; or the part has too few documents.
  """
  choices = config.data.task_choices
  if choices > 1 and part.task.documents[0].label is None:
    raise ValueError(
      f'config.data.task_choices={choices}, but a document of {part.task.name}'
      ' has no choices; set it to 1.'
    )
  documents = []
  for document, tokens in zip(
    part.task.documents, by_document(*part), strict=True
  ):
    rows = [(each.ids, each.scored) for each in tokens]
    if choices == 1:
      documents.append(task_loader.Document([rows[document.right]], 0))
    else:
      documents.append(task_loader.Document(rows, document.right))
  return task_loader.TaskLoader(
    documents,
    choices=choices,
    dataset=dataset.digest,
    seq_len=config.data.seq_len,
    batch_size=config.data.batch_size,
    seed=config.seed,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )


def evaluator(
  program: step_lib.Program, parts: dict[str, Part]
) -> Callable[..., dict[str, float]]:
  """A function that measures a model on a part: (params, name, hurry).

  It returns `measure`'s numbers as 'task/<name>/acc' and so on; nothing in a
  hurry, or where the run has no task. Its programs are compiled once.
  """
  config, mesh = program.config, program.mesh
  step = scores_lib.make_step(config, program.model)

  def evaluate(
    params: Any, name: str, hurry: Callable[[], object] = lambda: False
  ) -> dict[str, float]:
    if not parts:
      return {}
    what = f'A batch of the task, {name}'
    found = measure(
      step,
      params,
      mesh,
      parts[name],
      batch_tokens=config.eval.batch_size * config.data.seq_len,
      longest=config.data.seq_len,
      label='',
      hurry=hurry,
      limit=lambda: guard.time_limit(what, config.train.timeout_s),
    )
    return {f'task/{name}/{key}': value for key, value in found.items()}

  return evaluate


def measure(
  step: scores_lib.Step,
  params: Any,
  mesh: Mesh,
  part: Part,
  *,
  batch_tokens: int,
  longest: int,
  label: str,
  **between: Callable[[], Any],
) -> dict[str, float]:
  """Scores a task's documents; the arguments are those of `scores.score`.

  `between` are its `hurry` and `limit`.

  Returns:
    Nothing, in a hurry; else the measures of `tasks.results`, and what a
    training minimizes, in nats, the mean over documents. 'loss': of -log p of
    the right continuation, the mean over its tokens. 'loss_choices', of a task
    with choices: of -log softmax over such means of all choices.
  """
  scored = scores_lib.score(
    step,
    params,
    mesh,
    part.tokens,
    batch_tokens=batch_tokens,
    longest=longest,
    label=label,
    **between,
  )
  if not scored:
    return {}
  means = [
    score.nats / tokens.scored
    for score, tokens in zip(scored, part.tokens, strict=True)
  ]
  of_right, of_choices = [], []
  for document, nats in zip(
    part.task.documents, by_document(part.task, means), strict=True
  ):
    of_right.append(nats[document.right])
    of_choices.append(of_right[-1] + np.logaddexp.reduce(-np.array(nats)))
  found = tasks.results(part.task, scored) | {'loss': float(np.mean(of_right))}
  if part.task.documents[0].label is None:
    return found
  return found | {'loss_choices': float(np.mean(of_choices))}


def by_document(task: tasks.Task, each: Sequence[Any]) -> list[Sequence[Any]]:
  """Something for each request, in the parts of the documents."""
  found, start = [], 0
  for document in task.documents:
    end = start + len(document.requests)
    found.append(each[start:end])
    start = end
  return found
