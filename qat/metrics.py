"""What a run says about itself: metrics.jsonl, TensorBoard and the terminal.

metrics.jsonl is the record; the report and every table are made from it. The
same scalars go to TensorBoard, and a progress bar or plain lines to people.
"""

from collections.abc import Iterator
from collections.abc import Mapping
import contextlib
import json
import math
import os
from pathlib import Path
import time
from typing import IO
from typing import Any

from rich import console as rich_console
from rich import progress as rich_progress
from rich import text as rich_text
from tensorboardX import event_file_writer
from tensorboardX.proto import event_pb2
from tensorboardX.proto import summary_pb2

from qat import display

FILE = 'metrics.jsonl'
_RESERVED = ('step', 'time')
_NOT_FINITE = ('nan', 'inf', '-inf')


class Logger:
  """Writes the metrics of one run; a context manager.

  Only the primary process of a run writes and prints; on the others every
  method returns at once, so the training loop needs no branches.

  Attributes:
    console: the rich console that everything printed goes through.
  """

  def __init__(
    self,
    workdir: Path,
    *,
    total_steps: int,
    first_step: int,
    primary: bool,
  ) -> None:
    """Names the run; nothing is written before the context is entered.

    Args:
      workdir: folder of the run; it must exist.
      total_steps: optimizer steps at which the run is complete.
      first_step: the step this process starts from. Rows of a later step are
        about to be written again and are dropped; at 0 every row is.
      primary: whether this process writes.
    """
    self._workdir = Path(workdir)
    self._total = total_steps
    self._first = first_step
    self._primary = primary
    self._stack = contextlib.ExitStack()
    self._bar = None
    self.console = rich_console.Console()

  def __enter__(self) -> 'Logger':
    if not self._primary:
      return self
    path = self._workdir / FILE
    if path.exists():
      cut(path, self._first)
    with contextlib.ExitStack() as stack:
      self._file = stack.enter_context(path.open('a', encoding='utf-8'))
      folder = self._workdir / 'tensorboard'
      self._events = stack.enter_context(
        contextlib.closing(_open_events(folder, self._first))
      )
      if self.console.is_terminal:
        self._bar = stack.enter_context(_progress_bar(self.console))
        self._bar.add_task(
          '', total=self._total, completed=self._first, status='compiling'
        )
      self._stack = stack.pop_all()
    return self

  def __exit__(self, *exception: object) -> None:
    self._stack.__exit__(*exception)

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    """Records one row at `step`: flat keys, scalar values.

    Several rows may have the same step (training, evaluation, health). A number
    that is not finite is written as 'nan', 'inf' or '-inf', so that every line
    is valid JSON; `read` turns it back.

    Args:
      step: optimizer steps taken so far.
      values: key to number; 0-d arrays are welcome.

    Raises:
      ValueError: for a key that every row has already.
      OSError: the row could not be written, for example on a full disk.
    """
    if not self._primary:
      return
    for key in _RESERVED:
      if key in values:
        raise ValueError(f'Every row has its own {key!r}; rename the metric.')
    now = time.time()
    numbers = {key: float(value) for key, value in values.items()}
    row = {'step': int(step), 'time': round(now, 3)}
    row |= {
      key: number if math.isfinite(number) else str(number)
      for key, number in numbers.items()
    }
    self._file.write(json.dumps(row, allow_nan=False) + '\n')
    self._file.flush()
    self._events.write_event(
      event_pb2.Event(
        step=int(step),
        wall_time=now,
        summary=summary_pb2.Summary(
          value=[
            summary_pb2.Summary.Value(tag=key, simple_value=number)
            for key, number in numbers.items()
          ]
        ),
      )
    )
    self._events.flush()

  def progress(
    self, step: int, *, loss: float, tokens_per_s: float, eta_s: float
  ) -> None:
    """Moves the bar on a terminal, prints a plain line elsewhere.

    Args:
      step: optimizer steps taken so far.
      loss: of the latest batches, nats per token.
      tokens_per_s: training throughput.
      eta_s: seconds until the run is complete.
    """
    if not self._primary:
      return
    status = (
      f'loss {float(loss):.4f}  {display.count(tokens_per_s)} tok/s  '
      f'{display.duration(eta_s)} left'
    )
    if self._bar is not None:
      self._bar.update(self._bar.task_ids[0], completed=step, status=status)
    else:
      width = len(str(self._total))
      self.say(f'step {step:>{width}}/{self._total}  {status}')

  def say(self, message: str) -> None:
    """Prints a line, above the bar where there is one."""
    if self._primary:
      self.console.print(
        rich_text.Text(display.printable(message)), soft_wrap=True
      )


