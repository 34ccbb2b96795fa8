"""Tests of qat.guard, in processes that signals and limits may end."""

import os
import signal
import subprocess
import textwrap
import time

import pytest

from qat import guard
from qat import lock
from tests import processes

HEAD = """
import os, signal, sys, threading, time
from qat import guard, lock
"""


def start(body: str, *args: str) -> subprocess.Popen:
  """Runs code that has the imports of all these tests."""
  return processes.start(HEAD + textwrap.dedent(body), *args)


# --------------------------------------------------------------------- signals

LOOP = """
with lock.hold(sys.argv[1]), guard.Interrupts() as interrupts:
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
  processes.wait_for_line(process, 'ready')
  process.send_signal(signum)
  returned, out, err, _ = processes.finish(process)
  assert (returned, out) == (code, f'saved {signum.name}\n')
  assert f'{signum.name}: will save' in err


def test_two_sigterms_are_one_and_the_second_sigint_ends_it(tmp_path):
  process = start(LOOP, str(tmp_path), '1')
  processes.wait_for_line(process, 'ready')
  for _ in range(2):
    process.send_signal(signal.SIGTERM)
    time.sleep(0.1)
  assert processes.finish(process)[:2] == (143, 'saved SIGTERM\n')

  process = start(LOOP, str(tmp_path), '60')
  processes.wait_for_line(process, 'ready')
  process.send_signal(signal.SIGINT)
  time.sleep(0.2)
  assert process.poll() is None
  process.send_signal(signal.SIGINT)
  code, out, err, seconds = processes.finish(process)
  assert (code, out) == (130, '') and seconds < 2
  assert 'without saving' in err
  assert not (tmp_path / 'lock').exists()


def test_where_nothing_is_lost_a_signal_ends_it_inside_of_native_code(tmp_path):
  process = start(
    """
    import ctypes
    with lock.hold(sys.argv[1]), guard.Interrupts() as interrupts:
      with interrupts.nothing_to_lose():
        print('ready', flush=True)
        # As in a compiler: no line of Python runs in this thread for long.
        native = ctypes.CDLL(None).pause
        for _ in range(1000):
          native()
    """,
    str(tmp_path),
  )
  processes.wait_for_line(process, 'ready')
  process.send_signal(signal.SIGTERM)
  code, _, err, seconds = processes.finish(process)
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
  assert processes.finish(process)[:2] == (143, '')


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
  assert processes.finish(process)[:2] == (0, '15 None\n')


@pytest.mark.slow
def test_a_signal_to_one_process_is_heard_by_all_at_the_same_call():
  body = """
  import jax
  import numpy as np
  jax.distributed.initialize(
    f'localhost:{sys.argv[1]}', 2, int(sys.argv[2]), initialization_timeout=30)
  mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 2), ('a', 'b'))
  with guard.Interrupts() as interrupts:
    signals = guard.Agreement(interrupts, mesh)
    found = [signals.heard() for _ in range(3)]
    if jax.process_index() == 1:
      os.kill(os.getpid(), signal.SIGTERM)
      while not interrupts.requested:
        time.sleep(0.01)
    found += [signals.heard() for _ in range(3)]
  print(found, interrupts.exit_code())
  """
  port = 20_000 + os.getpid() % 20_000
  flags = '--xla_force_host_platform_device_count=2'
  runs = [
    processes.start(HEAD + textwrap.dedent(body), port, i, XLA_FLAGS=flags)
    for i in range(2)
  ]
  for run in runs:
    out, err = run.communicate(timeout=120)
    expected = f'{[None] * 4 + ["SIGTERM"] * 2} 143\n'
    assert out.endswith(expected), err


# ----------------------------------------------------------------- time limits


def test_a_wait_that_takes_too_long_is_named(tmp_path):
  process = start(
    """
    def stuck_here():
      time.sleep(60)
    with lock.hold(sys.argv[1]):
      with guard.time_limit('The whole run', 50):
        with guard.time_limit('The next batch', 0.3):
          stuck_here()
    """,
    str(tmp_path),
  )
  code, _, err, seconds = processes.finish(process)
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
  code, _, err, seconds = processes.finish(process)
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
  code, _, err, seconds = processes.finish(process)
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
  assert processes.finish(process)[:2] == (0, '2 True\n')


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
  assert processes.finish(process)[0] == 0


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
  assert processes.finish(process)[:2] == (0, '0\n')


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
  code, out, _, _ = processes.finish(process)
  assert code == 75
  deadline = time.monotonic() + 5
  while lock._started(int(out)) and time.monotonic() < deadline:
    time.sleep(0.01)
  assert lock._started(int(out)) is None
