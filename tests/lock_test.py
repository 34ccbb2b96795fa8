"""Tests of qat.lock, with other processes as the other writers."""

import json
import os
import subprocess
import textwrap
import time

import pytest

from qat import lock
from tests import processes

HEAD = 'import sys, time\nfrom qat import lock\n'


def start(body: str, *args: str) -> subprocess.Popen:
  """Runs code that has the imports of all these tests."""
  return processes.start(HEAD + textwrap.dedent(body), *args)


HOLD = """
with lock.hold(sys.argv[1]):
  print('held', flush=True)
  time.sleep(60)
"""


def test_the_lock_is_there_and_goes(tmp_path):
  with lock.hold(tmp_path / 'run'):
    held = json.loads((tmp_path / 'run' / 'lock').read_text())
    assert held['pid'] == os.getpid()
    assert os.listdir(tmp_path / 'run') == ['lock']
  assert os.listdir(tmp_path / 'run') == []


def test_a_second_writer_is_refused_at_once(tmp_path):
  first = start(HOLD, str(tmp_path))
  try:
    processes.wait_for_line(first, 'held')
    begin = time.monotonic()
    with pytest.raises(lock.LockedError, match=f'kill {first.pid}'):
      with lock.hold(tmp_path):
        pass
    assert time.monotonic() - begin < 1
    assert json.loads((tmp_path / 'lock').read_text())['pid'] == first.pid
  finally:
    first.kill()
    first.communicate()


def test_one_process_cannot_hold_it_twice(tmp_path):
  with lock.hold(tmp_path):
    with pytest.raises(lock.LockedError):
      with lock.hold(tmp_path):
        pass
    assert (tmp_path / 'lock').exists()


def test_a_killed_writers_lock_is_taken_over(tmp_path):
  first = start(HOLD, str(tmp_path))
  processes.wait_for_line(first, 'held')
  first.kill()  # Not reaped yet: a zombie holds nothing either.
  os.waitid(os.P_PID, first.pid, os.WEXITED | os.WNOWAIT)
  with lock.hold(tmp_path):
    assert json.loads((tmp_path / 'lock').read_text())['pid'] == os.getpid()
  first.communicate()
  with lock.hold(tmp_path):
    pass


@pytest.mark.parametrize('field', ['started', 'boot'])
def test_a_reused_number_is_another_process(tmp_path, field):
  with lock.hold(tmp_path):
    other = json.loads((tmp_path / 'lock').read_text())
  (tmp_path / 'lock').write_text(json.dumps(other | {field: '1'}))
  with lock.hold(tmp_path):
    assert json.loads((tmp_path / 'lock').read_text()) == other


def test_another_hosts_lock_is_left_alone(tmp_path):
  with lock.hold(tmp_path):
    other = json.loads((tmp_path / 'lock').read_text())
  text = json.dumps(other | {'host': 'elsewhere', 'pid': 1})
  (tmp_path / 'lock').write_text(text)
  with pytest.raises(lock.LockedError, match='elsewhere') as error:
    with lock.hold(tmp_path):
      pass
  assert f'delete {tmp_path / "lock"}' in str(error.value)
  assert (tmp_path / 'lock').read_text() == text


@pytest.mark.parametrize('text', ['', 'x', '[]', '{"host": "a"}'])
def test_a_lock_that_says_nothing_is_left_alone(tmp_path, text):
  (tmp_path / 'lock').write_text(text)
  with pytest.raises(lock.LockedError, match='delete it'):
    with lock.hold(tmp_path):
      pass
  assert (tmp_path / 'lock').read_text() == text


def test_someone_elses_lock_is_not_deleted_at_the_end(tmp_path):
  with lock.hold(tmp_path):
    (tmp_path / 'lock').write_text('{}')
  assert (tmp_path / 'lock').read_text() == '{}'


def test_one_of_many_wins_a_stale_lock(tmp_path):
  with lock.hold(tmp_path):
    other = json.loads((tmp_path / 'lock').read_text())
  (tmp_path / 'lock').write_text(json.dumps(other | {'started': '1'}))
  many = [
    start(
      """
      time.sleep(max(0, float(sys.argv[2]) - time.time()))
      try:
        with lock.hold(sys.argv[1]):
          print('won', flush=True)
          time.sleep(60)
      except lock.LockedError:
        print('lost')
      """,
      str(tmp_path),
      str(time.time() + 1.0),
    )
    for _ in range(6)
  ]
  said = sorted(each.stdout.readline().strip() for each in many)
  for each in many:
    each.kill()
    each.communicate()
  assert said == ['lost'] * 5 + ['won']
