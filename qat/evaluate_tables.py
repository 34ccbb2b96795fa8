"""The tables of scripts/evaluate.py, for the terminal."""

from collections.abc import Sequence
from typing import Any

from rich import table as rich_table
from rich import text as rich_text

from qat import display

Numbers = dict[str, Any]  # By name; JSON.


def show(found: Numbers) -> None:
  """Prints what scripts/evaluate.py found."""
  console = display.console()
  title = found.get('model')
  if title is None:
    title = f'{found["workdir"]}, step {found["step"]}'
  if 'dataset' in found:
    console.print(_dataset_table(title, found))
  if 'texts' in found:
    console.print(_texts_table(title, found['texts']))
  if 'tasks' in found:
    console.print(_tasks_table(title, found['tasks']))


def _table(title: str, *names: str) -> rich_table.Table:
  table = rich_table.Table(title=_plain(title))
  for i, name in enumerate(names):
    table.add_column(name, justify='right' if i else 'left')
  return table


def _plain(name: str) -> rich_text.Text:
  """A name as it is: brackets in it are no markup."""
  return rich_text.Text(display.printable(name))


def _dataset_table(title: str, found: Numbers) -> rich_table.Table:
  table = _table(
    f'{title}, on {found["dataset"]}', '', 'model', 'unigram', 'gzip -9'
  )
  table.add_row('loss (nats per token)', f'{found["eval/loss"]:.4f}', '', '')
  table.add_row('perplexity', f'{found["eval/perplexity"]:.2f}', '', '')
  table.add_row(
    'bits per byte',
    f'{found["eval/bits_per_byte"]:.4f}',
    f'{found["baseline/unigram_bits_per_byte"]:.4f}',
    f'{found["baseline/gzip_bits_per_byte"]:.4f}',
  )
  return table


def _texts_table(title: str, texts: Sequence[Numbers]) -> rich_table.Table:
  table = _table(title, 'text', 'windows', 'perplexity', 'bits per byte')
  for text in texts:
    table.add_row(
      _plain(text['text']),
      f'{text["windows"]} of {text["window"]}',
      f'{text["perplexity"]:.3f}',
      f'{text["bits_per_byte"]:.4f}',
    )
  return table


def _tasks_table(title: str, chosen: Sequence[Numbers]) -> rich_table.Table:
  table = _table(
    title, 'task', 'documents', 'acc', 'acc_norm', 'perplexity', 'loss', 'cut'
  )
  for task in chosen:
    shares = [share(task, key) for key in ('acc', 'acc_norm')]
    perplexity = f'{task["perplexity"]:.2f}' if 'perplexity' in task else ''
    table.add_row(
      _plain(
        ', '.join(task[k] for k in ('task', 'variant', 'part') if k in task)
      ),
      str(task['documents']),
      *shares,
      perplexity,
      f'{task["loss"]:.3f}',
      str(task['cut_contexts']),
    )
  return table


def share(task: Numbers, key: str) -> str:
  """A share of right answers and its standard error; '' of other tasks."""
  if key not in task:
    return ''
  return f'{task[key]:.3f} ± {task[f"{key}_stderr"]:.3f}'
