"""Quantized matrices in the tree of a training state, and in checkpoints."""

import json

import jax
from jax import numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from pallas_kernels import dispatch
from qat import carried
from qat import config as config_lib
from qat import finish
from qat import flops
from qat import health
from qat import restore
from qat import sharding
from qat.interop import folder
from qat.nn import capture
from qat.nn import stacked
from qat.nn import transformer
from qat.quant import composed
from qat.quant import packed
from qat.quant import packing
from qat.quant import qtensor
from qat.quant import rules as rules_lib
from tests import clean
from tests import starts
from tests import states
from tests import tiny

K = N = clean.WIDTH
_RNG = np.random.default_rng(0)


def integers(*shape: int, low: int = -8, high: int = 8) -> jax.Array:
  return jnp.asarray(_RNG.integers(low, high, shape), jnp.int8)


def floats(*shape: int) -> jax.Array:
  return jnp.asarray(_RNG.lognormal(0, 1, shape), jnp.float32)


def int4() -> qtensor.QTensor:
  return qtensor.QTensor(
    integers(K, N),
    floats(2, N),
    'int4',
    zero=integers(2, N),
    exact=jnp.zeros((K, N), jnp.bfloat16).at[3, 5].set(2.5),
  )


def levels() -> composed.Levels:
  codes = jnp.asarray(_RNG.integers(0, 8, (2, N)), jnp.uint8)
  return composed.Levels(codes, floats(2, 4), floats(2, 4), 3)


def signs() -> jax.Array:
  return jnp.where(integers(K, N) < 0, -1, 1).astype(jnp.int8)


def leaf(kind: str) -> composed.Quantized:
  """A matrix of every kind there is."""
  return {
    'QTensor': int4,
    'Sum': lambda: composed.Sum((int4(), int4())),
    'Clustered': lambda: composed.Clustered(
      integers(K, N),
      integers(K, N, low=0, high=3),
      floats(3, N),
      floats(3, 1),
      'int4',
    ),
    'MixedBits': lambda: composed.MixedBits(
      integers(K, N, low=-2, high=2),
      floats(2, N),
      floats(2, N),
      jnp.asarray([2, 3], jnp.int8),
      16,
    ),
    'Binarized': lambda: composed.Binarized(
      signs(), signs(), jnp.arange(K) < 3, floats(2, 7, N), 16
    ),
    'TwoLevel': lambda: composed.TwoLevel(
      integers(K, N), levels(), 'int4', floats(2, N)
    ),
    'PackedMatrix': lambda: packed.pack(
      qtensor.QTensor(integers(K, N), floats(1, N), 'int4'),
      dispatch.Target('cpu'),
    ),
  }[kind]()


def tree(kind: str):
  """Parameters of two blocks, each with a quantized matrix."""
  params = clean.params(clean.config())
  for i in range(2):
    params[f'block_{i}']['attn']['q']['kernel'] = leaf(kind)
  return params


@pytest.mark.parametrize('kind', [kind.__name__ for kind in composed.KINDS])
def test_a_checkpoint_brings_every_kind_back(kind, tmp_path):
  params = stacked.stacked(tree(kind))
  params = jax.tree.map(jnp.asarray, params)
  described = carried.describe(params)
  assert list(described) == ['blocks/attn/q/kernel']
  extra = {carried.EXTRA: described}
  with states.opened(tmp_path) as saver:
    saver.save(1, {'params': params}, extra)
  # All that follows knows only the model and what is on disk.
  found = carried.saved(tmp_path)
  assert found == described == json.loads(json.dumps(described))
  config = clean.config(model__scan_layers=True)
  shapes = transformer.abstract_params(transformer.build(config, 'cpu', 1))
  shapes = {'params': carried.with_shapes(shapes, found)}
  mesh = tiny.mesh(config, 8)
  where = sharding.state_shardings(mesh, shapes, shapes['params'])
  assert where['params']['blocks']['attn']['q']['kernel'] == jax.tree.map(
    lambda _: NamedSharding(mesh, P(None)),
    params['blocks']['attn']['q']['kernel'],
  )
  shapes = jax.tree.map(
    lambda s, w: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=w),
    shapes,
    where,
  )
  restored = restore.newest(tmp_path, shapes, partial=False, quarantine=False)
  assert states.same(restored.state['params'], params)


def test_the_newest_manifest_that_is_whole_describes_them(tmp_path):
  params = jax.tree.map(jnp.asarray, tree('QTensor'))
  described = carried.describe(params)
  with states.opened(tmp_path) as saver:
    for step in (1, 2):
      saver.save(step, {'params': params}, {carried.EXTRA: described})
  file = tmp_path / '2' / 'manifest.json'
  file.write_text(file.read_text()[:-9])
  assert carried.saved(tmp_path) == described
  assert carried.saved(tmp_path / 'nothing') == {}
  # A checkpoint from before there were any says nothing of them.
  with states.opened(tmp_path / 'old') as saver:
    saver.save(1, states.make(1), {'at': 1})
  assert carried.saved(tmp_path / 'old') == {}


