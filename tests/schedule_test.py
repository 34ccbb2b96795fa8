"""Bundles are counted in texts that are written here, as libtpu writes them."""

import collections
import itertools

import pytest

from qat import schedule

LEGEND = 'LB: loop body\nPF: predicated region fallthrough\n\n'
CALL = (
  '  %{0} = bf16[8,128]{{1,0:T(8,128)(2,1)}} custom-call(%x), '
  'custom_call_target="tpu_custom_call", metadata={{op_name="jit(f)/k"}}\n'
)


def program(*parts):
  """A text: a number is plain bundles, ('loop', ...) and ('when', ...) hold it.

  A branch takes five bundles: of a condition before its parts, of a loop after.
  """
  bundles, regions = [], itertools.count(20)
  starts = collections.defaultdict(list)

  def emit(parts):
    for part in parts:
      if isinstance(part, int):
        bundles.extend(['{}'] * part)
        continue
      kind, *inner = part
      region = next(regions)
      branch = [f'{{ %9 = sbr.rel (%p1) target = $region{region}  ;;  %s1 }}']
      branch += ['{}'] * 4
      if kind == 'loop':
        starts[len(bundles)].append(f'Start region {region}')
        emit(inner)
        bundles.extend(branch)
      else:
        bundles.extend(branch)
        emit(inner)
        starts[len(bundles)].append(f'Start/End empty region {region}')

  emit(parts)
  bundles.append('{}')  # Where the last condition ends.
  lines = []
  for i, text in enumerate(bundles):
    mark = 'PF' if i in starts else '  '
    address = '0' if i == 0 else hex(i)
    comment = ' :: '.join(starts.get(i, []))
    comment = f' /* {comment}\npad_low: (0, 0) */' if comment else ''
    lines.append(f'{address:>6} {mark}: > {text}{comment}')
  return LEGEND + '\n'.join(lines)


KERNEL = 'when', 7, ('when', 30), 100, ('when', 50), 9


def test_of_a_step_and_of_the_conditions_in_its_longest_stage():
  copies = 'when', 3, ('when', 20), 2
  found = schedule.parse(
    program(4, ('loop', 6, copies, KERNEL, ('when', 8)), 3)
  )
  kernel = 5 + 7 + 35 + 100 + 55 + 9
  turn = 6 + (5 + 3 + 25 + 2) + kernel + (5 + 8) + 5
  assert found.conditions == (30, 50)
  assert found.step == turn - 80
  assert found.total == 4 + turn + 3 + 1


def test_what_is_in_a_condition_belongs_to_it():
  deep = 'when', 40, ('when', 10, ('when', 5)), ('loop', 12)
  found = schedule.parse(program(('loop', ('when', 60, deep), 2)))
  assert found.conditions == (40 + (5 + 10 + 5 + 5) + (12 + 5),)
  assert found.step == 5 + 60 + 5 + 2 + 5


def test_a_grid_of_one_step_has_no_loop():
  found = schedule.parse(program(10, ('when', 20), 4))
  assert found == schedule.Schedule(40, 20, (20,))


def test_a_loop_without_conditions_is_a_step():
  assert schedule.parse(program(2, ('loop', 30))).step == 35


def test_a_branch_to_the_end_is_no_condition():
  text = program(10, ('when', 20), 4)
  leaves = '> { %15 = sbr.rel (%p2) target = $region4 }'
  assert schedule.parse(text.replace('> {}', leaves, 1)) == schedule.parse(text)


def test_another_text_is_refused():
  with pytest.raises(ValueError, match='No bundles'):
    schedule.parse('HloModule jit_f')


def test_the_files_of_a_programs_kernels_are_found(tmp_path):
  module = (
    'ENTRY %main {\n' + CALL.format('mm.1') + CALL.format('mm.12') + '}\n'
  )
  for name, bundles in (
    ('17-mm.1-9-final_bundles', 10),
    ('17-mm.1-8-schedule-analysis_final_bundles', 20),
    ('17-mm.12-72-final_bundles', 30),
    ('17-copy.1-72-final_bundles', 40),
  ):
    (tmp_path / f'{name}.txt').write_text(program(bundles))
  found = schedule.of_kernels(tmp_path, module)
  assert {k: s.total for k, s in found.items()} == {'mm.1': 11, 'mm.12': 31}
  assert schedule.of_kernels(tmp_path, 'ENTRY %main {\n}\n') == {}
  with pytest.raises(FileNotFoundError, match=r'no bundles of mm\.2'):
    schedule.of_kernels(tmp_path, CALL.format('mm.2'))
