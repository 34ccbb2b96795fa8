"""Tests of qat.checkpoint: saves, their failures, and what is kept."""

import os
from pathlib import Path
import shutil
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qat import checkpoint
from qat import manifest
from qat import restore
from tests import states


def test_what_was_saved_comes_back(tmp_path):
  with states.opened(tmp_path / 'run') as saver:
    assert saver.restore(states.target()) is None
    assert saver.poll() is None
    extra = {'position': [1, 'a', None]}
    saver.save(3, states.make(3), extra)
    extra['position'][0] = 2  # Too late.
    saver.wait()
    assert saver.poll() == 3
    step, state, extra = saver.restore(states.target())
  assert (step, extra) == (3, {'position': [1, 'a', None]})
  assert states.same(state, states.make(3))
  assert os.listdir(tmp_path / 'run') == ['3']


def test_poll_does_not_wait_and_the_end_of_the_block_does(
  tmp_path, monkeypatch
):
  go = threading.Event()
  write = manifest.write
  monkeypatch.setattr(
    manifest, 'write', lambda *args: (go.wait(20), write(*args))
  )
  with states.opened(tmp_path) as saver:
    saver.save(1, states.make(1), {})
    begin = time.monotonic()
    assert saver.poll() is None
    assert time.monotonic() - begin < 1
    assert manifest.steps(tmp_path) == []
    threading.Timer(0.3, go.set).start()
  assert manifest.steps(tmp_path) == [1]


def test_the_block_waits_when_it_raises(tmp_path):
  with pytest.raises(KeyError), states.opened(tmp_path) as saver:
    saver.save(1, states.make(1), {})
    raise KeyError
  assert states.same(states.look(tmp_path).state, states.make(1))


def test_the_state_may_be_donated_after_save(tmp_path):
  advance = jax.jit(
    lambda state: jax.tree.map(lambda x: x + x, state), donate_argnums=0
  )
  with states.opened(tmp_path, keep_last=5) as saver:
    for step in range(1, 5):
      state = {'w': jnp.full((512, 512), step, jnp.float32)}
      saver.save(step, state, {})
      for _ in range(3):
        state = advance(state)
  target = states.abstract({'w': jnp.ones((512, 512))})
  for step in range(4, 0, -1):
    restored = restore.newest(tmp_path, target, partial=False, quarantine=False)
    assert restored.step == step
    assert (np.asarray(restored.state['w']) == step).all()
    shutil.rmtree(tmp_path / str(step))


@pytest.mark.parametrize('how', ['poll', 'wait', 'save', 'exit'])
def test_a_failed_save_is_heard_of(tmp_path, monkeypatch, how):
  states.save_steps(tmp_path, 1)

  def fail(*_):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(manifest, 'write', fail)
  with pytest.raises(checkpoint.SaveError) as error:
    with states.opened(tmp_path, keep_last=1) as saver:
      saver.save(2, states.make(2), {})
      deadline = time.monotonic() + 20
      while how == 'poll' and time.monotonic() < deadline:
        saver.poll()
      if how == 'wait':
        saver.wait()
      if how == 'save':
        saver.save(3, states.make(3), {})
      assert how == 'exit', 'nothing was raised'
  monkeypatch.undo()
  for part in ('step 2', str(tmp_path / '2'), 'No space left on device'):
    assert part in str(error.value)
  assert os.listdir(tmp_path) == ['1']
  # Space is back: the same object goes on.
  saver.save(3, states.make(3), {})
  saver.wait()
  assert saver.steps() == [3]


def test_a_save_that_does_not_end_fails(tmp_path, monkeypatch):
  go, write = threading.Event(), manifest.write
  monkeypatch.setattr(
    manifest, 'write', lambda *args: (go.wait(20), write(*args))
  )
  saver = states.opened(tmp_path, timeout_s=1.0)
  saver.save(1, states.make(1), {})
  with pytest.raises(checkpoint.SaveError, match='not done after 1 s'):
    saver.wait()
  go.set()
  (thread,) = (t for t in threading.enumerate() if t.name == 'checkpoint-1')
  thread.join()


