"""The mesh, the partition rules, and what splitting must not change."""

import importlib
import math

from hypothesis import given
from hypothesis import strategies as st
import jax
from jax import numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict
import numpy as np
import pytest

from configs import common
from qat import sharding
from qat import step as step_lib
from qat.nn import transformer
from qat.quant import weights
from tests import tiny

METHODS = (
  *('fp', 'bitnet', 'bitnet_b158', 'pquant'),
  *('onebit', 'lsq', 'paretoq', 'integer'),
)


def axes(data: int, fsdp: int) -> ConfigDict:
  return ConfigDict({'data': data, 'fsdp': fsdp})


@pytest.mark.parametrize(
  ('data', 'fsdp', 'devices', 'expected'),
  [
    (-1, 1, 8, (8, 1)),
    (1, -1, 8, (1, 8)),
    (-1, 4, 8, (2, 4)),
    (2, -1, 8, (2, 4)),
    (2, 4, 8, (2, 4)),
    (-1, 1, 1, (1, 1)),
  ],
)
def test_mesh_shape(data, fsdp, devices, expected):
  assert sharding.mesh_shape(axes(data, fsdp), devices) == expected


@given(st.integers(-9, 9), st.integers(-9, 9), st.integers(1, 16))
def test_a_mesh_uses_every_device_or_is_refused(data, fsdp, devices):
  fits = any(
    a * b == devices and (data in (-1, a)) and (fsdp in (-1, b))
    for a in range(1, devices + 1)
    for b in range(1, devices + 1)
  ) and (data, fsdp) != (-1, -1)
  try:
    found = sharding.mesh_shape(axes(data, fsdp), devices)
  except ValueError as error:
    assert not fits
    assert f'mesh.data={data}' in str(error)
    assert f'mesh.fsdp={fsdp}' in str(error)
    assert f'{devices} devices' in str(error)
  else:
    assert fits
    assert min(found) >= 1 and math.prod(found) == devices
    assert data in (-1, found[0]) and fsdp in (-1, found[1])


def test_a_mesh_has_the_devices_it_is_given():
  mesh = sharding.make_mesh(axes(-1, 2), jax.devices()[:4])
  assert mesh.shape == {'data': 2, 'fsdp': 2}
  assert list(mesh.devices.flat) == jax.devices()[:4]
  assert sharding.make_mesh(axes(-1, 1)).size == len(jax.devices())


def abstract_params(config: ConfigDict):
  config = config.copy_and_resolve_references().unlock()
  config.model.n_layers = 1  # All blocks have the same parameters.
  config.model.scan_layers = False  # Stacked: tests/nn/stacked_test.py.
  return transformer.abstract_params(transformer.build(config, 'cpu', 1))


@pytest.mark.parametrize('size', common.SIZES)
@pytest.mark.parametrize('method', METHODS)
def test_the_rules_cover_every_parameter_of_every_config(method, size):
  config = importlib.import_module(f'configs.{method}').get_config(size)
  variants = [{}, {'tied_embeddings': False, 'norm_shared': False}]
  if method == 'pquant':
    variants.append({'n_experts': 8})
  for fields in variants:
    config.model.update(fields)
    params = abstract_params(config)
    mesh = sharding.make_mesh(axes(1, 8))
    shardings = sharding.state_shardings(mesh, params, params)
    for (keys, leaf), where in zip(
      jax.tree_util.tree_leaves_with_path(params),
      jax.tree.leaves(shardings),
      strict=True,
    ):
      path = jax.tree_util.keystr(keys)
      # Every matrix is split, along the axis of width d_model, evenly; what
      # its quantizer learns is small.
      shard = where.shard_shape(leaf.shape)
      if leaf.ndim < 2 or 'learned_scale' in path:
        assert shard == leaf.shape, path
      else:
        axis = where.spec.index('fsdp')
        assert leaf.shape[axis] == config.model.d_model, path
        assert math.prod(shard) * 8 == leaf.size, path


def test_a_parameter_without_a_rule_is_refused():
  params = {'block_0': {'conv': {'filter': jax.ShapeDtypeStruct((4,), 'f4')}}}
  mesh = sharding.make_mesh(axes(1, 8))
  with pytest.raises(ValueError, match="'block_0/conv/filter'.*RULES"):
    sharding.state_shardings(mesh, params, params)


