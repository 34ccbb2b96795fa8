"""Collectives in the text of a compiled program: which, and how many bytes."""

from collections.abc import Iterator
import dataclasses
import math
import re

KINDS = (
  'all-gather',
  'all-reduce',
  'reduce-scatter',
  'all-to-all',
  'ragged-all-to-all',
  'collective-broadcast',
  'collective-permute',
)

_SHAPE = re.compile(r'\b(pred|token|bf16|[sufc]\d+\w*)\[([\d,<= ]*)\]')
_NAME = r'%?([\w.\-]+)'
_HEAD = re.compile(rf'^(ENTRY\s+)?{_NAME}\s*\(.*->.*{{\s*$')
# %name = shape opcode(operands), attributes
_LINE = re.compile(rf'^\s+(ROOT\s+)?{_NAME} = (.*)$')
_OPCODE = re.compile(r'(?:^|\s)([a-z][a-z0-9\-]*)\(')
_CALLED = re.compile(
  rf'\b(?:body|to_apply|calls|true_computation|false_computation)={_NAME}'
  r'|\b(?:branch_computations|called_computations)=\{([^}]*)\}'
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


@dataclasses.dataclass(frozen=True)
class Collective:
  """What the exchanges of one kind add up to, on one device, in one step.

  Attributes:
    count: how many there are; one in a loop counts once a turn.
    bytes: of the whole arrays on one device: what an all-gather or all-reduce
      gives, what a reduce-scatter takes. How many bytes of it cross a link is
      up to the algorithm: about as many, twice that for an all-reduce.
    unknown: how many of them stand in a loop whose number of turns the text
      does not tell; such a loop counts as one turn.
  """

  count: int
  bytes: int
  unknown: int


def collectives(text: str) -> dict[str, Collective]:
  """Finds the collectives of a compiled module.

  Args:
    text: of the optimized module, as `jax.stages.Compiled.as_text` gives it.

  Returns:
    By kind (see `KINDS`), those that occur.

  Raises:
    ValueError: the text is no HLO module.
  """
  computations, entry = _computations(text)
  found: dict[str, Collective] = {}
  for instruction, turns, known in _executed(computations, entry):
    kind = instruction.opcode.removesuffix('-start')
    old = found.get(kind, Collective(0, 0, 0))
    found[kind] = Collective(
      old.count + turns,
      old.bytes + turns * _bytes(instruction),
      old.unknown + (0 if known else turns),
    )
  return {kind: found[kind] for kind in KINDS if kind in found}


@dataclasses.dataclass(frozen=True)
class _Instruction:
  shapes: tuple[int, ...]  # Bytes of each array of the result.
  opcode: str
  operands: tuple[int, ...]  # Bytes of each operand.
  rest: str  # Of the line, from the opcode on.


def _computations(text: str) -> tuple[dict[str, list[_Instruction]], str]:
  """Instructions of each computation, and the name of the entry."""
  found: dict[str, list[_Instruction]] = {}
  entry, name = '', ''
  sizes: dict[str, int] = {}
  for line in text.splitlines():
    head = _HEAD.match(line)
    if head:
      name, sizes = head[2], {}
      found[name] = []
      entry = name if head[1] else entry
      continue
    match = _LINE.match(line) if name else None
    opcode = _OPCODE.search(match[3]) if match else None
    if not opcode:
      continue
    shapes = _sizes(match[3][: opcode.start()])
    rest = match[3][opcode.start(1) :]
    sizes[match[2]] = sum(shapes)
    operands = tuple(
      sizes.get(operand, 0)
      for operand in re.findall(r'%([\w.\-]+)', _arguments(rest))
    )
    found[name].append(_Instruction(shapes, opcode[1], operands, rest))
  if not entry:
    raise ValueError(
      f'No ENTRY computation in a text that begins {text[:60]!r}; give the'
      ' text of a compiled HLO module.'
    )
  return found, entry


def _arguments(rest: str) -> str:
  """'add(%a, f32[2]{0} %b), metadata={}' -> '%a, f32[2]{0} %b'."""
  depth = 0
  for i, character in enumerate(rest):
    depth += (character == '(') - (character == ')')
    if character == ')' and not depth:
      return rest[rest.index('(') + 1 : i]
  return rest


def _sizes(shape: str) -> tuple[int, ...]:
  """Bytes of each array in the text of a shape or of a tuple of shapes."""
  sizes = []
  for dtype, dimensions in _SHAPE.findall(shape):
    # bf16, s8, f8e4m3fn: the first number is the bits.
    named = {'pred': 8, 'token': 0}
    bits = named[dtype] if dtype in named else int(re.search(r'\d+', dtype)[0])
    axes = [int(d) for d in re.findall(r'\d+', dimensions)]
    sizes.append(math.ceil(math.prod(axes) * bits / 8))
  return tuple(sizes)


def _executed(
  computations: dict[str, list[_Instruction]], entry: str
) -> Iterator[tuple[_Instruction, int, bool]]:
  """Collectives, how often each runs, and whether that is known."""
  waiting = [(entry, 1, True)]
  while waiting:
    name, turns, known = waiting.pop()
    for instruction in computations[name]:
      if instruction.opcode.removesuffix('-start') in KINDS:
        yield instruction, turns, known
        continue  # What it applies is an addition of two numbers.
      if instruction.opcode.endswith(('-done', '-update')):
        continue  # It may name again what its start has called.
      inner, sure = turns, known
      if instruction.opcode == 'while':
        trips = _trips(instruction, computations)
        inner, sure = turns * (trips or 1), known and trips is not None
      for one, several in _CALLED.findall(instruction.rest):
        for called in [one] if one else re.findall(_NAME, several):
          if called in computations:
            waiting.append((called, inner, sure))


def _trips(
  loop: _Instruction, computations: dict[str, list[_Instruction]]
) -> int | None:
  """How often a loop turns; None where its text does not tell.

  Compilers of some targets write it down; else it is read off a condition that
  compares with a constant, as jax makes it: the counter starts at 0.
  """
  told = _TRIPS.search(loop.rest)
  if told:
    return int(told[1])
  condition = re.search(rf'condition={_NAME}', loop.rest)
  if not condition:
    return None
  lines = computations[condition[1]]
  constants = [
    re.match(r'constant\((\d+)\)', line.rest)
    for line in lines
    if line.opcode == 'constant'
  ]
  less = any(
    line.opcode == 'compare' and 'direction=LT' in line.rest for line in lines
  )
  if less and len(constants) == 1 and constants[0]:
    return int(constants[0][1])
  return None


def _bytes(instruction: _Instruction) -> int:
  """The larger side: all that a device takes, or all that it gives."""
  taken, given = sum(instruction.operands), instruction.shapes
  n = len(instruction.operands)
  starts = instruction.opcode.endswith('-start')
  if starts and instruction.opcode != 'all-reduce-start':
    given = given[n : 2 * n]  # After its operands, before flags.
  return max(taken, sum(given))
