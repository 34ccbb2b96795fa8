"""Tests of qat.manifest: what a step says of itself, and refuses."""

import jax
import jax.numpy as jnp
import pytest

from qat import manifest


def written(path):
  leaves = manifest.named({'a': jnp.ones((2, 3)), 'step': jnp.int32(1)})
  body = manifest.make(7, leaves, {'at': [1, 2.5, None, 'é']})
  for leaf in body['leaves'].values():
    leaf['digest'] = '0' * 16
  path.mkdir(parents=True, exist_ok=True)
  manifest.write(path, body)
  return body


def test_reads_what_was_written(tmp_path):
  body = written(tmp_path / '7')
  assert manifest.read(tmp_path / '7') == body
  assert body['leaves']['a']['shape'] == [2, 3]
  assert body['leaves']['step']['dtype'] == 'int32'


def test_every_flipped_bit_is_seen_or_is_white_space(tmp_path):
  body = written(tmp_path / '7')
  file = tmp_path / '7' / manifest.FILE
  whole = file.read_bytes()
  seen = 0
  for i in range(len(whole)):
    for bit in range(8):
      damaged = bytearray(whole)
      damaged[i] ^= 1 << bit
      file.write_bytes(damaged)
      try:
        assert manifest.read(tmp_path / '7') == body
      except manifest.CorruptError:
        seen += 1
  assert seen > 0.7 * 8 * len(whole)


@pytest.mark.parametrize(
  'text', ['', '[]', '{}', '{"manifest": 1}', '[' * 9999]
)
def test_junk_is_damage(tmp_path, text):
  written(tmp_path / '7')
  (tmp_path / '7' / manifest.FILE).write_text(text)
  with pytest.raises(manifest.CorruptError, match='damaged|own hash'):
    manifest.read(tmp_path / '7')


def test_another_steps_manifest_is_damage(tmp_path):
  written(tmp_path / '7')
  (tmp_path / '7').rename(tmp_path / '8')
  with pytest.raises(manifest.CorruptError, match='holds step 7'):
    manifest.read(tmp_path / '8')


def test_a_newer_format_is_refused_and_no_damage(tmp_path, monkeypatch):
  with monkeypatch.context() as newer:
    newer.setattr(manifest, 'FORMAT', manifest.FORMAT + 1)
    written(tmp_path / '7')
  with pytest.raises(ValueError, match='has format 2'):
    manifest.read(tmp_path / '7')


def test_lists_complete_steps_only(tmp_path):
  written(tmp_path / '7')
  (tmp_path / '9').mkdir()
  for name in ('07', '8.tmp', '6.corrupt', 'x', '٣'):
    (tmp_path / name).mkdir()
  assert manifest.steps(tmp_path) == [7]
  assert manifest.numbered(tmp_path) == [7, 9]
  assert manifest.numbered(tmp_path, '.tmp') == [8]
  assert manifest.numbered(tmp_path / 'nowhere') == []


def test_names_are_paths():
  tree = {'b': [jnp.int8(1), {'c-d': jnp.int8(2)}], 'a_1': (jnp.int8(3), None)}
  assert list(manifest.named(tree)) == ['a_1/0', 'b/0', 'b/1/c-d']


@pytest.mark.parametrize(
  ('tree', 'error', 'text'),
  [
    ({'a.b': jnp.int8(1)}, ValueError, r"'a\.b' cannot be named"),
    ({'a': {'b/c': jnp.int8(1)}}, ValueError, "'a/b/c' cannot be named"),
    ({'..': jnp.int8(1)}, ValueError, 'cannot be named'),
    (jnp.int8(1), ValueError, 'cannot be named'),
    ({'a': 1}, TypeError, "'a' is a int"),
    ({'a': jax.random.key(0)}, TypeError, "'a'.*key_data"),
    ({'a': jnp.zeros((0, 2))}, ValueError, "'a' of shape"),
    ({'a': None}, ValueError, 'without a single array'),
  ],
  ids=['dot', 'slash', 'parent', 'root', 'int', 'key', 'empty', 'none'],
)
def test_refuses_what_cannot_be_saved(tree, error, text):
  with pytest.raises(error, match=text):
    manifest.named(tree)


@pytest.mark.parametrize(
  'extra', [{'a': (1, 2)}, {1: 2}, {'a': float('nan')}, {'a': jnp.int32(1)}]
)
def test_refuses_what_json_would_change(extra):
  with pytest.raises((ValueError, TypeError)):
    manifest.make(1, {'a': jnp.int8(1)}, extra)


def test_the_difference_names_every_leaf(tmp_path):
  written(tmp_path / '7')
  body = manifest.read(tmp_path / '7')
  other = manifest.named({'a': jnp.ones((2, 4)), 'b': jnp.int8(1)})
  with pytest.raises(ValueError) as error:
    manifest.refuse_mismatch(tmp_path / '7', body, other, partial=False)
  assert (
    '3 leaves differ:\n'
    '  a: float32[2, 3] in the checkpoint, float32[2, 4] here\n'
    '  b: nothing in the checkpoint, int8[] here\n'
    '  step: int32[] in the checkpoint, nothing here\n'
  ) in str(error.value)
  with pytest.raises(ValueError, match='2 leaves differ'):
    manifest.refuse_mismatch(tmp_path / '7', body, other, partial=True)
  part = manifest.named({'step': jnp.int32(0)})
  manifest.refuse_mismatch(tmp_path / '7', body, part, partial=True)
