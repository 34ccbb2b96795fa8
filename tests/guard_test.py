import json
import os
from pathlib import Path
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from qat import guard

ROOT = Path(guard.__file__).parents[1]


def start(body: str, *args: str) -> subprocess.Popen:
  """Runs Python code in a process of its own."""
  head = 'import os, signal, sys, threading, time\nfrom qat import guard\n'
  return subprocess.Popen(
    [sys.executable, '-c', head + textwrap.dedent(body), *args],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def finish(process: subprocess.Popen) -> tuple[int, str, str, float]:
  """(exit code, stdout, stderr, seconds it took from here on)."""
  begin = time.monotonic()
  try:
    out, err = process.communicate(timeout=20)
  finally:
    process.kill()
  return process.returncode, out, err, time.monotonic() - begin


def wait_for_line(process: subprocess.Popen, line: str) -> None:
  assert process.stdout.readline().strip() == line


# -------------------------------------------------------------------- the lock

HOLD = """
with guard.lock(sys.argv[1]):
  print('held', flush=True)
  time.sleep(60)
"""


def test_the_lock_is_there_and_goes(tmp_path):
  with guard.lock(tmp_path / 'run'):
    held = json.loads((tmp_path / 'run' / 'lock').read_text())
    assert held['pid'] == os.getpid()
    assert os.listdir(tmp_path / 'run') == ['lock']
  assert os.listdir(tmp_path / 'run') == []


def test_a_second_writer_is_refused_at_once(tmp_path):
  first = start(HOLD, str(tmp_path))
  try:
    wait_for_line(first, 'held')
    begin = time.monotonic()
    with pytest.raises(guard.LockedError, match=f'kill {first.pid}'):
      with guard.lock(tmp_path):
        pass
    assert time.monotonic() - begin < 1
    assert json.loads((tmp_path / 'lock').read_text())['pid'] == first.pid
  finally:
    first.kill()
    first.communicate()


def test_one_process_cannot_hold_it_twice(tmp_path):
  with guard.lock(tmp_path):
    with pytest.raises(guard.LockedError):
      with guard.lock(tmp_path):
        pass
    assert (tmp_path / 'lock').exists()


def test_a_killed_writers_lock_is_taken_over(tmp_path):
  first = start(HOLD, str(tmp_path))
  wait_for_line(first, 'held')
  first.kill()  # Not reaped yet: a zombie holds nothing either.
  os.waitid(os.P_PID, first.pid, os.WEXITED | os.WNOWAIT)
  with guard.lock(tmp_path):
    assert json.loads((tmp_path / 'lock').read_text())['pid'] == os.getpid()
  first.communicate()
  with guard.lock(tmp_path):
    pass


@pytest.mark.parametrize('field', ['started', 'boot'])
def test_a_reused_number_is_another_process(tmp_path, field):
  with guard.lock(tmp_path):
    other = json.loads((tmp_path / 'lock').read_text())
  (tmp_path / 'lock').write_text(json.dumps(other | {field: '1'}))
  with guard.lock(tmp_path):
    assert json.loads((tmp_path / 'lock').read_text()) == other


def test_another_hosts_lock_is_left_alone(tmp_path):
  with guard.lock(tmp_path):
    other = json.loads((tmp_path / 'lock').read_text())
  text = json.dumps(other | {'host': 'elsewhere', 'pid': 1})
  (tmp_path / 'lock').write_text(text)
  with pytest.raises(guard.LockedError, match='elsewhere') as error:
    with guard.lock(tmp_path):
      pass
  assert f'delete {tmp_path / "lock"}' in str(error.value)
  assert (tmp_path / 'lock').read_text() == text


@pytest.mark.parametrize('text', ['', 'x', '[]', '{"host": "a"}'])
def test_a_lock_that_says_nothing_is_left_alone(tmp_path, text):
  (tmp_path / 'lock').write_text(text)
  with pytest.raises(guard.LockedError, match='delete it'):
    with guard.lock(tmp_path):
      pass
  assert (tmp_path / 'lock').read_text() == text


def test_someone_elses_lock_is_not_deleted_at_the_end(tmp_path):
  with guard.lock(tmp_path):
    (tmp_path / 'lock').write_text('{}')
  assert (tmp_path / 'lock').read_text() == '{}'


def test_one_of_many_wins_a_stale_lock(tmp_path):
  with guard.lock(tmp_path):
    other = json.loads((tmp_path / 'lock').read_text())
  (tmp_path / 'lock').write_text(json.dumps(other | {'started': '1'}))
  many = [
    start(
      """
      time.sleep(max(0, float(sys.argv[2]) - time.time()))
      try:
        with guard.lock(sys.argv[1]):
          print('won', flush=True)
          time.sleep(60)
      except guard.LockedError:
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


# --------------------------------------------------------------------- signals

LOOP = """
with guard.lock(sys.argv[1]), guard.Interrupts() as interrupts:
  print('ready', flush=True)
  while not interrupts.requested:
    time.sleep(0.01)
  time.sleep(float(sys.argv[2]))
  print('saved', interrupts.requested)
sys.exit(interrupts.exit_code())
"""


@pytest.mark.parametrize(
  ('signum', 'code'), [(signal.SIGTERM, 143), (signal.SIGINT, 130)]
)
def test_a_signal_is_a_wish_to_stop(tmp_path, signum, code):
  process = start(LOOP, str(tmp_path), '0')
  wait_for_line(process, 'ready')
  process.send_signal(signum)
  returned, out, err, _ = finish(process)
  assert (returned, out) == (code, f'saved {signum.name}\n')
  assert f'{signum.name}: will save' in err


def test_two_sigterms_are_one_and_the_second_sigint_ends_it(tmp_path):
  process = start(LOOP, str(tmp_path), '1')
  wait_for_line(process, 'ready')
  for _ in range(2):
    process.send_signal(signal.SIGTERM)
    time.sleep(0.1)
  assert finish(process)[:2] == (143, 'saved SIGTERM\n')

  process = start(LOOP, str(tmp_path), '60')
  wait_for_line(process, 'ready')
  process.send_signal(signal.SIGINT)
  time.sleep(0.2)
  assert process.poll() is None
  process.send_signal(signal.SIGINT)
  code, out, err, seconds = finish(process)
  assert (code, out) == (130, '') and seconds < 2
  assert 'without saving' in err
  assert not (tmp_path / 'lock').exists()


def test_where_nothing_is_lost_a_signal_ends_it_inside_of_native_code(tmp_path):
  process = start(
    """
    import ctypes
    with guard.lock(sys.argv[1]), guard.Interrupts() as interrupts:
      with interrupts.nothing_to_lose():
        print('ready', flush=True)
        # As in a compiler: no line of Python runs in this thread for long.
        native = ctypes.CDLL(None).pause
        for _ in range(1000):
          native()
    """,
    str(tmp_path),
  )
  wait_for_line(process, 'ready')
  process.send_signal(signal.SIGTERM)
  code, _, err, seconds = finish(process)
  assert code == 143 and seconds < 2
  assert 'nothing to save' in err
  assert not (tmp_path / 'lock').exists()


def test_a_wish_before_such_a_phase_ends_it_there():
  process = start(
    """
    with guard.Interrupts() as interrupts:
      with interrupts.nothing_to_lose():
        pass
      os.kill(os.getpid(), signal.SIGTERM)
      while not interrupts.requested:
        time.sleep(0.01)
      with interrupts.nothing_to_lose():
        print('not reached')
    """
  )
  assert finish(process)[:2] == (143, '')


def test_old_handlers_come_back():
  before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
  for _ in range(3):
    with guard.Interrupts() as interrupts:
      assert signal.getsignal(signal.SIGTERM) != before[0]
    assert interrupts.exit_code() == 0
  after = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
  assert after == before
  assert signal.set_wakeup_fd(-1) == -1


def test_a_forked_childs_signals_are_its_own():
  process = start(
    """
    with guard.Interrupts() as interrupts:
      child = os.fork()
      if not child:
        time.sleep(60)
        os._exit(1)
      time.sleep(0.2)
      os.kill(child, signal.SIGTERM)
      _, status = os.waitpid(child, 0)
      time.sleep(0.2)
      print(os.WTERMSIG(status), interrupts.requested)
      orphan = os.fork()  # Lives on, and must not keep the block from ending.
      if not orphan:
        time.sleep(60)
        os._exit(1)
    os.kill(orphan, signal.SIGKILL)
    """
  )
  assert finish(process)[:2] == (0, '15 None\n')


# ----------------------------------------------------------------- time limits


def test_a_wait_that_takes_too_long_is_named(tmp_path):
  process = start(
    """
    def stuck_here():
      time.sleep(60)
    with guard.lock(sys.argv[1]):
      with guard.time_limit('The whole run', 50):
        with guard.time_limit('The next batch', 0.3):
          stuck_here()
    """,
    str(tmp_path),
  )
  code, _, err, seconds = finish(process)
  assert code == guard.TIMED_OUT == 75 and seconds < 3
  assert 'stuck_here' in err
  assert 'The next batch took longer than its limit of 0.3 s' in err
  assert not (tmp_path / 'lock').exists()


def test_the_outer_limit_holds_while_inner_ones_come_and_go():
  process = start(
    """
    with guard.time_limit('The outer', 0.5):
      while True:
        with guard.time_limit('The inner', 20):
          time.sleep(0.05)
    """
  )
  code, _, err, seconds = finish(process)
  assert code == 75 and seconds < 3
  assert 'The outer took longer' in err


def test_a_later_limit_that_is_earlier_wakes_the_watchdog():
  process = start(
    """
    with guard.time_limit('Long', 40):
      time.sleep(0.2)
      with guard.time_limit('Short', 0.2):
        time.sleep(60)
    """
  )
  code, _, err, seconds = finish(process)
  assert code == 75 and 'Short took' in err and seconds < 3


def test_a_limit_that_is_kept_does_nothing_and_costs_little():
  process = start(
    """
    begin = time.perf_counter()
    for _ in range(20_000):
      with guard.time_limit('A batch', 0.2):
        pass
    each = (time.perf_counter() - begin) / 20_000
    time.sleep(0.5)
    print(threading.active_count(), each < 100e-6)
    """
  )
  assert finish(process)[:2] == (0, '2 True\n')


def test_a_limit_ends_with_its_block_though_it_raises():
  process = start(
    """
    try:
      with guard.time_limit('A batch', 0.2):
        raise KeyError
    except KeyError:
      time.sleep(0.5)
    """
  )
  assert finish(process)[0] == 0


def test_a_fork_does_not_inherit_the_parents_deadlines():
  process = start(
    """
    with guard.time_limit('Of the parent', 0.5):
      child = os.fork()
      if not child:
        with guard.time_limit('Of the child', 50):
          time.sleep(1)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
  )
  assert finish(process)[:2] == (0, '0\n')


def test_a_process_stuck_in_writing_is_ended_too():
  process = start(
    """
    with guard.time_limit('The log', 0.3):
      while True:
        sys.stdout.write('x' * 100_000)  # A pipe that nobody reads.
    """
  )
  begin = time.monotonic()
  assert process.wait(timeout=10) == 75
  assert time.monotonic() - begin < 3
  process.communicate()


@pytest.mark.parametrize('seconds', [0, -1, float('inf'), float('nan')])
def test_a_limit_that_is_none_is_refused(seconds):
  with pytest.raises(ValueError, match='The next batch'):
    with guard.time_limit('The next batch', seconds):
      pass


def test_leaving_takes_the_loaders_processes_along():
  process = start(
    """
    import multiprocessing
    if __name__ == '__main__':
      context = multiprocessing.get_context('fork')
      child = context.Process(target=time.sleep, args=(60,))
      child.start()
      print(child.pid, flush=True)
      with guard.time_limit('x', 0.2):
        time.sleep(60)
    """
  )
  code, out, _, _ = finish(process)
  assert code == 75
  deadline = time.monotonic() + 5
  while guard._started(int(out)) and time.monotonic() < deadline:
    time.sleep(0.01)
  assert guard._started(int(out)) is None
