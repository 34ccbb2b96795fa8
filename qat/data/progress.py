"""Progress of a long command: a bar on a terminal, plain lines elsewhere."""

from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import time

from rich import console as rich_console
from rich import progress as rich_progress

LINE_EVERY_S = 10.0


def note(message: str) -> None:
  """Prints one line to the standard error, above any bar."""
  rich_console.Console(stderr=True).print(
    message, markup=False, highlight=False, soft_wrap=True
  )


@contextlib.contextmanager
def bar(label: str, total: int) -> Iterator[Callable[[int, str], None]]:
  """Shows how far `label` is, on the standard error.

  Args:
    label: what is being done.
    total: its size, in any unit; 0 where it is not known.

  Yields:
    A function of (how much is done, a few words), to call often.
  """
  console = rich_console.Console(stderr=True)
  start = time.monotonic()
  if console.is_terminal:
    columns = (
      # Names as they are: brackets in them are no markup.
      rich_progress.TextColumn('{task.description}', markup=False),
      rich_progress.BarColumn(),
      rich_progress.TextColumn('{task.fields[words]}', markup=False),
      rich_progress.TimeElapsedColumn(),
      '/',
      rich_progress.TimeRemainingColumn(),
    )
    with rich_progress.Progress(*columns, console=console) as shown:
      task = shown.add_task(label, total=total or None, words='')
      yield lambda done, words: shown.update(task, completed=done, words=words)
    return
  shown_at = start
  last = ''

  def show(done: int, words: str) -> None:
    nonlocal shown_at, last
    share = f'{min(1, done / total):4.0%}, ' if total else ''
    last = f'{label}: {share}{words}'
    if time.monotonic() - shown_at >= LINE_EVERY_S:
      shown_at = time.monotonic()
      note(last)

  yield show
  note(f'{last or label}, {time.monotonic() - start:.0f} s')
