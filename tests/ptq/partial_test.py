"""Parts on disk: the same in every bit, and never of something else."""

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from qat.ptq import partial
from qat.quant import packing
from qat.quant import qtensor


def leaf():
  rng = np.random.default_rng(0)
  exact = np.zeros((8, 6), np.float16)
  exact[3, 4] = 1.5
  return qtensor.QTensor(
    jnp.asarray(rng.integers(-8, 8, (8, 6)), jnp.int8),
    jnp.asarray(rng.random((1, 6)), jnp.float32),
    'int4',
    jnp.asarray(rng.integers(-8, 8, (1, 6)), jnp.int8),
    jnp.asarray(exact),
  )


def test_quantized_matrices_come_back_bit_for_bit(tmp_path):
  store = partial.Store(tmp_path / 'parts', {})
  packed = {
    'block_0/attn/q': packing.pack(leaf()),
    'file': packing.pack(leaf()),
  }
  notes = [{'seconds': 0.5}, None]
  store.save_packed('quantized-block_0', packed, notes)
  found, told = store.load_packed('quantized-block_0')
  assert told == notes and list(found) == list(packed)
  for one in found.values():
    assert one.alphabet == 'int4'
    jax.tree.map(np.testing.assert_array_equal, one, leaf())


def test_arrays_and_notes_come_back(tmp_path):
  store = partial.Store(tmp_path / 'parts', {})
  arrays = {'file': np.arange(3.0), 'notes': np.eye(2, dtype=np.float32)}
  assert not store.has('gradients')
  store.save('gradients', arrays, [3, [0.5]])
  store.save('gradients', arrays, [4, [0.5]])
  again = partial.Store(tmp_path / 'parts', {})
  assert again.has('gradients')
  found, notes = again.load('gradients')
  assert notes == [4, [0.5]]
  jax.tree.map(np.testing.assert_array_equal, found, arrays)


def test_parts_of_something_else_are_refused(tmp_path):
  settings = {'parameters': 'abc', 'settings': {'bits': 4, 'layers': ('a',)}}
  partial.Store(tmp_path / 'parts', settings)
  partial.Store(tmp_path / 'parts', settings)
  with pytest.raises(ValueError, match='another quantization') as error:
    partial.Store(tmp_path / 'parts', settings | {'parameters': 'abd'})
  for part in ("parameters: 'abc' there, 'abd' now", '--out', 'remove'):
    assert part in str(error.value)
  assert 'settings' not in str(error.value).split('\n')[1]


def test_what_a_killed_process_was_writing_is_removed(tmp_path):
  store = partial.Store(tmp_path / 'parts', {})
  (tmp_path / 'parts' / 'scales.npz.tmp').write_bytes(b'half')
  assert not store.has('scales')
  partial.Store(tmp_path / 'parts', {})
  assert [p.name for p in (tmp_path / 'parts').iterdir()] == ['settings.json']


def test_a_damaged_part_is_told(tmp_path):
  store = partial.Store(tmp_path / 'parts', {})
  store.save('scales', {'a': np.arange(100)}, None)
  file = tmp_path / 'parts' / 'scales.npz'
  file.write_bytes(file.read_bytes()[:200])
  with pytest.raises(ValueError, match=r'scales\.npz is damaged'):
    store.load('scales')


def test_it_can_be_removed(tmp_path):
  partial.Store(tmp_path / 'parts', {}).remove()
  assert not (tmp_path / 'parts').exists()
