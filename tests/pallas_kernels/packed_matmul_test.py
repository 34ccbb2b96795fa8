"""Every implementation of the packed product against float64 and loops."""

import dataclasses
import functools

import hypothesis
from hypothesis import strategies as st
import jax
from jax import numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from pallas_kernels import dispatch
from pallas_kernels import packing
from pallas_kernels import slow
from pallas_kernels.packed_matmul import api
from pallas_kernels.packed_matmul import reference
from pallas_kernels.packed_matmul import tpu
from tests.pallas_kernels import forms

TPU_ROW = dispatch.rows_for('packed_matmul', forms.V5E)[0]

IMPLEMENTATIONS = forms.of(reference.packed_matmul, tpu.packed_matmul)


def draw(seed, format, rows, inputs, outputs, columns=False):
  """Int8 inputs with their scales, codes, and the codes packed."""
  rng = np.random.default_rng(seed)
  _, base, step, low = packing.FORMATS[format]
  low = -128 if format == 'int8' else low
  codes = rng.integers(0, base, (inputs, outputs)) * step + low
  x = rng.integers(-127, 128, (rows, inputs)).astype(np.int8)
  x_scale = rng.uniform(0.1, 1, (rows, 1)).astype(np.float32)
  shape = (1, outputs if columns else 1)
  scale = rng.uniform(0.1, 1, shape).astype(np.float32)
  packed = packing.pack(
    jnp.asarray(codes, jnp.int8), jnp.asarray(scale), format
  )
  return jnp.asarray(x), jnp.asarray(x_scale), codes, packed


@pytest.mark.parametrize('name', IMPLEMENTATIONS)
@hypothesis.settings(max_examples=3)
@hypothesis.given(
  st.sampled_from(TPU_ROW.formats),
  st.integers(1, 300),
  st.integers(1, 2100),
  st.integers(1, 300),
  st.booleans(),
  st.integers(0, 2**32 - 1),
)
@hypothesis.example('1bit', 257, 1025, 257, True, 0)
@hypothesis.example('int8', 1, 2049, 129, False, 0)
def test_sums_of_codes_are_exact_and_scaled(
  name, format, rows, inputs, outputs, columns, seed
):
  x, x_scale, codes, packed = draw(seed, format, rows, inputs, outputs, columns)
  ones = dataclasses.replace(packed, scale=jnp.ones((1, 1)))

  @jax.jit
  def run(x, packed, ones, x_scale):
    multiply = IMPLEMENTATIONS[name]
    sums = multiply(x, ones, jnp.ones_like(x_scale), jnp.float32)
    return sums, multiply(x, packed, x_scale, jnp.bfloat16)

  sums, y = run(x, packed, ones, x_scale)
  assert sums.shape == y.shape == (rows, outputs)
  assert sums.dtype == jnp.float32 and y.dtype == jnp.bfloat16
  exact = slow.matmul(x, codes, 1, 1)
  np.testing.assert_array_equal(sums, exact.astype(np.float32))
  want = slow.matmul(x, codes, x_scale, packed.scale)
  np.testing.assert_allclose(np.float32(y), want, rtol=2**-8, atol=1e-30)


@pytest.mark.parametrize('name', IMPLEMENTATIONS)
@pytest.mark.parametrize('format', ['1bit', 'int4'])
def test_bfloat16_inputs_are_summed_in_float32(name, format):
  _, _, codes, packed = draw(1, format, 1, 1500, 150, True)
  x = np.random.default_rng(2).normal(size=(9, 1500))
  x = jnp.asarray(x, jnp.bfloat16)
  run = jax.jit(functools.partial(IMPLEMENTATIONS[name], out_dtype=jnp.float32))
  y = run(x, packed, jnp.ones((9, 1)))
  x64 = np.float64(x)
  want = slow.matmul(x64, codes, 1, packed.scale)
  # What is summed, and subtracted again, is as large as the largest index.
  size = np.abs(x64).sum(1, keepdims=True) * (np.abs(codes).max() + 1)
  assert np.all(np.abs(y - want) <= 1e-6 * size * np.asarray(packed.scale))


