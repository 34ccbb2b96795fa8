"""How two configs differ, and what a resumed run may change."""

import dataclasses
import re
from typing import Any

from ml_collections import ConfigDict

from qat import config as config_lib

# A resumed run may differ in these and in nothing else: they do not decide what
# a step computes, beyond rounding. `train.steps` is here so that a run can be
# made longer or shorter; the schedule then follows the new length.
SAFE = re.compile(
  r'name|train\..*|eval\..*|checkpoint\..*|sensitivity\..*|sample\..*'
  r'|mesh\..*|model\.(remat|expert_form|expert_tile)'
  r'|data\.(workers|threads|timeout_s|cache_dir)'
)


@dataclasses.dataclass(frozen=True)
class Change:
  """A field whose value differs between two configs."""

  field: str
  old: Any
  new: Any

  def __str__(self) -> str:
    return f'{self.field}: {self.old!r} -> {self.new!r}'


def changes(old: ConfigDict, new: ConfigDict) -> list[Change]:
  """Every field that differs; a missing one has the value '(absent)'."""
  a, b = (
    config_lib.flatten(config_lib.plain(old.to_dict())),
    config_lib.flatten(config_lib.plain(new.to_dict())),
  )
  return [
    Change(field, a.get(field, '(absent)'), b.get(field, '(absent)'))
    for field in sorted({*a, *b})
    if a.get(field, '(absent)') != b.get(field, '(absent)')
  ]


def refuse_changes(old: ConfigDict, new: ConfigDict, workdir: str) -> None:
  """Raises a ConfigError unless every change is in the list `SAFE`."""
  unsafe = [c for c in changes(old, new) if not SAFE.fullmatch(c.field)]
  if unsafe:
    raise config_lib.ConfigError(
      f'The run in {workdir} has another config:\n  '
      + '\n  '.join(map(str, unsafe))
      + '\nA run resumes with its own config (fields that may change:'
      f' {SAFE.pattern}). Undo the change, or give another --workdir.'
    )
