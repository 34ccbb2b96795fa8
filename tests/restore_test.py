"""Tests of qat.restore: what comes back, and what damage does."""

import errno
import gc
import os
import shutil

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
from qat import restore
from tests import states

# When one array cannot be read, orbax drops the coroutines that read the others
# and Python tells of each when it collects them.
pytestmark = pytest.mark.filterwarnings(
  'ignore::pytest.PytestUnraisableExceptionWarning'
)


@pytest.fixture
def damaging():
  """For tests that read damaged files: what orbax drops is collected there."""
  yield
  gc.collect()


BITS = np.arange(256, dtype=np.uint8)


@pytest.mark.parametrize(
  'x',
  [
    # Every value of the small ones: NaNs, infinities and negative zeros.
    BITS,
    BITS.view(np.uint16),
    BITS.view(np.uint32),
    BITS.view(np.float16),
    BITS.view(ml_dtypes.float8_e4m3fn),
    BITS.view(ml_dtypes.float8_e5m2),
    BITS[:16].view(ml_dtypes.float4_e2m1fn),
    np.arange(-8, 8).astype(ml_dtypes.int4),
    np.arange(-2, 2).astype(ml_dtypes.int2),
  ],
  ids=lambda x: str(x.dtype),
)
def test_dtypes_come_back_bit_for_bit(tmp_path, x):
  state = {'x': jnp.asarray(x)}
  with states.opened(tmp_path) as saver:
    saver.save(1, state, {})
    assert states.same(saver.restore(states.abstract(state)).state, {'x': x})


def test_a_part_of_the_state_can_be_read(tmp_path):
  states.save_steps(tmp_path, 1)
  part = {'params': states.abstract(states.make(0)['params'])}
  restored = restore.newest(tmp_path, part, partial=True, quarantine=False)
  assert states.same(restored.state, {'params': states.make(1)['params']})
  with pytest.raises(ValueError, match='codes/0: int8'):
    restore.newest(tmp_path, part, partial=False, quarantine=False)


def test_comes_back_on_another_mesh(tmp_path):
  def put(n, spec):
    mesh = jax.sharding.Mesh(
      np.array(jax.devices()[:n]), ('a',), axis_types=(AxisType.Auto,)
    )
    return {'w': jax.device_put(w, NamedSharding(mesh, spec))}

  w = np.random.default_rng(0).standard_normal((16, 24)).astype(np.float32)
  with states.opened(tmp_path) as saver:
    saver.save(1, put(8, P('a')), {})
    for n, spec in (8, P(None, 'a')), (4, P('a')), (2, P()), (1, P()):
      target = put(n, spec)
      state = saver.restore(states.abstract(target)).state
      assert state['w'].sharding == target['w'].sharding
      assert states.same(state, {'w': w})
    saver.save(2, put(1, P()), {})
    assert states.same(
      saver.restore(states.abstract(put(8, P('a')))).state, {'w': w}
    )
    odd = states.abstract({'w': w + jnp.zeros(())})
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:5]), ('a',))
    odd['w'] = odd['w'].update(sharding=NamedSharding(mesh, P('a')))
    with pytest.raises(ValueError, match="'w' cannot be split"):
      saver.restore(odd)
    assert saver.steps() == [1, 2]


@pytest.mark.usefixtures('damaging')
def test_every_damaged_file_is_seen_or_harmless(tmp_path):
  states.save_steps(tmp_path / 'good', 1, 2)
  seen = {'flip': 0, 'cut': 0}
  tried = {'flip': 0, 'cut': 0}

  def judge(kind, file):
    tried[kind] += 1
    said = []
    restored = states.look(tmp_path / 'bad', said.append)
    assert states.same(restored.state, states.make(restored.step)), (kind, file)
    assert restored.extra == {'at': restored.step}
    seen[kind] += restored.step == 1
    assert len(said) == (restored.step == 1)
    file.parent.mkdir(exist_ok=True)

  shutil.copytree(tmp_path / 'good', tmp_path / 'bad')
  for file in states.files_of(tmp_path / 'bad' / '2'):
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
  assert states.look(tmp_path / 'bad').step == 2
  assert tried['flip'] > 40 and seen['flip'] > tried['flip'] / 3
  assert seen['cut'] > tried['cut'] / 3


