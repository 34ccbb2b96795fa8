"""Instructions in a step of a TPU kernel, from what its compiler wrote down.

A TPU executes bundles: instructions of several units that start together. The
compiler packs them before anything runs, so a bundle is a cycle, apart from
stalls. libtpu writes the bundles of every program to files when `flags` are in
LIBTPU_INIT_ARGS:

  0x1e   : > { %195 = sbr.rel (%p1998_p2) target = $region20 }

is bundle 30, in a loop; it branches to where region 20 starts.
"""

import dataclasses
import pathlib
import re

# Bundles after a branch that are executed either way, and the branch itself.
DELAY = 5

_BUNDLE = re.compile(r'\s*(?:0x([0-9a-f]+)|0)\s+(?:[A-Z]{2})?\s*:')
_START = re.compile(r'Start(?:/End empty)? region (\d+)')
_BRANCH = re.compile(r'\bsbr\.rel\b[^;}]*?target = \$region(\d+)')
_KERNEL = re.compile(
  r'%?([\w.\-]+) = [^\n]*custom_call_target="tpu_custom_call"'
)
_Span = tuple[int, int]  # Of addresses; the last is not in it.


@dataclasses.dataclass(frozen=True)
class Schedule:
  """Bundles of a kernel. A loop in the kernel counts once.

  Attributes:
    total: of the program.
    step: of a step of the grid, with the copies of its tiles, and without
      `conditions`.
    conditions: of each condition of the kernel (`pl.when`), in their order.
  """

  total: int
  step: int
  conditions: tuple[int, ...]


def flags(folder: pathlib.Path) -> str:
  """What LIBTPU_INIT_ARGS has to hold; the files come into `folder`."""
  return (
    f'--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true'
    ' --xla_jf_dump_llo_pass_label_regex=final_bundles'
  )


def of_kernels(folder: pathlib.Path, module: str) -> dict[str, Schedule]:
  """The schedules of the kernels in a program.

  Args:
    folder: where libtpu wrote them.
    module: text of the compiled program (`jax.stages.Compiled.as_text`).

  Returns:
    By the name of the instruction.

  Raises:
    FileNotFoundError: there is no file for one.
  """
  found = {}
  for name in dict.fromkeys(_KERNEL.findall(module)):
    files = sorted(folder.glob(f'*-{name}-[0-9]*-final_bundles.txt'))
    if not files:
      raise FileNotFoundError(
        f'libtpu wrote no bundles of {name} to {folder}; it knows other flags.'
      )
    found[name] = parse(files[-1].read_text('utf-8'))
  return found


def parse(text: str) -> Schedule:
  """Reads the bundles of one program.

  A step of the grid is a turn of the longest loop; a grid of one step has none.
  In it stand the stages of Pallas's pipeline, each in a condition on the number
  of the step. The longest computes, and the conditions in it are the kernel's.

  Args:
    text: a file whose name ends with 'final_bundles.txt'.

  Raises:
    ValueError: the text is none.
  """
  address, starts, branches = None, {}, []
  for line in text.splitlines():
    bundle = _BUNDLE.match(line)
    if bundle:
      address = int(bundle[1] or '0', 16)
    if address is None:
      continue  # The legend above.
    for region in _START.findall(line):
      starts.setdefault(region, address)
    branches += [(address + DELAY, r) for r in _BRANCH.findall(line)]
  if address is None:
    raise ValueError(f'No bundles in a text that begins {text[:60]!r}.')
  # A core that has no share of the work leaves by a branch to the end, where no
  # region starts: v5p's second, in a kernel that is not split between them.
  branches = [(end, r) for end, r in branches if r in starts]
  loops = [(starts[r], end) for end, r in branches if starts[r] < end]
  skipped = [(end, starts[r]) for end, r in branches if starts[r] > end]
  step = max(loops, key=_length, default=(0, address + 1))
  inside = _outermost(skipped, step)
  if loops and inside:
    inside = _outermost(skipped, max(inside, key=_length))
  conditions = tuple(_length(span) for span in sorted(inside))
  return Schedule(address + 1, _length(step) - sum(conditions), conditions)


def _length(span: _Span) -> int:
  return span[1] - span[0]


def _outermost(spans: list[_Span], whole: _Span) -> list[_Span]:
  """The spans inside of another that lie in none but that."""

  def holds(outer: _Span, span: _Span) -> bool:
    return outer != span and outer[0] <= span[0] and span[1] <= outer[1]

  inside = [s for s in set(spans) if holds(whole, s)]
  return [s for s in inside if not any(holds(o, s) for o in inside)]
