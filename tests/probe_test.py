"""A process that answers, fails, is ended, or does not end."""

import json
import os

from jax import errors as jax_errors
import pytest

from qat import probe
from qat import targets

TARGET = targets.parse('v5e:2x2')
ANSWER = """
import json, os, pathlib, sys
from_parent = dict(a.removeprefix('--').split('=', 1) for a in sys.argv[1:])
found = {
  'error': None,
  'given': from_parent['target'],
  'more': from_parent['a'],
  'platform': os.environ['JAX_PLATFORMS'],
}
pathlib.Path(from_parent['probe']).write_text(json.dumps(found))
"""


def ask(code, *arguments, seconds=60):
  return probe.ask(TARGET, ['-c', code, *arguments], seconds)


def test_an_answer_comes_back():
  assert ask(ANSWER, '--a=b c') == {
    'error': None,
    'given': 'v5e:2x2',
    'more': 'b c',
    'platform': 'cpu',
  }


@pytest.mark.parametrize(
  ('code', 'error'),
  [
    ('import sys; sys.exit("Error: no such thing")', 'no such thing'),
    (
      'import os, sys; print("Check failed", file=sys.stderr, flush=True);'
      ' os.abort()',
      'The compiler ended its process with SIGABRT. Check failed',
    ),
    (
      'print(*range(20), sep="\\n"); exit(3)',
      '\n'.join(map(str, range(12, 20))),
    ),
  ],
)
def test_without_an_answer_the_reason_is_told(code, error):
  found = ask(code)
  assert found['error'] == error
  assert found | {'error': None} == probe.result(TARGET)


def test_a_process_that_does_not_end_is_ended(tmp_path):
  pid = tmp_path / 'pid'
  code = (
    f'import os, time; open({str(pid)!r}, "w").write(str(os.getpid()));'
    ' time.sleep(600)'
  )
  found = ask(code, seconds=3)
  assert 'did not end within 3 s' in found['error']
  with pytest.raises(ProcessLookupError):
    os.kill(int(pid.read_text()), 0)


def test_an_answer_is_left_as_json(tmp_path):
  probe.answer(str(tmp_path / 'a'), probe.result(TARGET))
  found = json.loads((tmp_path / 'a').read_text())
  assert found == {
    'target': 'v5e:2x2',
    'memory_bytes': 16 << 30,
    'error': None,
  }


def test_only_a_lack_of_room_is_an_answer():
  full = jax_errors.JaxRuntimeError('RESOURCE_EXHAUSTED: 17G of 16G\nmore')
  assert probe.refusal(full) == 'RESOURCE_EXHAUSTED: 17G of 16G'
  other = jax_errors.JaxRuntimeError('INTERNAL: broken')
  with pytest.raises(jax_errors.JaxRuntimeError, match='broken'):
    probe.refusal(other)
