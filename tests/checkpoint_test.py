import gc
import inspect
import os
from pathlib import Path
import shutil
import subprocess
import sys
import textwrap
import threading
import time

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import ml_dtypes
import numpy as np
import pytest

from qat import checkpoint
from qat import manifest

# When one array cannot be read, orbax drops the coroutines that read the others
# and Python tells of each when it collects them.
pytestmark = pytest.mark.filterwarnings(
  'ignore::pytest.PytestUnraisableExceptionWarning'
)
ROOT = Path(checkpoint.__file__).parents[1]


def make_state(step, size=64):
  """The state of a step, made again from its number; random bits do not pack.

  Its source also runs in the processes that these tests start.
  """
  rng = np.random.default_rng(step)
  bits = rng.integers(0, 2**32, (size, 64), np.uint32)
  return {
    'params': {
      'kernel': jnp.asarray(bits.view(np.float32)),
      'scale': jnp.asarray(rng.standard_normal(8), jnp.bfloat16),
    },
    'codes': (jnp.asarray(rng.integers(-1, 2, 48), jnp.int8),),
    'mask': jnp.asarray(rng.integers(0, 2, 5), bool),
    'step': jnp.int32(step),
  }


def abstract(state):
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
  )


def same(a, b) -> bool:
  """Whether two trees are equal bit for bit."""
  a, b = jax.device_get((a, b))
  return jax.tree.structure(a) == jax.tree.structure(b) and all(
    x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  )


def opened(path, *, keep_last=3, keep_every=0, timeout_s=30.0, say=print):
  return checkpoint.Checkpointer(
    path,
    keep_last=keep_last,
    keep_every=keep_every,
    timeout_s=timeout_s,
    say=say,
  )


def save_steps(path, *steps):
  with opened(path) as checkpoints:
    for step in steps:
      checkpoints.save(step, make_state(step), {'at': step})


def look(path, say=print):
  """Restores without touching anything."""
  return checkpoint.restore(
    path, abstract(make_state(0)), partial=False, quarantine=False, say=say
  )


@pytest.fixture
def damaging():
  """For tests that read damaged files: what orbax drops is collected there."""
  yield
  gc.collect()


def files_of(path) -> list[Path]:
  return sorted(each for each in path.rglob('*') if each.is_file())


# ------------------------------------------------------------- save and restore


def test_what_was_saved_comes_back(tmp_path):
  with opened(tmp_path / 'run') as checkpoints:
    assert checkpoints.restore(abstract(make_state(0))) is None
    assert checkpoints.poll() is None
    extra = {'position': [1, 'a', None]}
    checkpoints.save(3, make_state(3), extra)
    extra['position'][0] = 2  # Too late.
    checkpoints.wait()
    assert checkpoints.poll() == 3
    step, state, extra = checkpoints.restore(abstract(make_state(0)))
  assert (step, extra) == (3, {'position': [1, 'a', None]})
  assert same(state, make_state(3))
  assert os.listdir(tmp_path / 'run') == ['3']


def test_poll_does_not_wait_and_the_end_of_the_block_does(
  tmp_path, monkeypatch
):
  go = threading.Event()
  write = manifest.write
  monkeypatch.setattr(
    manifest, 'write', lambda *args: (go.wait(20), write(*args))
  )
  with opened(tmp_path) as checkpoints:
    checkpoints.save(1, make_state(1), {})
    begin = time.monotonic()
    assert checkpoints.poll() is None
    assert time.monotonic() - begin < 1
    assert manifest.steps(tmp_path) == []
    threading.Timer(0.3, go.set).start()
  assert manifest.steps(tmp_path) == [1]


def test_the_block_waits_when_it_raises(tmp_path):
  with pytest.raises(KeyError), opened(tmp_path) as checkpoints:
    checkpoints.save(1, make_state(1), {})
    raise KeyError
  assert same(look(tmp_path).state, make_state(1))


def test_the_state_may_be_donated_after_save(tmp_path):
  advance = jax.jit(
    lambda state: jax.tree.map(lambda x: x + x, state), donate_argnums=0
  )
  with opened(tmp_path, keep_last=5) as checkpoints:
    for step in range(1, 5):
      state = {'w': jnp.full((512, 512), step, jnp.float32)}
      checkpoints.save(step, state, {})
      for _ in range(3):
        state = advance(state)
  target = abstract({'w': jnp.ones((512, 512))})
  for step in range(4, 0, -1):
    restored = checkpoint.restore(
      tmp_path, target, partial=False, quarantine=False
    )
    assert restored.step == step
    assert (np.asarray(restored.state['w']) == step).all()
    shutil.rmtree(tmp_path / str(step))