def test_a_stack_of_layers_under_jit_and_vmap():
  x, x_scale, codes, one = draw(0, '1bit', 8, 1024, 256)
  packed = jax.tree.map(lambda a: jnp.stack([a, 2 * a + 1]), one)
  run = jax.jit(
    jax.vmap(
      lambda p: tpu.packed_matmul(
        x, p, x_scale, jnp.float32, forms.V5E, interpret=True
      )
    )
  )
  y_LMN = run(packed)
  want_LKN = packing.unpack(packed)
  for y_MN, codes_KN, scale in zip(y_LMN, want_LKN, packed.scale, strict=True):
    want = slow.matmul(x, codes_KN, x_scale, scale)
    np.testing.assert_allclose(y_MN, want, rtol=1e-6)


def test_sharded_inputs_and_outputs():
  x, x_scale, codes, packed = draw(0, '2bit', 16, 512, 512, True)
  mesh = jax.make_mesh(
    (2, 2),
    ('data', 'model'),
    axis_types=(jax.sharding.AxisType.Auto,) * 2,
    devices=jax.devices()[:4],
  )

  def local(x, data, scale, x_scale):
    mine = packing.Packed(data, scale, '2bit', 512, data.shape[1], -2, 128)
    return tpu.packed_matmul(
      x, mine, x_scale, jnp.float32, forms.V5E, interpret=True
    )

  y = jax.jit(
    jax.shard_map(
      local,
      mesh=mesh,
      in_specs=(P('data'), P(None, 'model'), P(None, 'model'), P('data')),
      out_specs=P('data', 'model'),
      check_vma=False,
    )
  )(x, packed.data, packed.scale, x_scale)
  want = slow.matmul(x, codes, x_scale, packed.scale)
  np.testing.assert_allclose(y, want, rtol=1e-6)


def test_the_simulator_of_a_tpu_finds_no_race():
  x, x_scale, codes, packed = draw(0, '1bit', 40, 2048, 300, True)
  y = forms.simulated(
    tpu.packed_matmul, x, packed, x_scale, jnp.float32, forms.V5E
  )
  want = slow.matmul(x, codes, x_scale, packed.scale)
  np.testing.assert_allclose(y, want, rtol=1e-6)


def test_the_reference_runs_unasked_where_nothing_faster_can():
  x, x_scale, codes, packed = draw(0, '1bit', 3, 100, 7)
  y = jax.jit(api.packed_matmul)(x, packed, x_scale_M1=x_scale)
  want = slow.matmul(x, codes, x_scale, packed.scale)
  np.testing.assert_allclose(y, want, rtol=1e-6)
  np.testing.assert_allclose(
    api.packed_matmul(x, packed), want / x_scale, rtol=1e-6
  )


@pytest.mark.parametrize(
  'change, message',
  [
    ({'implementation': 'fast'}, "has no 'fast'; one of"),
    ({'implementation': 'tpu'}, 'runs on tpu, not on cpu'),
    ({'x_MK': jnp.ones((2, 99), jnp.int8)}, r'want \[M, 100\]'),
    ({'x_MK': jnp.ones((2, 100), jnp.int32)}, 'x is int32'),
    ({'x_scale_M1': jnp.ones((3,))}, r'want \(2, 1\)'),
    ({'out_dtype': 'int8'}, 'out_dtype=int8; want float32 or bfloat16'),
  ],
)
def test_what_cannot_be_multiplied_is_an_error(change, message):
  x, _, _, packed = draw(0, '1bit', 2, 100, 7)
  with pytest.raises(ValueError, match=message):
    api.packed_matmul(**({'x_MK': x, 'packed': packed} | change))


def test_a_stack_is_multiplied_by_vmap_alone():
  x, _, _, packed = draw(0, '1bit', 2, 100, 7)
  with pytest.raises(ValueError, match='vmap'):
    api.packed_matmul(x, jax.tree.map(lambda a: a[None], packed))
