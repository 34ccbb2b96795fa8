"""Numbers, names and tables for people, in the terminal and in the report."""

from collections.abc import Callable
from collections.abc import Mapping
import html
import math
import os
import time

from rich import box
from rich import console as rich_console
from rich import table as rich_table
from rich import text as rich_text


def printable(text: str) -> str:
  r"""`text` with all but line ends and tabs of its control characters escaped.

  Names and samples are data: an escape sequence among them must not move the
  cursor or rename the window. Invisible and bidirectional marks count too.

  Args:
    text: anything, lone surrogates included.

  Returns:
    Text that is safe to print; ESC becomes the four characters `\x1b`.
  """
  return ''.join(
    c
    if c.isprintable() or c in '\n\t'
    else c.encode('unicode_escape').decode('ascii')
    for c in text
  )


def as_html(text: str) -> str:
  """HTML, in an element or an attribute, that shows `text` as it is."""
  return html.escape(printable(text))


def console(stderr: bool = False) -> rich_console.Console:
  """Of the standard output; wide enough for tables where nothing says how wide.

  Args:
    stderr: of the standard error.
  """
  made = rich_console.Console(stderr=stderr)
  if not made.is_terminal and 'COLUMNS' not in os.environ:
    made.width = 110
  return made


def count(number: float) -> str:
  """A number for people, in three digits: 51234 is '51.2k'."""
  number = float(number)
  if not math.isfinite(number):
    return str(number)
  for limit, suffix in ((1e12, 'T'), (1e9, 'B'), (1e6, 'M'), (1e3, 'k')):
    if abs(number) >= 0.9995 * limit:
      return f'{_three_digits(number / limit)}{suffix}'
  return _three_digits(number)


def duration(seconds: float) -> str:
  """Seconds for people: '42s', '3m 05s', '2h 14m', '3d 04h'."""
  seconds = float(seconds)
  if not math.isfinite(seconds):
    return '?'
  total = max(0, round(seconds))
  minutes, hours, days = total // 60, total // 3600, total // 86_400
  if days:
    return f'{days}d {hours % 24:02}h'
  if hours:
    return f'{hours}h {minutes % 60:02}m'
  if minutes:
    return f'{minutes}m {total % 60:02}s'
  return f'{total}s'


def left(start: float, done: int, total: int) -> str:
  """The time left at the speed so far: '3m 05s left'.

  Args:
    start: `time.monotonic()` when it began.
    done: how much is done, more than 0.
    total: of how much.
  """
  seconds = (time.monotonic() - start) * (total - done) / done
  return f'{duration(seconds)} left'


# The final numbers: key of summary.json, what people call it, how it reads.
# The same list makes the table in the terminal and the head of the report.
SUMMARY: tuple[tuple[str, str, Callable[[float], str]], ...] = (
  ('eval/bits_per_byte', 'bits per byte', '{:.3f}'.format),
  ('baseline/gzip_bits_per_byte', 'gzip', '{:.3f}'.format),
  ('baseline/unigram_bits_per_byte', 'unigram', '{:.3f}'.format),
  ('eval/perplexity', 'perplexity', '{:.2f}'.format),
  ('eval/loss', 'loss, nats', '{:.4f}'.format),
  ('task/test/acc', 'task accuracy', '{:.3f}'.format),
  ('task/test/acc_stderr', '± (std. error)', '{:.3f}'.format),
  ('task/test/loss', 'task loss, nats', '{:.4f}'.format),
  ('parameters', 'parameters', count),
  ('bits_per_weight', 'bits per weight', '{:.2f}'.format),
  ('steps', 'steps', '{:,.0f}'.format),
  ('tokens', 'tokens seen', count),
  ('tokens_per_s', 'tokens/s', count),
  ('seconds', 'time', duration),
)
_BARS = tuple(key for key, _, _ in SUMMARY[:3])


def summary_table(
  console: rich_console.Console, name: str, summary: Mapping[str, float]
) -> None:
  """Prints the final numbers of a run.

  Bits per byte stand beside the bars of what needs no model: gzip, and the
  unigram model, which knows only how frequent each token is. Numbers that
  `SUMMARY` does not know come last, under their own keys.

  Args:
    console: where to print, such as the console of a `metrics.Logger`.
    name: of the run; untrusted text is fine.
    summary: the flat numbers of summary.json.
  """
  table = rich_table.Table(
    title=rich_text.Text(printable(name)),
    title_style='bold',
    title_justify='left',
    box=box.SIMPLE_HEAD,
    show_header=False,
    pad_edge=False,
  )
  table.add_column(style='dim')
  table.add_column(justify='right')
  table.add_column()
  longest = max((summary[key] for key in _BARS if key in summary), default=0)
  known = {key for key, _, _ in SUMMARY}
  rows = [row for row in SUMMARY if row[0] in summary]
  rows += [(key, key, '{:.4g}'.format) for key in summary if key not in known]
  for key, label, form in rows:
    ours = key == 'eval/bits_per_byte'
    bar = ''
    if key in _BARS and 0 < longest < math.inf:
      length = round(24 * summary[key] / longest) if summary[key] > 0 else 0
      bar = rich_text.Text('━' * length, style='green' if ours else 'dim')
    table.add_row(
      rich_text.Text(printable(label)),
      rich_text.Text(form(summary[key]), style='bold' if ours else ''),
      bar,
    )
    if key in ('eval/loss', 'bits_per_weight'):
      table.add_section()
  console.print(table)


def _three_digits(number: float) -> str:
  places = (
    0
    if number == int(number) or abs(number) >= 99.95
    else (1 if abs(number) >= 9.995 else 2)
  )
  return f'{number:.{places}f}'
