"""Tests of saving in processes that are killed, or that share the work."""

import os
import textwrap
import threading
import time

import pytest

from qat import manifest
from qat import restore
from tests import processes
from tests import states

HEAD = """
import os, signal, sys, time
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from qat import checkpoint
from tests import states

folder = Path(sys.argv[1])
"""


@pytest.fixture
def start():
  """Starts code in processes of their own; none outlives the test."""
  running = []

  def start_one(body, *args, **environment):
    code = HEAD + textwrap.dedent(body)
    running.append(processes.start(code, *args, **environment))
    return running[-1]

  yield start_one
  for process in running:
    process.kill()
    process.communicate()


SAVE_FOR_EVER = """
with states.opened(folder) as saver:
  for step in range(1, 10_000):
    saver.save(step, states.make(step, 20_000), {'at': step})
    while saver.poll() != step:
      time.sleep(0.001)
    print(step, flush=True)
"""


def test_a_kill_at_any_time_loses_no_step_that_was_reported(tmp_path, start):
  delays = [0.0, 0.02, 0.05]
  runs = [start(SAVE_FOR_EVER, tmp_path / str(i)) for i in range(len(delays))]
  target = states.target(20_000)
  for i, (run, delay) in enumerate(zip(runs, delays, strict=True)):
    assert run.stdout.readline() == '1\n'
    time.sleep(delay)
    run.kill()
    reported = ['1', *run.stdout.read().split()]
    with states.opened(tmp_path / str(i)) as saver:
      restored = saver.restore(target)
    assert restored.step - int(reported[-1]) in (0, 1)
    assert states.same(restored.state, states.make(restored.step, 20_000))
    assert not list((tmp_path / str(i)).glob('*.tmp'))


def test_a_kill_at_each_point_of_a_save(tmp_path, start):
  newest = {'save_started': 2, 'before_commit': 2, 'after_commit': 3}
  runs = {
    point: start(SAVE_FOR_EVER, tmp_path / point, QAT_FAULT_AT=f'{point}:3')
    for point in newest
  }
  for point, run in runs.items():
    run.communicate(timeout=60)
    assert run.returncode == 137
    assert manifest.steps(tmp_path / point)[-1] == newest[point]
    with states.opened(tmp_path / point) as saver:
      restored = saver.restore(states.target(20_000))
      assert restored.step == newest[point]
      assert states.same(restored.state, states.make(restored.step, 20_000))


def test_a_full_disk_is_an_error_and_the_next_save_works(tmp_path, start):
  run = start(
    """
    import resource
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with states.opened(folder, keep_last=1) as saver:
      saver.save(1, states.make(1, 2000), {})
      saver.wait()
      hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
      resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
      try:
        saver.save(2, states.make(2, 2000), {})
        while True:
          assert saver.poll() == 1
          time.sleep(0.01)
      except checkpoint.SaveError as error:
        assert 'step 2' in str(error) and 'File too large' in str(error)
      print(saver.steps(), os.listdir(folder))
      resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
      saver.save(3, states.make(3, 2000), {})
      saver.wait()
      print(saver.steps())
      resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
      saver.save(4, states.make(4, 2000), {})
    """,
    tmp_path,
  )
  # It ends by itself, soon, and not as if all were well.
  out, err = run.communicate(timeout=60)
  assert run.returncode == 1
  assert 'SaveError: The checkpoint of step 4' in err
  assert out == "[1] ['1']\n[3]\n"
  target = states.target(2000)
  restored = restore.newest(tmp_path, target, partial=False, quarantine=False)
  assert states.same(restored.state, states.make(3, 2000))


def test_leaving_right_after_save_waits_for_it(tmp_path, start):
  run = start(
    """
    with states.opened(folder) as saver:
      saver.save(1, states.make(1, 20_000), {})
      sys.exit(143)
    """,
    tmp_path,
  )
  _, err = run.communicate(timeout=60)
  assert run.returncode == 143, err
  assert manifest.steps(tmp_path) == [1]


def test_a_finished_save_leaves_no_thread_behind(tmp_path):
  with states.opened(tmp_path) as saver:
    for step in (1, 2):
      saver.save(step, states.make(step), {})
      saver.wait()
      # One that frees arrays while the interpreter shuts down aborts it.
      alive = [thread.name for thread in threading.enumerate()]
      assert f'checkpoint-{step}' not in alive


@pytest.mark.slow
def test_two_processes_write_one_checkpoint(tmp_path, start):
  body = """
  from jax.sharding import NamedSharding, PartitionSpec as P
  jax.distributed.initialize(
    f'localhost:{sys.argv[2]}', 2, int(sys.argv[3]), initialization_timeout=30)
  mesh = jax.sharding.Mesh(np.array(jax.devices()), ('a',))
  def put(step, spec):
    w = np.arange(64, dtype=np.float32).reshape(16, 4) + step
    sharding = NamedSharding(mesh, spec)
    shard = lambda index: w[index]
    return {'w': jax.make_array_from_callback(w.shape, sharding, shard)}
  def target(spec):
    return {'w': jax.ShapeDtypeStruct(
      (16, 4), jnp.float32, sharding=NamedSharding(mesh, spec))}
  with states.opened(folder, keep_last=2) as saver:
    assert saver.restore(target(P('a'))) is None
    for step in (1, 2, 3):
      saver.save(step, put(step, P('a')), {'at': step})
    saver.wait()
  jax.experimental.multihost_utils.sync_global_devices('saved')
  if jax.process_index() == 0:
    os.unlink(folder / '3' / 'state' / 'manifest.ocdbt')
  jax.experimental.multihost_utils.sync_global_devices('damaged')
  with states.opened(folder) as saver:
    step, state, extra = saver.restore(target(P(None, None)))
    value = np.asarray(state['w'].addressable_data(0))
    print(step, extra, (value == put(2, P())['w'].addressable_data(0)).all())
    jax.experimental.multihost_utils.sync_global_devices('restored')
    print(sorted(os.listdir(folder)))
  """
  port = 20_000 + os.getpid() % 20_000
  flags = '--xla_force_host_platform_device_count=2'
  runs = [start(body, tmp_path, port, i, XLA_FLAGS=flags) for i in range(2)]
  for run in runs:
    out, err = run.communicate(timeout=120)
    assert run.returncode == 0, err
    assert out.endswith(
      "\n2 {'at': 2} True\n['2', '3.corrupt']\n"
    )  # Gloo talks.
