"""The packed product of the C++ extension, each variant against NumPy."""

import dataclasses
import functools

import hypothesis
from hypothesis import strategies as st
import jax
from jax import numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch
from pallas_kernels import native
from pallas_kernels import packing
from pallas_kernels.packed_matmul import api
from pallas_kernels.packed_matmul import cpu
from tests import jaxprs

CPU = dispatch.Target('cpu')
FORMATS = ('1bit', '2bit', 'int4', 'int8')
pytestmark = pytest.mark.skipif(
  not native.variants(), reason=f'the C++ extension is {native.status()}'
)


def draw(seed, format, rows, inputs, outputs):
  """Int8 inputs, codes, and the codes packed for the extension."""
  rng = np.random.default_rng(seed)
  _, base, step, low = packing.FORMATS[format]
  low = -128 if format == 'int8' else low
  codes = rng.integers(0, base, (inputs, outputs)) * step + low
  x = rng.integers(-128, 128, (rows, inputs))
  x[:1], codes[:, :1] = -128, low  # The largest sums there are.
  scale = jnp.asarray(rng.uniform(0.1, 1, (1, outputs)), jnp.float32)
  packed = packing.pack(
    jnp.asarray(codes, jnp.int8), scale, format, axis=-1, block=cpu.BLOCK
  )
  return jnp.asarray(x, jnp.int8), codes, packed


@hypothesis.settings(max_examples=6)
@hypothesis.given(
  st.sampled_from(FORMATS),
  st.integers(1, 11),
  st.integers(1, 1300),
  st.integers(1, 70),
  st.integers(0, 2**32 - 1),
)
@hypothesis.example('1bit', 3, 1024, 1, 0)
@hypothesis.example('2bit', 1, 513, 33, 0)
@hypothesis.example('int4', 7, 8192, 2, 0)
@hypothesis.example('int8', 7, 8192, 2, 0)
@hypothesis.example('int8', 1, 2**17 - 1, 1, 0)  # Sums of indices pass 2^31.
@hypothesis.example('1bit', 4, 4096, 600, 0)  # Enough for several threads.
def test_sums_are_exact(format, rows, inputs, outputs, seed):
  x, codes, packed = draw(seed, format, rows, inputs, outputs)
  for variant in native.variants():
    found = cpu.sums(x, packed, variant)
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, np.int64(x) @ codes)


@pytest.mark.parametrize('format', FORMATS)
@pytest.mark.parametrize('rows', [1, 3, 8])
def test_several_matrices_are_multiplied_as_each_alone(format, rows):
  # The last is wide enough for several threads, whose columns are of two.
  inputs, widths = 1000, (33, 1, 70, 2050)
  x, _, _ = draw(0, format, rows, inputs, 1)
  made = [draw(n, format, rows, inputs, n)[1:] for n in widths]
  several = [packed for _, packed in made]
  for variant in native.variants():
    found = cpu.several_sums(x, several, variant)
    for y_MN, (codes, packed) in zip(found, made, strict=True):
      np.testing.assert_array_equal(y_MN, np.int64(x) @ codes)
      np.testing.assert_array_equal(y_MN, cpu.sums(x, packed, variant))
  x_scale = jnp.linspace(0.1, 1, rows)[:, None]
  products = api.several(x, several, x_scale_M1=x_scale)
  for y_MN, packed in zip(products, several, strict=True):
    alone = api.packed_matmul(x, packed, x_scale_M1=x_scale)
    np.testing.assert_array_equal(y_MN, alone)


def test_matrices_of_one_format_and_input_are_one_call():
  def calls(several, rows):
    x = jnp.zeros((rows, 70), jnp.int8)
    return jaxprs.count('ffi_call', lambda x: api.several(x, several), x)

  _, _, binary = draw(0, '1bit', 1, 70, 5)
  _, _, ternary = draw(0, '2bit', 1, 70, 5)
  assert calls([binary] * 3, 1) == 1
  assert calls([binary, ternary], 1) == 2
  with pytest.raises(ValueError, match='want them of one format'):
    cpu.several_sums(jnp.zeros((1, 70), jnp.int8), [binary, ternary])
  with pytest.raises(ValueError, match=r'x has shape \(2, 70\); the weights'):
    _, _, other = draw(0, '1bit', 1, 71, 5)
    calls([binary, other], 2)


def test_a_weight_that_is_packed_for_another_width_is_refused():
  x, _, binary = draw(0, '1bit', 1, 70, 5)
  _, _, wide = draw(0, '1bit', 1, 513, 5)
  other = dataclasses.replace(binary, block=128)
  with pytest.raises(ValueError, match='want axis -1 and block 64'):
    cpu.several_sums(x, [binary, other])
  with pytest.raises(Exception, match='w is not packed for the width of x'):
    jax.block_until_ready(cpu.several_sums(x, [binary, wide]))


@pytest.mark.parametrize('format', FORMATS)
def test_the_table_takes_it_and_it_is_the_reference(format):
  x, _, packed = draw(0, format, 5, 700, 40)
  x_scale = jnp.linspace(0.1, 1, 5)[:, None]
  found, expected = (
    jax.jit(functools.partial(api.packed_matmul, implementation=name))(
      x, packed, x_scale_M1=x_scale
    )
    for name in (None, 'reference')
  )
  call = dispatch.Call(CPU, 'int8', 5, format, -1, cpu.BLOCK)
  assert dispatch.choose('packed_matmul', call) == 'cpu'
  np.testing.assert_array_equal(found, expected)


def test_a_stack_is_its_matrices_one_by_one():
  x, codes, _ = draw(0, '1bit', 3, 600, 3 * 8)
  codes_EKN = jnp.asarray(codes, jnp.int8).reshape(600, 3, 8).swapaxes(0, 1)
  packed = packing.pack(
    codes_EKN, jnp.ones((3, 1, 1)), '1bit', axis=-1, block=cpu.BLOCK
  )
  expected = np.int64(x) @ np.int64(codes_EKN)
  found = jax.vmap(cpu.sums, (None, 0))(x, packed)
  np.testing.assert_array_equal(found, expected)
  turned = jax.tree.map(lambda a: a[::-1], packed)
  two = jax.vmap(lambda *several: cpu.several_sums(x, several))(packed, turned)
  for found, value in zip(two, (expected, expected[::-1]), strict=True):
    np.testing.assert_array_equal(found, value)


@pytest.mark.parametrize(
  'change, reason',
  [
    (dict(block=128), 'blocks of 128 bytes'),
    (dict(axis=-2), 'axis -2'),
    (dict(format='base3'), "weights are 'base3'"),
    (dict(dtype='bfloat16'), 'activations are bfloat16'),
    (dict(target=dispatch.Target('tpu', 'v5e')), 'runs on cpu'),
  ],
)
def test_what_it_cannot_do_is_named(change, reason):
  call = dict(
    target=CPU, dtype='int8', rows=1, format='1bit', axis=-1, block=cpu.BLOCK
  )
  with pytest.raises(ValueError, match=reason):
    dispatch.choose('packed_matmul', dispatch.Call(**call | change), 'cpu')


def test_without_the_extension_the_table_goes_on(monkeypatch):
  monkeypatch.setattr(native, 'variants', lambda: ())
  monkeypatch.setattr(native, 'status', lambda: 'absent: no compiler')
  call = dispatch.Call(CPU, 'int8', 1, '1bit', -1, cpu.BLOCK)
  assert dispatch.choose('packed_matmul', call) == 'reference'
  with pytest.raises(ValueError, match='extension is absent: no compiler'):
    dispatch.choose('packed_matmul', call, 'cpu')
