"""Model folders: what is saved is loaded, and damage is named."""

import json

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from qat import manifest
from qat.interop import folder as folder_lib
from qat.quant import composed
from qat.quant import weights
from tests import tiny

RNG = np.random.default_rng(0)
W_KN = jnp.asarray(RNG.normal(size=(24, 16)), jnp.float32)


def int4(w_KN):
  return weights.QUANTIZERS['int4'](w_KN, 'channel', 0)


PARAMS = {
  'block_0': {
    'attn': {
      'q': {'kernel': W_KN, 'bias': jnp.ones((16,), jnp.bfloat16)},
      'k': {'kernel': int4(W_KN)},
      'v': {'kernel': composed.Sum((int4(W_KN), int4(W_KN + 1)))},
    }
  },
  'embed': {'embedding': W_KN.astype(jnp.float16)},
  'head': W_KN + 2,
}


def save(path, tokenizer, params=PARAMS, **changes):
  options = dict(begin=1, end=0, source={'name': 'x', 'n': [1]}) | changes
  leaves = folder_lib.flat(params).items()
  folder_lib.save(path, tiny.config('fp'), leaves, tokenizer, **options)
  return path


@pytest.fixture
def saved(tmp_path, tokenizer):
  return save(tmp_path / 'model', tokenizer)


def rewrite(path, change):
  """Changes a manifest as somebody who also knows how to hash it."""
  content = json.loads((path / manifest.FILE).read_text())['manifest']
  change(content)
  manifest.write(path, content)


@pytest.mark.parametrize('shard_bytes', [1, 3000, 1 << 20])
def test_what_is_saved_is_loaded(tmp_path, tokenizer, shard_bytes):
  path = save(tmp_path / 'model', tokenizer, shard_bytes=shard_bytes)
  shards = sorted(p.name for p in path.glob('params-*'))
  assert len(shards) == {1: 6, 3000: 2, 1 << 20: 1}[shard_bytes]
  folder = folder_lib.open_folder(path)
  assert folder.config == tiny.config('fp')
  assert (folder.begin, folder.end) == (1, 0)
  assert folder.source == {'name': 'x', 'n': [1]}
  assert folder.tokenizer.to_str() == tokenizer.to_str()
  found = folder_lib.nested(dict(folder_lib.leaves(folder)))
  assert jax.tree.structure(found) == jax.tree.structure(PARAMS)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(PARAMS), strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a, b)
  assert composed.is_quantized(found['block_0']['attn']['k']['kernel'])


def test_quantized_leaves_are_stored_packed(tmp_path, tokenizer):
  big = {'head': int4(jnp.asarray(RNG.normal(size=(512, 512)), jnp.float32))}
  path = save(tmp_path / 'model', tokenizer, big)
  size = (path / 'params-00001.safetensors').stat().st_size
  assert size < 512 * 512 / 2 + 512 * 4 + 1000


def test_leaves_are_taken_one_by_one(tmp_path, tokenizer):
  # So that a model need not be in memory as a whole.
  out = tmp_path / 'model'
  seen = []

  def leaves():
    for i in range(4):
      partial = out.with_name('model.partial')
      seen.append(len(list(partial.glob('params-*'))))
      yield f'block_{i}/x', np.zeros((100,), np.float32)

  folder_lib.save(
    out,
    tiny.config('fp'),
    leaves(),
    tokenizer,
    begin=0,
    end=0,
    source={},
    shard_bytes=800,
  )
  assert seen == [0, 0, 0, 1]


def test_flat_and_nested():
  flat = folder_lib.flat(PARAMS)
  assert list(flat) == [
    'block_0/attn/k/kernel',
    'block_0/attn/q/bias',
    'block_0/attn/q/kernel',
    'block_0/attn/v/kernel',
    'embed/embedding',
    'head',
  ]
  assert flat['head'] is PARAMS['head']
  assert folder_lib.nested(flat).keys() == PARAMS.keys()


def test_nothing_is_left_of_a_save_that_failed(tmp_path, tokenizer):
  def leaves():
    yield 'a', np.zeros((3,), np.float32)
    yield 'a', np.zeros((3,), np.float32)

  options = dict(begin=0, end=0, source={})
  for wrong, message in ((leaves(), "path 'a'"), (iter(()), 'single param')):
    with pytest.raises(ValueError, match=message):
      folder_lib.save(
        tmp_path / 'model', tiny.config('fp'), wrong, tokenizer, **options
      )
  assert not list(tmp_path.iterdir())


def test_a_folder_is_not_overwritten(saved, tokenizer):
  with pytest.raises(FileExistsError, match='model exists already'):
    save(saved, tokenizer)


NAMES = (
  'config.json',
  'tokenizer.json',
  'params-00001.safetensors',
  'manifest.json',
)


def read(path):
  return dict(folder_lib.leaves(folder_lib.open_folder(path)))


@pytest.mark.parametrize('name', NAMES)
def test_a_missing_file_is_named(saved, name):
  (saved / name).unlink()
  with pytest.raises(FileNotFoundError, match=f'{name} is missing'):
    read(saved)


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('kind', ['flipped', 'cut', 'empty'])
def test_a_damaged_file_is_named(saved, name, kind):
  content = bytearray((saved / name).read_bytes())
  content[len(content) // 2] ^= 1
  changed = {'flipped': content, 'cut': content[:-3], 'empty': b''}[kind]
  (saved / name).write_bytes(changed)
  with pytest.raises(manifest.CorruptError, match=name):
    read(saved)


def test_a_newer_format_is_refused(saved):
  rewrite(saved, lambda content: content.update(format=2))
  with pytest.raises(ValueError, match='has format 2.*reads up to 1'):
    read(saved)


@pytest.mark.parametrize('name', ['../x.safetensors', 'x', '/etc/passwd'])
def test_a_manifest_names_no_other_file(saved, name):
  def change(content):
    for leaf in content['leaves'].values():
      leaf['file'] = name
    content['files'][name] = content['files'].pop('params-00001.safetensors')

  rewrite(saved, change)
  with pytest.raises(manifest.CorruptError, match='manifest.json is damaged'):
    read(saved)


@pytest.mark.parametrize('lost', ['leaves', 'files', 'begin', 'format'])
def test_a_manifest_that_lacks_something(saved, lost):
  rewrite(saved, lambda content: content.pop(lost))
  with pytest.raises(manifest.CorruptError, match='manifest.json is damaged'):
    read(saved)


def test_another_kind_of_folder(tmp_path):
  with pytest.raises(FileNotFoundError, match='no model folder.*import_model'):
    folder_lib.open_folder(tmp_path)