@pytest.mark.usefixtures('damaging')
def test_every_flipped_bit_of_an_array_is_seen(tmp_path):
  state = states.make(7)['params']['kernel']
  with states.opened(tmp_path) as saver:
    saver.save(1, {'w': state}, {})
  target = states.abstract({'w': state})
  stored = np.asarray(state).tobytes()
  # The file that holds the array as it is: random floats do not compress.
  (file,) = (
    f for f in states.files_of(tmp_path) if stored[:64] in f.read_bytes()
  )
  whole = file.read_bytes()
  begin = whole.index(stored[:64])
  for bit in range(0, 8 * len(stored), 997):
    damaged = bytearray(whole)
    damaged[begin + bit // 8] ^= 1 << bit % 8
    file.write_bytes(damaged)
    with pytest.raises(manifest.CorruptError, match='can be restored'):
      restore.newest(
        tmp_path, target, partial=False, quarantine=False, say=lambda _: None
      )


@pytest.mark.usefixtures('damaging')
def test_a_damaged_step_is_named_set_aside_and_passed_over(tmp_path):
  states.save_steps(tmp_path, 1, 2, 3)
  states.damage(tmp_path / '3')
  shutil.rmtree(tmp_path / '2' / 'state')
  said = []
  with states.opened(tmp_path, say=said.append) as saver:
    step, state, _ = saver.restore(states.target())
    assert (step, saver.poll()) == (1, 1)
    assert states.same(state, states.make(1))
    assert 'params/kernel' in said[0] and 'digest' in said[0]
    assert '2' in said[1] and len(said) == 2
    assert sorted(os.listdir(tmp_path)) == ['1', '2.corrupt', '3.corrupt']
    # The run goes on from there, and may lose a step of that number again.
    saver.save(3, states.make(3), {})
    saver.wait()
    states.damage(tmp_path / '3')
    assert saver.restore(states.target()).step == 1


@pytest.mark.usefixtures('damaging')
def test_a_run_whose_steps_are_all_damaged_never_starts_afresh(tmp_path):
  states.save_steps(tmp_path, 1)
  states.damage(tmp_path / '1')
  with states.opened(tmp_path) as saver:
    for _ in range(2):  # Nor when it is tried again.
      with pytest.raises(manifest.CorruptError, match=r'steps \[1\]'):
        saver.restore(states.target())


def test_a_folder_without_content_is_no_checkpoint(tmp_path):
  (tmp_path / '999').mkdir()
  with states.opened(tmp_path) as saver:
    assert (saver.steps(), saver.poll()) == ([], None)
  with pytest.raises(manifest.CorruptError, match='999'):
    states.look(tmp_path)
  shutil.rmtree(tmp_path / '999')
  states.save_steps(tmp_path, 1)
  (tmp_path / '999').mkdir()
  said = []
  assert states.look(tmp_path, said.append).step == 1
  assert '999 has no manifest.json' in said[0]


@pytest.mark.parametrize(
  'cause',
  [
    ValueError('RESOURCE_EXHAUSTED: Too many open files'),
    OSError(errno.EMFILE, 'Too many open files'),
    OSError(errno.ESTALE, 'Stale file handle'),
    MemoryError(),
  ],
  ids=repr,
)
def test_limits_of_the_machine_are_no_damage(tmp_path, monkeypatch, cause):
  states.save_steps(tmp_path, 1)

  class Handler:
    def restore(self, *_, **__):
      raise ValueError('Reading has failed.') from cause

  monkeypatch.setattr(restore.ocp, 'PyTreeCheckpointHandler', lambda: Handler())
  with states.opened(tmp_path) as saver:
    with pytest.raises(ValueError, match='Reading has failed'):
      saver.restore(states.target())
    assert saver.steps() == [1]


def change(**leaves):
  return states.abstract(states.make(0) | leaves)


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
  states.save_steps(tmp_path, 1)
  with states.opened(tmp_path) as saver:
    with pytest.raises(ValueError, match=text):
      saver.restore(target())
    assert saver.steps() == [1]


def test_the_target_must_say_where_it_lies(tmp_path):
  states.save_steps(tmp_path, 1)
  target = jax.eval_shape(lambda: states.make(0))
  with pytest.raises(ValueError, match='has no sharding'):
    restore.newest(tmp_path, target, partial=False, quarantine=False)


@pytest.mark.usefixtures('damaging')
@pytest.mark.parametrize('seed', [0, 1])
def test_any_order_of_faults(tmp_path, monkeypatch, seed):
  """A model of what must be on disk, beside the disk."""
  rng = np.random.default_rng(seed)
  model, step = {}, 0
  saver = states.opened(tmp_path, keep_last=2)
  for _ in range(25):
    action = rng.choice(['save', 'save', 'fail', 'damage', 'restart', 'mkdir'])
    if action == 'save':
      step += 1
      saver.save(step, states.make(step), {'at': step})
      saver.wait()
      model[step] = True
      model = {s: model[s] for s in sorted(model)[-2:]}
    elif action == 'fail':
      with monkeypatch.context() as broken:
        broken.setattr(manifest, 'write', lambda *_: 1 / 0)
        saver.save(step + 1, states.make(step + 1), {})
        with pytest.raises(checkpoint.SaveError):
          saver.wait()
    elif action == 'damage' and len([s for s in model if model[s]]) > 1:
      states.damage(tmp_path / str(max(model)))
      model[max(model)] = False
    elif action == 'mkdir' and model:
      step += 1
      (tmp_path / str(step)).mkdir()
    if action in ('damage', 'restart', 'mkdir'):
      saver = states.opened(tmp_path, keep_last=2)
      restored = saver.restore(states.target())
      model = {s: good for s, good in model.items() if good}
      assert (restored.step if restored else None) == max(model, default=None)
      if restored:
        assert states.same(restored.state, states.make(restored.step))
        step = restored.step
    assert saver.steps() == sorted(model)
    if not model:
      for each in tmp_path.iterdir():
        shutil.rmtree(each)