def test_too_little_space_is_told_before_anything_is_written(
  tmp_path, monkeypatch
):
  states.save_steps(tmp_path, 1)
  with states.opened(tmp_path) as saver:
    monkeypatch.setattr(
      shutil, 'disk_usage', lambda _: shutil._ntuple_diskusage(9, 9, 9)
    )
    with pytest.raises(checkpoint.SaveError, match='0 MiB are free'):
      saver.save(2, states.make(2), {})
    assert os.listdir(tmp_path) == ['1']


def test_a_folder_that_vanished_is_an_error(tmp_path):
  with states.opened(tmp_path / 'run') as saver:
    saver.save(1, states.make(1), {})
    saver.wait()
    shutil.rmtree(tmp_path / 'run')
    assert saver.poll() is None
    with pytest.raises(checkpoint.SaveError, match='step 2'):
      saver.save(2, states.make(2), {})


def test_a_file_in_the_folders_place_is_an_error(tmp_path):
  (tmp_path / 'run').write_text('')
  with pytest.raises(NotADirectoryError):
    states.opened(tmp_path / 'run')
  with pytest.raises(NotADirectoryError):
    states.look(tmp_path / 'run')


def test_steps_only_grow(tmp_path):
  states.save_steps(tmp_path, 5)
  (tmp_path / '7').mkdir()
  with states.opened(tmp_path) as saver:
    for step in (4, 5, 6, 7):
      with pytest.raises(ValueError, match='after step 7'):
        saver.save(step, states.make(step), {})


@pytest.mark.parametrize(
  'bad', [{'keep_last': 0}, {'keep_every': -1}, {'timeout_s': 0.0}]
)
def test_bounds_out_of_range_are_refused(tmp_path, bad):
  with pytest.raises(ValueError, match='needs keep_last'):
    states.opened(tmp_path / 'run', **bad)
  assert not (tmp_path / 'run').exists()


def test_bad_arguments_leave_no_trace(tmp_path):
  with states.opened(tmp_path) as saver:
    for state, extra in (
      ({'a.b': jnp.int8(1)}, {}),
      (states.make(1), {'a': (1,)}),
    ):
      with pytest.raises(ValueError):
        saver.save(1, state, extra)
  assert os.listdir(tmp_path) == []


def test_keeps_the_newest_and_the_multiples(tmp_path):
  with states.opened(tmp_path, keep_last=2, keep_every=3) as saver:
    for step in range(1, 9):
      saver.save(step, {'w': jnp.float32(step)}, {})
  assert saver.steps() == [3, 6, 7, 8]


def test_deletes_only_after_the_new_step_is_on_disk(tmp_path, monkeypatch):
  events = []
  rename, remove, sync = Path.rename, shutil.rmtree, checkpoint._sync

  def record(name, call):
    def recorded(path, *args, **kwargs):
      events.append((name, Path(path).relative_to(tmp_path).as_posix()))
      return call(path, *args, **kwargs)

    return recorded

  states.save_steps(tmp_path, 1)
  with states.opened(tmp_path, keep_last=1) as saver:
    monkeypatch.setattr(Path, 'rename', record('rename', rename))
    monkeypatch.setattr(shutil, 'rmtree', record('remove', remove))
    monkeypatch.setattr(checkpoint, '_sync', record('sync', sync))
    saver.save(2, states.make(2), {})
    saver.wait()
  monkeypatch.undo()
  commit = events.index(('rename', '2.tmp'))
  assert commit > events.index(('sync', '2.tmp/manifest.json'))
  assert commit > events.index(('sync', '2.tmp/state/_METADATA'))
  assert events[commit + 1 :] == [
    ('sync', '.'),
    ('rename', '1'),
    ('remove', '1.tmp'),
  ]
  assert saver.steps() == [2]


def test_half_written_steps_are_deleted_at_the_start(tmp_path):
  states.save_steps(tmp_path, 1)
  (tmp_path / '2.tmp' / 'state').mkdir(parents=True)
  (tmp_path / 'notes.tmp').mkdir()
  said = []
  states.opened(tmp_path, say=said.append)
  assert sorted(os.listdir(tmp_path)) == ['1', 'notes.tmp']
  assert 'half-written checkpoint of step 2' in said[0]
