"""Noise against jax's own generator, whole, stacked and split over devices."""

import jax
from jax import numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from qat import hlo
from qat.zo import noise


def data(seed: int) -> jax.Array:
  return jax.random.key_data(jax.random.key(seed))


@pytest.mark.parametrize('shape', [(), (5,), (3, 7), (2, 3, 5), (257, 129)])
def test_the_numbers_are_those_of_jax(shape):
  z, bits = noise.normal(data(3), shape)
  # Other compilers may round the last bit of the inverse otherwise.
  np.testing.assert_allclose(
    z, jax.random.normal(jax.random.key(3), shape), rtol=3e-7
  )
  assert (z.dtype, bits.dtype, bits.shape) == (jnp.float32, jnp.uint32, shape)


def test_a_stack_has_the_noise_of_its_layers():
  keys = jnp.stack([data(1), data(2), data(1)])
  z_LKN, bits_LKN = noise.normal(keys, (3, 4, 5))
  for i in range(3):
    z_KN, bits_KN = noise.normal(keys[i], (4, 5))
    np.testing.assert_array_equal(z_LKN[i], z_KN)
    np.testing.assert_array_equal(bits_LKN[i], bits_KN)
  assert not np.array_equal(z_LKN[0], z_LKN[1])


def test_bits_are_uniform_and_tell_nothing_about_the_noise():
  n = 1 << 18
  z, bits = noise.normal(data(0), (n,))
  z, u = np.float64(z), np.float64(bits) / 2**32
  assert abs(z.mean()) < 4 / n**0.5
  assert abs(np.square(z).mean() - 1) < 4 * (2 / n) ** 0.5
  counts = np.histogram(u, 64, (0, 1))[0]
  chi_squared = np.square(counts - n / 64).sum() / (n / 64)
  assert abs(chi_squared - 63) < 4 * (2 * 63) ** 0.5
  for of_z in (z, np.abs(z), np.square(z)):
    assert abs(np.corrcoef(of_z, u)[0, 1]) < 4 / n**0.5


@pytest.mark.parametrize(
  'spec', [P('fsdp', None), P(None, 'fsdp'), P('data', 'fsdp')]
)
def test_each_device_makes_its_own_part(spec):
  mesh = jax.make_mesh(
    (2, 4), ('data', 'fsdp'), axis_types=(jax.sharding.AxisType.Auto,) * 2
  )
  shape = (16, 24)
  whole = noise.normal(data(5), shape)
  split = jax.jit(
    noise.normal,
    static_argnums=1,
    out_shardings=NamedSharding(mesh, spec),
  )
  for a, b in zip(whole, split(data(5), shape), strict=True):
    np.testing.assert_array_equal(a, b)
  text = split.lower(data(5), shape).compile().as_text()
  assert not hlo.collectives(text)


def test_nothing_is_stored_where_noise_is_added():
  w = jax.ShapeDtypeStruct((256, 256), jnp.float32)

  def add(w, key_data):
    return w + noise.normal(key_data, w.shape)[0]

  analysis = (
    jax.jit(add, donate_argnums=0).lower(w, data(0)).compile().memory_analysis()
  )
  assert analysis.alias_size_in_bytes == 4 * 256 * 256
  assert analysis.temp_size_in_bytes < 1024


def test_more_numbers_than_a_key_has_are_refused():
  with pytest.raises(ValueError, match=r'\(65537, 65536\).*2\*\*32'):
    jax.eval_shape(lambda: noise.normal(data(0), (65537, 65536)))