@pytest.mark.parametrize(
  'dtype',
  [
    np.uint8,
    np.uint16,
    np.uint32,
    np.float16,
    ml_dtypes.float8_e4m3fn,
    ml_dtypes.float8_e5m2,
    ml_dtypes.int4,
    ml_dtypes.int2,
    ml_dtypes.float4_e2m1fn,
  ],
)
def test_dtypes_come_back_bit_for_bit(tmp_path, dtype):
  # Every value of the small ones: NaNs, infinities and negative zeros.
  x = np.arange(256, dtype=np.uint8).view(np.uint8)
  x = x.view(dtype) if np.dtype(dtype).itemsize > 1 else x.astype(np.uint8)
  if x.dtype != dtype:
    small = 'int4' in str(np.dtype(dtype)) or 'int2' in str(np.dtype(dtype))
    x = x.astype(np.int8).astype(dtype) if small else (x % 16).view(dtype)
  state = {'x': jnp.asarray(x)}
  with opened(tmp_path) as checkpoints:
    checkpoints.save(1, state, {})
    assert same(checkpoints.restore(abstract(state)).state, state)


def test_a_part_of_the_state_can_be_read(tmp_path):
  save_steps(tmp_path, 1)
  part = {'params': abstract(make_state(0)['params'])}
  restored = checkpoint.restore(tmp_path, part, partial=True, quarantine=False)
  assert same(restored.state, {'params': make_state(1)['params']})
  with pytest.raises(ValueError, match='codes/0: int8'):
    checkpoint.restore(tmp_path, part, partial=False, quarantine=False)


def test_comes_back_on_another_mesh(tmp_path):
  def put(n, spec):
    mesh = jax.sharding.Mesh(
      np.array(jax.devices()[:n]), ('a',), axis_types=(AxisType.Auto,)
    )
    return {'w': jax.device_put(w, NamedSharding(mesh, spec))}

  w = np.random.default_rng(0).standard_normal((16, 24)).astype(np.float32)
  with opened(tmp_path) as checkpoints:
    checkpoints.save(1, put(8, P('a')), {})
    for n, spec in (8, P(None, 'a')), (4, P('a')), (2, P()), (1, P()):
      target = put(n, spec)
      state = checkpoints.restore(abstract(target)).state
      assert state['w'].sharding == target['w'].sharding
      assert same(state, {'w': w})
    checkpoints.save(2, put(1, P()), {})
    assert same(checkpoints.restore(abstract(put(8, P('a')))).state, {'w': w})
    odd = abstract({'w': w + jnp.zeros(())})
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:5]), ('a',))
    odd['w'] = odd['w'].update(sharding=NamedSharding(mesh, P('a')))
    with pytest.raises(ValueError, match="'w' cannot be split"):
      checkpoints.restore(odd)
    assert checkpoints.steps() == [1, 2]


# ----------------------------------------------------------------------- damage


