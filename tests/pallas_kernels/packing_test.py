"""Packed bytes against loops in NumPy, and back."""

import hypothesis
from hypothesis import strategies as st
import jax
from jax import numpy as jnp
import numpy as np
import pytest

from pallas_kernels import packing
from pallas_kernels import slow

FORMATS = list(packing.FORMATS)


def draw_codes(rng, format, shape):
  _, base, step, low = packing.FORMATS[format]
  if format == 'int8':
    low = -128
  return (rng.integers(0, base, shape) * step + low).astype(np.int8)


def scale_of(codes):
  return jnp.ones((*codes.shape[:-2], 1, 1), jnp.float32)


@hypothesis.settings(max_examples=12)
@hypothesis.given(
  st.sampled_from(FORMATS),
  st.integers(1, 70),
  st.integers(1, 9),
  st.sampled_from([1, 3, 4, 32]),
  st.sampled_from([1, 4]),
  st.integers(0, 2**32 - 1),
)
def test_bytes_are_those_of_the_loops_and_come_back(
  format, inputs, outputs, block, multiple, seed
):
  codes = draw_codes(np.random.default_rng(seed), format, (inputs, outputs))
  want = slow.pack(codes, format, block, multiple)
  for axis in (-2, -1):
    packed = packing.pack(
      jnp.asarray(codes),
      scale_of(codes),
      format,
      axis=axis,
      block=block,
      multiple=multiple,
    )
    data = np.asarray(packed.data)
    np.testing.assert_array_equal(data if axis == -2 else data.T, want)
    assert packed.padded_inputs % (packing.FORMATS[format].planes * block) == 0
    assert 0 <= packed.padded_outputs - outputs < multiple
    np.testing.assert_array_equal(packing.unpack(packed), codes)
  np.testing.assert_array_equal(
    slow.unpack(want, format, block, inputs, outputs), codes
  )


@pytest.mark.parametrize('format', FORMATS)
def test_a_stack_is_packed_matrix_by_matrix_under_jit_and_vmap(format):
  codes = draw_codes(np.random.default_rng(0), format, (2, 3, 50, 6))
  scale = jnp.ones((2, 3, 1, 6), jnp.float32)
  packed = jax.jit(packing.pack, static_argnames=('format', 'axis', 'block'))(
    jnp.asarray(codes), scale, format=format, axis=-1, block=4
  )
  assert packed.data.shape[:3] == (2, 3, 6)
  np.testing.assert_array_equal(
    packed.data[1, 2].T, slow.pack(codes[1, 2], format, 4)
  )
  unpack = jax.jit(jax.vmap(jax.vmap(packing.unpack)))
  np.testing.assert_array_equal(unpack(packed), codes)
  assert unpack(packed).dtype == jnp.int8


def test_bytes_of_a_matrix():
  codes = jnp.ones((5120, 256), jnp.int8)
  want = {'1bit': 640, '2bit': 1280, 'base3': 1024, 'int4': 2560, 'int8': 5120}
  for format, rows in want.items():
    block = 64 if format == 'base3' else 128
    packed = packing.pack(codes, scale_of(codes), format, block=block)
    assert packed.data.shape == (rows, 256)
    assert packed.padded_inputs == 5120


def test_another_layout_has_the_same_weights():
  codes = draw_codes(np.random.default_rng(0), 'base3', (77, 5))
  stored = packing.pack(jnp.asarray(codes), scale_of(codes), 'base3', block=1)
  loaded = packing.repack(stored, '2bit', axis=-1, block=32, multiple=4)
  assert loaded.data.shape == (8, 32)
  np.testing.assert_array_equal(packing.unpack(loaded), codes)
  np.testing.assert_array_equal(loaded.scale, stored.scale)
  assert packing.repack(loaded).format == '2bit'


def test_codes_outside_the_format_are_named():
  packing.check(jnp.array([[-1, 1]], jnp.int8), '1bit')
  for format, code in (('1bit', 0), ('2bit', 2), ('base3', -2), ('int4', 8)):
    codes = jnp.array([[-1, code]], jnp.int8)
    with pytest.raises(ValueError, match=f'{code} is no code of'):
      packing.check(codes, format)


@pytest.mark.parametrize(
  'change, message',
  [
    ({'format': 'int5'}, "No format 'int5'"),
    ({'axis': 0}, 'axis=0; want -2'),
    ({'codes': jnp.ones((3, 4), jnp.int32)}, 'int32'),
    ({'codes': jnp.ones((4,), jnp.int8)}, 'want int8'),
    ({'scale': jnp.ones((2, 4))}, 'not one for a group'),
  ],
)
def test_what_cannot_be_packed_is_an_error(change, message):
  arguments = {
    'codes': jnp.ones((8, 4), jnp.int8),
    'scale': jnp.ones((1, 1)),
    'format': '1bit',
  }
  with pytest.raises(ValueError, match=message):
    packing.pack(**(arguments | change))