@pytest.mark.parametrize(
  ('path', 'ndim', 'expected'),
  [
    ('embed/embedding', 2, P(None, 'fsdp')),
    ('head', 2, P(None, 'fsdp')),
    ('block_0/attn/q/kernel', 2, P('fsdp', None)),
    ('block_0/attn/o/kernel', 2, P(None, 'fsdp')),
    ('block_0/ffn/wide/down/kernel', 2, P(None, 'fsdp')),
    ('block_0/ffn/narrow/up/kernel', 2, P('fsdp', None)),
    ('blocks/attn/q/kernel', 3, P(None, 'fsdp', None)),
    ('blocks/ffn/narrow/up/kernel', 3, P(None, 'fsdp', None)),
    ('blocks/ffn/narrow/down/kernel', 4, P(None, None, None, 'fsdp')),
    ('blocks/ffn/alpha', 1, P(None)),
    ('block_0/ffn/narrow/up/kernel', 3, P(None, 'fsdp', None)),
    ('block_0/ffn/narrow/down/kernel', 3, P(None, None, 'fsdp')),
    ('block_0/ffn/narrow/down/norm/scale', 1, P()),
    ('block_0/ffn/alpha', 0, P()),
    ('positions', 2, P(None, 'fsdp')),
    ('block_0/attn/q/bias', 1, P()),
    ('block_0/attn/q/kernel/codes', 2, P()),
    ('blocks/ffn/wide/down/kernel/parts/0/scale', 3, P(None)),
    ('block_0/attn/q/learned_scale', 2, P()),
    ('block_0/attn/q/gain_in', 1, P()),
    ('block_0/attn/q/clip_high', 2, P()),
    ('blocks/attn/q/clip_low', 3, P(None)),
    ('block_0/ffn/narrow/up/gain_out', 2, P()),
  ],
)
def test_partition_spec(path, ndim, expected):
  assert sharding.partition_spec(path, ndim) == expected


@pytest.mark.parametrize('method', ['fp', 'pquant4'])
def test_moments_are_split_like_their_parameters(method):
  config = tiny.config(method, {'mesh.data': 2, 'mesh.fsdp': 4})
  mesh = tiny.mesh(config, 8)
  model = transformer.build(config, 'cpu', 8)
  with jax.set_mesh(mesh):
    state = step_lib.abstract_state(step_lib.initial_state(config, model), mesh)
  adam = state.opt_state.inner_state[1]

  def spec(leaf):
    return leaf.sharding.spec

  assert (
    jax.tree.map(spec, state.params)
    == jax.tree.map(spec, adam.mu)
    == jax.tree.map(spec, adam.nu)
  )
  assert any('fsdp' in s for s in map(spec, jax.tree.leaves(adam.mu)))
  others = [state.step, state.rng, state.healthy, adam.count]
  others += [state.opt_state.count, *state.opt_state.hyperparams.values()]
  for leaf in others:
    assert spec(leaf) == P()


@pytest.mark.parametrize(
  'fields', [{'data': 8, 'fsdp': 1}, {'data': 2, 'fsdp': 4}]
)
def test_over_batch_adds_up_values_and_gradients(fields):
  mesh = sharding.make_mesh(axes(**fields))

  def f(x_BD, w_D):
    return jnp.sum(jnp.sin(x_BD * w_D[None]) ** 2)

  rng = np.random.default_rng(0)
  x_BD = jnp.asarray(rng.standard_normal((16, 5)), jnp.float32)
  w_D = jnp.asarray(rng.standard_normal(5), jnp.float32)
  split = sharding.over_batch(mesh, f, (True, False))

  def both(f):
    return jax.jit(jax.value_and_grad(f, argnums=(0, 1)))

  found = both(split)(
    jax.device_put(x_BD, NamedSharding(mesh, sharding.BATCH)), w_D
  )
  for a, b in zip(
    jax.tree.leaves(found), jax.tree.leaves(both(f)(x_BD, w_D)), strict=True
  ):
    np.testing.assert_allclose(a, b, rtol=1e-5)


def test_over_batch_leaves_a_function_on_one_device_alone():
  def f(x):
    return jnp.sum(x)

  mesh = sharding.make_mesh(axes(1, 1), jax.devices()[:1])
  assert sharding.over_batch(mesh, f, (True,)) is f


@pytest.mark.parametrize('spec', [P('fsdp', None), P(None, 'fsdp')])
@pytest.mark.parametrize('name', weights.QUANTIZERS)
def test_a_split_matrix_has_the_scale_of_the_whole(name, spec):
  mesh = sharding.make_mesh(axes(1, 8))
  rng = np.random.default_rng(0)
  # Slices of different magnitude and mean: their own scales would differ.
  w_KN = rng.standard_normal((32, 16)) + np.linspace(-2, 2, 16)
  w_KN = (w_KN * np.linspace(1, 4, 32)[:, None]).astype(np.float32)
  split = jax.device_put(w_KN, NamedSharding(mesh, spec))
  assert split.addressable_shards[0].data.size * 8 == w_KN.size
  quantize = jax.jit(lambda w: weights.QUANTIZERS[name](w, 'tensor'))
  found, expected = quantize(split), quantize(w_KN)
  np.testing.assert_allclose(found.scale, expected.scale, rtol=1e-6)
  np.testing.assert_array_equal(found.codes, expected.codes)