@pytest.mark.usefixtures('damaging')
def test_every_damaged_file_is_seen_or_harmless(tmp_path):
  save_steps(tmp_path / 'good', 1, 2)
  seen = {'flip': 0, 'cut': 0}
  tried = {'flip': 0, 'cut': 0}

  def judge(kind, file):
    tried[kind] += 1
    said = []
    restored = look(tmp_path / 'bad', said.append)
    assert same(restored.state, make_state(restored.step)), (kind, file)
    assert restored.extra == {'at': restored.step}
    seen[kind] += restored.step == 1
    assert len(said) == (restored.step == 1)
    file.parent.mkdir(exist_ok=True)

  shutil.copytree(tmp_path / 'good', tmp_path / 'bad')
  for file in files_of(tmp_path / 'bad' / '2'):
    whole = file.read_bytes()
    places = {len(whole) * i // 8 for i in range(8)} if whole else ()
    for place in places:
      damaged = bytearray(whole)
      damaged[place] ^= 1 << place % 8
      file.write_bytes(damaged)
      judge('flip', file)
    for size in {0, len(whole) // 2, max(0, len(whole) - 1)} - {len(whole)}:
      file.write_bytes(whole[:size])
      judge('cut', file)
    file.unlink()
    judge('cut', file)
    file.write_bytes(whole)
  assert look(tmp_path / 'bad').step == 2
  assert tried['flip'] > 40 and seen['flip'] > tried['flip'] / 3
  assert seen['cut'] > tried['cut'] / 3


@pytest.mark.usefixtures('damaging')
def test_every_flipped_bit_of_an_array_is_seen(tmp_path):
  state = make_state(7)['params']['kernel']
  with opened(tmp_path) as checkpoints:
    checkpoints.save(1, {'w': state}, {})
  target = abstract({'w': state})
  stored = np.asarray(state).tobytes()
  # The file that holds the array as it is: random floats do not compress.
  (file,) = (f for f in files_of(tmp_path) if stored[:64] in f.read_bytes())
  whole = file.read_bytes()
  begin = whole.index(stored[:64])
  for bit in range(0, 8 * len(stored), 997):
    damaged = bytearray(whole)
    damaged[begin + bit // 8] ^= 1 << bit % 8
    file.write_bytes(damaged)
    with pytest.raises(checkpoint.CorruptError, match='can be restored'):
      checkpoint.restore(
        tmp_path, target, partial=False, quarantine=False, say=lambda _: None
      )


def damage(step_path):
  """Flips one bit of the kernel's data."""
  stored = np.asarray(make_state(int(step_path.name))['params']['kernel'])
  for file in files_of(step_path):
    whole = bytearray(file.read_bytes())
    at = whole.find(stored.tobytes()[:64])
    if at >= 0:
      whole[at + 1000] ^= 4
      file.write_bytes(whole)
      return
  raise AssertionError(f'no data in {step_path}')


@pytest.mark.usefixtures('damaging')
def test_a_damaged_step_is_named_set_aside_and_passed_over(tmp_path):
  save_steps(tmp_path, 1, 2, 3)
  damage(tmp_path / '3')
  shutil.rmtree(tmp_path / '2' / 'state')
  said = []
  with opened(tmp_path, say=said.append) as checkpoints:
    step, state, _ = checkpoints.restore(abstract(make_state(0)))
    assert (step, checkpoints.poll()) == (1, 1)
    assert same(state, make_state(1))
    assert 'params/kernel' in said[0] and 'digest' in said[0]
    assert '2' in said[1] and len(said) == 2
    assert sorted(os.listdir(tmp_path)) == ['1', '2.corrupt', '3.corrupt']
    # The run goes on from there, and may lose a step of that number again.
    checkpoints.save(3, make_state(3), {})
    checkpoints.wait()
    damage(tmp_path / '3')
    assert checkpoints.restore(abstract(make_state(0))).step == 1


@pytest.mark.usefixtures('damaging')
def test_a_run_whose_steps_are_all_damaged_never_starts_afresh(tmp_path):
  save_steps(tmp_path, 1)
  damage(tmp_path / '1')
  with opened(tmp_path) as checkpoints:
    for _ in range(2):  # Nor when it is tried again.
      with pytest.raises(checkpoint.CorruptError, match=r'steps \[1\]'):
        checkpoints.restore(abstract(make_state(0)))


def test_a_folder_without_content_is_no_checkpoint(tmp_path):
  (tmp_path / '999').mkdir()
  with opened(tmp_path) as checkpoints:
    assert (checkpoints.steps(), checkpoints.poll()) == ([], None)
  with pytest.raises(checkpoint.CorruptError, match='999'):
    look(tmp_path)
  shutil.rmtree(tmp_path / '999')
  save_steps(tmp_path, 1)
  (tmp_path / '999').mkdir()
  said = []
  assert look(tmp_path, said.append).step == 1
  assert '999 has no manifest.json' in said[0]


def test_limits_of_the_machine_are_no_damage(tmp_path, monkeypatch):
  save_steps(tmp_path, 1)

  class Handler:
    def restore(self, *_, **__):
      raise ValueError('RESOURCE_EXHAUSTED: Too many open files')

  monkeypatch.setattr(
    checkpoint.ocp, 'PyTreeCheckpointHandler', lambda: Handler()
  )
  with opened(tmp_path) as checkpoints:
    with pytest.raises(ValueError, match='Too many open files'):
      checkpoints.restore(abstract(make_state(0)))
    assert checkpoints.steps() == [1]


def change(**leaves):
  return abstract(make_state(0) | leaves)


@pytest.mark.parametrize(
  ('target', 'text'),
  [
    (lambda: change(mask=jnp.zeros(5, jnp.int8)), r'mask: bool\[5\].*int8'),
    (lambda: change(mask=jnp.zeros(6, bool)), r'mask: bool\[5\].*bool\[6\]'),
    (lambda: change(new=jnp.zeros(2)), 'new: nothing in the checkpoint'),
    (lambda: change(params={}), 'params/kernel: float32.* nothing here'),
  ],
  ids=['dtype', 'shape', 'more', 'less'],
)
def test_another_state_is_refused_and_nothing_is_set_aside(
  tmp_path, target, text
):
  save_steps(tmp_path, 1)
  with opened(tmp_path) as checkpoints:
    with pytest.raises(ValueError, match=text):
      checkpoints.restore(target())
    assert checkpoints.steps() == [1]


def test_the_target_must_say_where_it_lies(tmp_path):
  save_steps(tmp_path, 1)
  target = jax.eval_shape(lambda: make_state(0))
  with pytest.raises(ValueError, match='has no sharding'):
    checkpoint.restore(tmp_path, target, partial=False, quarantine=False)


# --------------------------------------------------------------------- failures


@pytest.mark.parametrize('how', ['poll', 'wait', 'save', 'exit'])
def test_a_failed_save_is_heard_of(tmp_path, monkeypatch, how):
  save_steps(tmp_path, 1)

  def fail(*_):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(manifest, 'write', fail)
  with pytest.raises(checkpoint.SaveError) as error:
    with opened(tmp_path, keep_last=1) as checkpoints:
      checkpoints.save(2, make_state(2), {})
      deadline = time.monotonic() + 20
      while how == 'poll' and time.monotonic() < deadline:
        checkpoints.poll()
      if how == 'wait':
        checkpoints.wait()
      if how == 'save':
        checkpoints.save(3, make_state(3), {})
      assert how == 'exit', 'nothing was raised'
  monkeypatch.undo()
  for part in ('step 2', str(tmp_path / '2'), 'No space left on device'):
    assert part in str(error.value)
  assert os.listdir(tmp_path) == ['1']
  # Space is back: the same object goes on.
  checkpoints.save(3, make_state(3), {})
  checkpoints.wait()
  assert checkpoints.steps() == [3]


def test_a_save_that_does_not_end_fails(tmp_path, monkeypatch):
  go, write = threading.Event(), manifest.write
  monkeypatch.setattr(
    manifest, 'write', lambda *args: (go.wait(20), write(*args))
  )
  checkpoints = opened(tmp_path, timeout_s=1.0)
  checkpoints.save(1, make_state(1), {})
  with pytest.raises(checkpoint.SaveError, match='not done after 1 s'):
    checkpoints.wait()
  go.set()
  (thread,) = (t for t in threading.enumerate() if t.name == 'checkpoint-1')
  thread.join()


def test_too_little_space_is_told_before_anything_is_written(
  tmp_path, monkeypatch
):
  save_steps(tmp_path, 1)
  with opened(tmp_path) as checkpoints:
    monkeypatch.setattr(
      shutil, 'disk_usage', lambda _: shutil._ntuple_diskusage(9, 9, 9)
    )
    with pytest.raises(checkpoint.SaveError, match='0 MiB are free'):
      checkpoints.save(2, make_state(2), {})
    assert os.listdir(tmp_path) == ['1']


def test_a_folder_that_vanished_is_an_error(tmp_path):
  with opened(tmp_path / 'run') as checkpoints:
    checkpoints.save(1, make_state(1), {})
    checkpoints.wait()
    shutil.rmtree(tmp_path / 'run')
    assert checkpoints.poll() is None
    with pytest.raises(checkpoint.SaveError, match='step 2'):
      checkpoints.save(2, make_state(2), {})


def test_a_file_in_the_folders_place_is_an_error(tmp_path):
  (tmp_path / 'run').write_text('')
  with pytest.raises(NotADirectoryError):
    opened(tmp_path / 'run')
  with pytest.raises(NotADirectoryError):
    look(tmp_path / 'run')


def test_steps_only_grow(tmp_path):
  save_steps(tmp_path, 5)
  (tmp_path / '7').mkdir()
  with opened(tmp_path) as checkpoints:
    for step in (4, 5, 6, 7):
      with pytest.raises(ValueError, match='after step 7'):
        checkpoints.save(step, make_state(step), {})


@pytest.mark.parametrize(
  'bad', [{'keep_last': 0}, {'keep_every': -1}, {'timeout_s': 0.0}]
)
def test_bounds_out_of_range_are_refused(tmp_path, bad):
  with pytest.raises(ValueError, match='needs keep_last'):
    opened(tmp_path / 'run', **bad)
  assert not (tmp_path / 'run').exists()


def test_bad_arguments_leave_no_trace(tmp_path):
  with opened(tmp_path) as checkpoints:
    for state, extra in (
      ({'a.b': jnp.int8(1)}, {}),
      (make_state(1), {'a': (1,)}),
    ):
      with pytest.raises(ValueError):
        checkpoints.save(1, state, extra)
  assert os.listdir(tmp_path) == []


# -------------------------------------------------------- retention, durability


def test_keeps_the_newest_and_the_multiples(tmp_path):
  with opened(tmp_path, keep_last=2, keep_every=3) as checkpoints:
    for step in range(1, 9):
      checkpoints.save(step, {'w': jnp.float32(step)}, {})
  assert checkpoints.steps() == [3, 6, 7, 8]


def test_deletes_only_after_the_new_step_is_on_disk(tmp_path, monkeypatch):
  events = []
  rename, remove, sync = Path.rename, shutil.rmtree, checkpoint._sync

  def record(name, call):
    def recorded(path, *args, **kwargs):
      events.append((name, Path(path).relative_to(tmp_path).as_posix()))
      return call(path, *args, **kwargs)

    return recorded

  save_steps(tmp_path, 1)
  with opened(tmp_path, keep_last=1) as checkpoints:
    monkeypatch.setattr(Path, 'rename', record('rename', rename))
    monkeypatch.setattr(shutil, 'rmtree', record('remove', remove))
    monkeypatch.setattr(checkpoint, '_sync', record('sync', sync))
    checkpoints.save(2, make_state(2), {})
    checkpoints.wait()
  monkeypatch.undo()
  commit = events.index(('rename', '2.tmp'))
  assert commit > events.index(('sync', '2.tmp/manifest.json'))
  assert commit > events.index(('sync', '2.tmp/state/_METADATA'))
  assert events[commit + 1 :] == [
    ('sync', '.'),
    ('rename', '1'),
    ('remove', '1.tmp'),
  ]
  assert checkpoints.steps() == [2]


def test_half_written_steps_are_deleted_at_the_start(tmp_path):
  save_steps(tmp_path, 1)
  (tmp_path / '2.tmp' / 'state').mkdir(parents=True)
  (tmp_path / 'notes.tmp').mkdir()
  said = []
  opened(tmp_path, say=said.append)
  assert sorted(os.listdir(tmp_path)) == ['1', 'notes.tmp']
  assert 'half-written checkpoint of step 2' in said[0]


@pytest.mark.usefixtures('damaging')
@pytest.mark.parametrize('seed', [0, 1])
def test_any_order_of_faults(tmp_path, monkeypatch, seed):
  """A model of what must be on disk, beside the disk."""
  rng = np.random.default_rng(seed)
  model, step = {}, 0
  checkpoints = opened(tmp_path, keep_last=2)
  for _ in range(25):
    action = rng.choice(['save', 'save', 'fail', 'damage', 'restart', 'mkdir'])
    if action == 'save':
      step += 1
      checkpoints.save(step, make_state(step), {'at': step})
      checkpoints.wait()
      model[step] = True
      model = {s: model[s] for s in sorted(model)[-2:]}
    elif action == 'fail':
      with monkeypatch.context() as broken:
        broken.setattr(manifest, 'write', lambda *_: 1 / 0)
        checkpoints.save(step + 1, make_state(step + 1), {})
        with pytest.raises(checkpoint.SaveError):
          checkpoints.wait()
    elif action == 'damage' and len([s for s in model if model[s]]) > 1:
      damage(tmp_path / str(max(model)))
      model[max(model)] = False
    elif action == 'mkdir' and model:
      step += 1
      (tmp_path / str(step)).mkdir()
    if action in ('damage', 'restart', 'mkdir'):
      checkpoints = opened(tmp_path, keep_last=2)
      restored = checkpoints.restore(abstract(make_state(0)))
      model = {s: good for s, good in model.items() if good}
      assert (restored.step if restored else None) == max(model, default=None)
      if restored:
        assert same(restored.state, make_state(restored.step))
        step = restored.step
    assert checkpoints.steps() == sorted(model)
    if not model:
      for each in tmp_path.iterdir():
        shutil.rmtree(each)


# ----------------------------------------------------------- in other processes

RUN = """
import jax, jax.numpy as jnp, numpy as np
import os, pathlib, signal, sys, time
from qat import checkpoint

def opened(keep_last=3):
  return checkpoint.Checkpointer(
    pathlib.Path(sys.argv[1]), keep_last=keep_last, keep_every=0,
    timeout_s=20.0, say=lambda line: None)

""" + inspect.getsource(make_state)


@pytest.fixture
def start():
  """Starts Python code in processes of their own; none outlives the test."""
  running = []

  def start_one(body, *args, **environment):
    running.append(
      subprocess.Popen(
        [sys.executable, '-c', RUN + textwrap.dedent(body), *map(str, args)],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
      )
    )
    return running[-1]

  yield start_one
  for process in running:
    process.kill()
    process.communicate()


SAVE_FOR_EVER = """
with opened() as checkpoints:
  for step in range(1, 10_000):
    checkpoints.save(step, make_state(step, 20_000), {'at': step})
    while checkpoints.poll() != step:
      time.sleep(0.001)
    print(step, flush=True)
"""


def test_a_kill_at_any_time_loses_no_step_that_was_reported(tmp_path, start):
  delays = [0.0, 0.02, 0.05]
  runs = [start(SAVE_FOR_EVER, tmp_path / str(i)) for i in range(len(delays))]
  target = abstract(make_state(0, 20_000))
  for i, (run, delay) in enumerate(zip(runs, delays, strict=True)):
    assert run.stdout.readline() == '1\n'
    time.sleep(delay)
    run.kill()
    reported = ['1', *run.stdout.read().split()]
    with opened(tmp_path / str(i)) as checkpoints:
      restored = checkpoints.restore(target)
    assert restored.step - int(reported[-1]) in (0, 1)
    assert same(restored.state, make_state(restored.step, 20_000))
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
    with opened(tmp_path / point) as checkpoints:
      restored = checkpoints.restore(abstract(make_state(0, 20_000)))
      assert restored.step == newest[point]
      assert same(restored.state, make_state(restored.step, 20_000))


def test_a_full_disk_is_an_error_and_the_next_save_works(tmp_path, start):
  run = start(
    """
    import resource
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with opened(keep_last=1) as checkpoints:
      checkpoints.save(1, make_state(1, 2000), {})
      checkpoints.wait()
      hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
      resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
      try:
        checkpoints.save(2, make_state(2, 2000), {})
        while True:
          assert checkpoints.poll() == 1
          time.sleep(0.01)
      except checkpoint.SaveError as error:
        assert 'step 2' in str(error) and 'File too large' in str(error)
      print(checkpoints.steps(), os.listdir(sys.argv[1]))
      resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
      checkpoints.save(3, make_state(3, 2000), {})
      checkpoints.wait()
      print(checkpoints.steps())
      resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
      checkpoints.save(4, make_state(4, 2000), {})
    """,
    tmp_path,
  )
  # It ends by itself, soon, and not as if all were well.
  out, err = run.communicate(timeout=60)
  assert run.returncode == 1
  assert 'SaveError: The checkpoint of step 4' in err
  assert out == "[1] ['1']\n[3]\n"
  target = abstract(make_state(0, 2000))
  restored = checkpoint.restore(
    tmp_path, target, partial=False, quarantine=False
  )
  assert same(restored.state, make_state(3, 2000))


def test_leaving_right_after_save_waits_for_it(tmp_path, start):
  run = start(
    """
    with opened() as checkpoints:
      checkpoints.save(1, make_state(1, 20_000), {})
      sys.exit(143)
    """,
    tmp_path,
  )
  run.communicate(timeout=60)
  assert run.returncode == 143
  assert manifest.steps(tmp_path) == [1]


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
  with opened(keep_last=2) as checkpoints:
    assert checkpoints.restore(target(P('a'))) is None
    for step in (1, 2, 3):
      checkpoints.save(step, put(step, P('a')), {'at': step})
    checkpoints.wait()
  jax.experimental.multihost_utils.sync_global_devices('saved')
  if jax.process_index() == 0:
    os.unlink(pathlib.Path(sys.argv[1], '3', 'state', 'manifest.ocdbt'))
  jax.experimental.multihost_utils.sync_global_devices('damaged')
  with opened() as checkpoints:
    step, state, extra = checkpoints.restore(target(P(None, None)))
    value = np.asarray(state['w'].addressable_data(0))
    print(step, extra, (value == put(2, P())['w'].addressable_data(0)).all())
    jax.experimental.multihost_utils.sync_global_devices('restored')
    print(sorted(os.listdir(sys.argv[1])))
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