def read(workdir: Path) -> list[dict[str, Any]]:
  """The rows of a run's metrics.jsonl, in the order they were written.

  A last line without its end is one that is being written, or whose writer was
  killed; it is left out.

  Args:
    workdir: folder of the run.

  Returns:
    One dict a row: 'step' (int), 'time' (Unix seconds) and the metrics, floats.

  Raises:
    FileNotFoundError: there is no metrics.jsonl.
    ValueError: a line is not a row; the message names it.
  """
  return [
    {
      key: float(value) if value in _NOT_FINITE else value
      for key, value in row.items()
    }
    for row in read_rows(Path(workdir) / FILE)
  ]


def read_rows(path: Path) -> list[dict[str, Any]]:
  """As `read`, of any .jsonl file whose rows have a 'step'; strings stay."""
  return [row for row, _ in _parse(path)]


def cut(path: Path, step: int) -> None:
  """Drops every row of a .jsonl file that is later than `step`, atomically.

  At step 0 nothing has been trained and every row is dropped. An unfinished
  last line is dropped as well.

  Args:
    path: the file; each of its rows has an integer 'step'.
    step: the last step whose rows stay.

  Raises:
    ValueError: a line is not a row; the message names it.
  """
  kept = [
    line for row, line in _parse(path) if step > 0 and row['step'] <= step
  ]
  with replacing(path) as file:
    file.writelines(line + b'\n' for line in kept)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
  """A file that takes the place of `path` once it is whole, or not at all."""
  temporary = path.with_name(path.name + '.tmp')
  with temporary.open('wb') as file:
    yield file
    file.flush()
    os.fsync(file.fileno())
  os.replace(temporary, path)


def _parse(path: Path) -> list[tuple[dict[str, Any], bytes]]:
  """The rows of a .jsonl file, each with the bytes of its line."""
  if not path.is_file():
    raise FileNotFoundError(
      f'No {path.name} in {path.parent}; is it the folder of a run?'
    )
  lines = path.read_bytes().split(b'\n')
  rows = []
  for number, line in enumerate(lines, 1):
    try:
      rows.append((_row(line), line))
    except (ValueError, OverflowError, RecursionError) as error:
      if number == len(lines):  # It has no line end: empty, or half-written.
        break
      raise ValueError(
        f'{path}:{number} is damaged: {error}. Delete that line to go on '
        'without it.'
      ) from error
  return rows


def _row(line: bytes) -> dict[str, Any]:
  row = json.loads(line)
  if not isinstance(row, dict) or type(row.get('step')) is not int:
    raise ValueError('a row is an object with an integer "step"')
  return {
    key: float(value) if key != 'step' and isinstance(value, int) else value
    for key, value in row.items()
  }


def _open_events(folder: Path, step: int) -> event_file_writer.EventsWriter:
  """An event file that tells TensorBoard to forget what is after `step`."""
  folder.mkdir(exist_ok=True)
  # tensorboardX's SummaryWriter writes from a thread behind a bounded queue: on
  # a full disk the thread dies and the next scalar waits for ever. This is the
  # writer below it, whose errors reach the training loop.
  # The suffix keeps a resume within the same second from the same file name.
  writer = event_file_writer.EventsWriter(str(folder / 'events'), f'.{step}')
  start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
  first = step + 1 if step > 0 else 0
  writer.write_event(
    event_pb2.Event(step=first, wall_time=time.time(), session_log=start)
  )
  writer.flush()
  return writer


def _progress_bar(console: rich_console.Console) -> rich_progress.Progress:
  return rich_progress.Progress(
    rich_progress.TextColumn('step'),
    rich_progress.MofNCompleteColumn(),
    rich_progress.BarColumn(bar_width=None),
    rich_progress.TaskProgressColumn(),
    rich_progress.TextColumn('{task.fields[status]}', markup=False),
    console=console,
    expand=True,
    refresh_per_second=2,
  )