def test_another_models_matrices_are_refused():
  described = carried.describe(tree('QTensor'))
  for fields in ({'model__n_layers': 1}, {'model__d_model': 16}):
    config = clean.config(**fields)
    shapes = transformer.abstract_params(transformer.build(config, 'cpu', 1))
    with pytest.raises(ValueError, match='block_[01]/attn/q/kernel'):
      carried.with_shapes(shapes, described)


def test_layers_are_stacked_where_they_are_of_one_form():
  params = tree('MixedBits')
  given = jax.tree.map(lambda leaf: leaf, params)
  made = stacked.stacked(given)
  assert states.same(stacked.unstacked(made), params)
  assert 'block_0' not in given  # Taken out.
  other = params | {'block_1': tree('QTensor')['block_1']}
  with pytest.raises(ValueError, match="block_0.'attn'..'q'..'kernel'"):
    stacked.stacked(other)
  shorter = clean.params(clean.config())['block_1']
  del shorter['attn']['q']
  with pytest.raises(ValueError, match='None'):
    stacked.stacked(clean.params(clean.config()) | {'block_1': shorter})
  assert stacked.stacked({'embed': 1}) == {'embed': 1}


@pytest.mark.parametrize(
  ('kind', 'bits'),
  [
    *(('QTensor', [4]), ('Sum', [4, 4]), ('Clustered', [4])),
    *(('MixedBits', [2]), ('Binarized', []), ('TwoLevel', [4])),
  ],
)
def test_codes_lie_as_many_to_a_byte_as_fit(kind, bits):
  before = jax.tree.map(np.asarray, leaf(kind))
  after = carried.packed({'kernel': before})['kernel']
  read = jax.jit(lambda leaf: leaf.dequantize())
  sizes = [
    read.lower(leaf).compile().memory_analysis().argument_size_in_bytes
    for leaf in (before, after)
  ]
  # Of int8, each of them had 8.
  assert sizes[0] - sizes[1] == sum(8 - b for b in bits) * K * N / 8
  np.testing.assert_array_equal(after.dequantize(), before.dequantize())
  starts.same(carried.unpacked(after), before)


@pytest.mark.parametrize('scan', [False, True])
def test_frozen_matrices_are_described_from_shapes(scan):
  fields = {
    'model.n_layers': 2,
    'model.scan_layers': scan,
    'quant.specs.integer.weight': 'lwc4',
    'quant.specs.integer.activation': 'int4_asym',
    'quant.specs.integer.granularity': 'channel',
  }
  config = tiny.config('integer', fields)
  assert carried.described_from_shapes(config)[1] == {}, 'All are trained.'
  light = {
    'optim.estimator': 'spsa',
    'optim.optimizer': 'sgd',
    'optim.clip_norm': 0.0,
    'zo.perturbed': r'.*/(q|v)/kernel',
  }
  config = tiny.config('integer', {**fields, **light})
  # How parameters are split changes nothing, and there is no mesh yet.
  split = tiny.config('integer', {**fields, **light, 'mesh.fsdp': 2})
  changed, described = carried.described_from_shapes(split)
  config_lib.check(changed, devices=2)
  rules = rules_lib.make_rules(changed.quant.rules, changed.quant.specs)
  made = {}
  spec = rules_lib.Spec('lwc4', 'int4_asym', 'channel')
  for path, layer in rules_lib.layers(clean.params(config)).items():
    weight = 'lwc4'
    if path[-2:] not in ('/q', '/v'):
      weight = 'none'
      whole = jax.tree.map(np.asarray, spec.quantize(layer))
      made[f'{path}/kernel'] = carried.packed({'kernel': whole})['kernel']
    found = rules.find(stacked.one_layer(path))
    assert (found.weight, found.activation) == (weight, 'int4_asym')
  assert len(made) == (5 if scan else 10)
  assert described == carried.describe(folder.nested(made))
  shapes = carried.with_shapes(carried.shapes(changed), described)
  layers = rules_lib.layers(shapes)
  for path, layer in layers.items():
    frozen = f'{path}/kernel' in described
    assert len(layer) == (1 if frozen else 3)
    if frozen:
      assert layer['kernel'].codes.dtype == jnp.int4


def test_what_a_run_says_of_them():
  config = clean.config()
  model = transformer.build(config, 'cpu', 1)
  params = tree('QTensor')
  plain = clean.params(config)
  # Bits are those of a file; the others of full precision count 16.
  matrices = [params[f'block_{i}']['attn']['q']['kernel'] for i in range(2)]
  size = K * N
  expected = 16 * 12 * size + sum(map(packing.stored_bits, matrices))
  found = finish.bits_per_weight(params, model.rules)
  assert found == pytest.approx(expected / (14 * size))
  assert finish.bits_per_weight(
    stacked.stacked(tree('QTensor')), model.rules
  ) == pytest.approx(found)
  assert flops.train_flops_per_token(
    config, params
  ) == flops.train_flops_per_token(config, plain)
  codes = health.codes(params, model.rules)
  assert health.measure(params, codes, model.rules) == {}
  paths = [
    record.path
    for record in capture.linear_records(
      model, params, np.zeros((1, 4), np.int32), full_precision=True
    )
  ]
  assert len(paths) == 12 and 'block_0/attn/q' not in paths
