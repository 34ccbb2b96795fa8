"""The whole model: causality, sizes, caches, sharding of parameters."""

import functools
import importlib

import jax
from jax import numpy as jnp
from ml_collections import ConfigDict
import numpy as np
import pytest

from configs import common
from configs import pquant
from qat import sharding
from qat.nn import kv_cache
from qat.nn import stacked
from qat.nn import transformer
from qat.quant import rules as rules_lib
from tests import tiny

METHODS = ('fp', 'bitnet', 'b158', 'pquant', 'pquant4')
TOKENS_BT = np.array([[3, 60, 0, 17, 31, 5], [9, 8, 7, 6, 5, 4]])


def build(method, devices=1, **fields):
  # The form that compiles fastest; the forms have tests of their own.
  fields = {'attention': 'xla', **fields}
  fields = {f'model.{key}': value for key, value in fields.items()}
  config = tiny.config(method, {**tiny.EXACT, 'model.n_layers': 2, **fields})
  return transformer.build(config, 'cpu', devices)


@functools.partial(jax.jit, static_argnums=0)
def logits(model, params, tokens_BT):
  return model.apply({'params': params}, tokens_BT, method='logits')[0]


def size(tree):
  return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize('method', METHODS)
def test_a_logit_depends_on_its_past_and_on_nothing_else(method):
  # Untied, so that a row of the embedding is the input of one position alone.
  model = build(method, n_layers=1, tied_embeddings=False)
  params = tiny.params(model)
  direction_V = np.random.default_rng(1).normal(size=64)

  @jax.jit
  @jax.grad
  def gradient(embedding_VD, t):
    changed = {**params, 'embed': {'embedding': embedding_VD}}
    return jnp.sum(logits(model, changed, TOKENS_BT[:1])[0, t] * direction_V)

  for t in range(6):
    by_token_VD = gradient(params['embed']['embedding'], t)
    reached = np.any(by_token_VD[TOKENS_BT[0]] != 0, axis=-1)
    np.testing.assert_array_equal(reached, np.arange(6) <= t)


def test_sequences_of_a_batch_do_not_see_each_other():
  model = build('pquant4', n_layers=1)
  params = tiny.params(model)
  other = np.stack([TOKENS_BT[0], TOKENS_BT[1][::-1]])
  np.testing.assert_allclose(
    logits(model, params, TOKENS_BT)[0],
    logits(model, params, other)[0],
    rtol=1e-5,
    atol=1e-5,
  )


@pytest.mark.parametrize(('method', 'n_layers'), [('fp', 2), ('pquant4', 1)])
def test_cached_decoding_is_the_full_forward_pass(method, n_layers):
  model = build(method, n_layers=n_layers)
  params = tiny.params(model)
  expected = logits(model, params, TOKENS_BT)
  empty = jnp.zeros((2, 8, 2, 16))
  caches = [kv_cache.Cache(empty, empty)] * n_layers
  step = jax.jit(
    lambda tokens_BT, caches, start: model.apply(
      {'params': params}, tokens_BT, caches, start, method='logits'
    )
  )
  start, found = 0, []
  for cut in (5, 1):
    y, caches = step(TOKENS_BT[:, start : start + cut], caches, start)
    found.append(y)
    start += cut
  error = np.abs(jnp.concatenate(found, 1) - expected)
  assert np.mean(error < 1e-4) >= (1 if method == 'fp' else 0.8)
  # A last bit can move an int8 code of an input to its neighbour.
  assert error.max() < 0.02 * np.abs(expected).max()


def test_a_tied_head_is_the_embedding():
  model = build('fp')
  params = tiny.params(model)
  assert 'head' not in params
  x_BTD, caches = model.apply({'params': params}, TOKENS_BT)
  assert caches is None
  expected = np.float64(x_BTD) @ np.float64(params['embed']['embedding']).T
  found = logits(model, params, TOKENS_BT)
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_an_untied_head_is_a_matrix_of_its_own():
  tied, untied = build('fp'), build('fp', tied_embeddings=False)
  params = tiny.params(untied)
  assert params['head'].shape == (64, 32)
  assert size(params) - size(transformer.abstract_params(tied)) == 64 * 32
  head_VD = untied.apply({'params': params}, method='output_embedding')
  np.testing.assert_array_equal(head_VD, params['head'])
  x_BTD, _ = untied.apply({'params': params}, TOKENS_BT)
  np.testing.assert_allclose(
    logits(untied, params, TOKENS_BT),
    np.float64(x_BTD) @ np.float64(params['head']).T,
    rtol=1e-4,
    atol=1e-4,
  )


def test_the_stream_has_the_dtype_of_the_config():
  model = build('pquant4', dtype='bfloat16', dot_dtype='bfloat16')
  params = tiny.params(model)
  for method, dtype in (('__call__', 'bfloat16'), ('logits', 'float32')):
    found, _ = jax.eval_shape(
      functools.partial(model.apply, method=method),
      {'params': params},
      TOKENS_BT,
    )
    assert found.dtype == dtype


def test_weights_start_as_the_config_says():
  model = build('fp', d_model=64, init_std=0.1)
  params = jax.jit(model.init)(jax.random.key(0), TOKENS_BT)['params']
  block = params['block_1']
  for kernel, std in (
    (params['embed']['embedding'], 0.1),
    (block['attn']['q']['kernel'], 0.1),
    (block['ffn']['up']['kernel'], 0.1),
    # Into the residual stream, twice in each of two layers: / sqrt(4).
    (block['attn']['o']['kernel'], 0.05),
    (block['ffn']['down']['kernel'], 0.05),
  ):
    assert np.std(kernel) == pytest.approx(std, rel=0.1)
  other = params['block_0']['attn']['q']['kernel']
  assert not np.allclose(block['attn']['q']['kernel'], other)


@pytest.mark.parametrize(
  ('field', 'value'),
  [
    ('quantized_dot', 'int4'),
    ('attention', 'flash'),
    ('dot_dtype', 'float16'),
  ],
)
def test_build_names_what_it_does_not_know(field, value):
  with pytest.raises(ValueError, match=f'model.{field}={value!r}'):
    build('fp', **{field: value})


def test_build_resolves_every_auto():
  config = tiny.config('pquant')
  one = transformer.build(config, 'cpu', 1)
  assert one.config.attention == 'blocked' and not one.method.gather_codes
  many = transformer.build(config, 'gpu', 8)
  assert many.config.attention == 'cudnn' and many.method.int8
  split = tiny.config('pquant', {'mesh.fsdp': 8})
  assert transformer.build(split, 'tpu', 8).method.gather_codes
  assert config.model.attention == 'auto'  # The run's config stays as it was.
  assert hash(one) == hash(transformer.build(config, 'cpu', 1))


# Sizes, of the real configs; nothing is allocated.

# Millions of parameters for 1, 2, 4 and 8 branches: pQuant's table 6.
TABLE_6 = {
  '300m': ((300, 309, 328, 366), 1),
  '700m': ((700, 728, 785, 898), 1),
  '1.3b': ((1300, 1400, 1500, 1700), 100),
}


def at_size(size, n_experts, n_layers=None):
  config = pquant.get_config(size).unlock()
  config.model.n_experts = n_experts
  if n_layers is not None:
    config.model.n_layers = n_layers
  model = transformer.build(config, 'cpu', 1)
  return stacked.unstacked(transformer.abstract_params(model))


def narrow_size(params):
  return sum(
    size(kernel)
    for path, kernel in rules_lib.kernels(params).items()
    if '/narrow/' in path
  )


@pytest.mark.parametrize('name', TABLE_6)
def test_an_expert_has_the_size_that_the_paper_prints(name):
  shape, layers = common.SIZES[name], common.SIZES[name]['n_layers']
  # Blocks are alike: one is counted, and multiplied.
  one_layer = {n: at_size(name, n, 1) for n in (1, 2, 4, 8)}
  narrow = {n: layers * narrow_size(p) for n, p in one_layer.items()}
  total = {
    n: size(p) + (layers - 1) * size(p['block_0']) for n, p in one_layer.items()
  }
  each = 3 * shape['d_model'] * shape['branch'] * layers
  assert each == pytest.approx(
    {'300m': 9.44e6, '700m': 28.3e6, '1.3b': 56.6e6}[name], rel=1e-3
  )
  printed, rounding = TABLE_6[name]
  for n, millions in zip(total, printed, strict=True):
    assert narrow[n] == n * each
    # The paper adds to a nominal size, which ours is near.
    added = narrow[n] - narrow[1]
    exact = printed[0] + added / 1e6
    assert abs(exact - millions) <= rounding / 2 + 0.05
    router = shape['d_model'] * n * layers if n > 1 else 0
    assert total[n] - total[1] == added + router
  assert total[1] / 1e6 == pytest.approx(printed[0], rel=0.045)


def test_every_block_has_the_same_parameters():
  params = at_size('300m', 1)
  blocks = [params[f'block_{i}'] for i in range(24)]
  shapes = [jax.tree.map(lambda leaf: leaf.shape, block) for block in blocks]
  assert all(block == shapes[0] for block in shapes)
  rest = set(params) - {f'block_{i}' for i in range(24)}
  assert rest == {'embed', 'final_norm'}
  wide = params['block_0']['ffn']['wide']['up']['kernel']
  assert wide.shape == (1024, 2272)  # The paper's table 1.


@pytest.mark.parametrize('stem', ['fp', 'bitnet', 'bitnet_b158', 'pquant'])
@pytest.mark.parametrize(
  'fields',
  [{}, {'norm_shared': False, 'norm': 'inside', 'tied_embeddings': False}],
)
def test_every_parameter_has_a_partition_rule(stem, fields):
  config = importlib.import_module(f'configs.{stem}').get_config('300m')
  config = ConfigDict(config.to_dict())
  config.model.update({'n_layers': 1, 'scan_layers': False, **fields})
  for n_experts in (1, 4) if stem == 'pquant' else (1,):
    config.model.n_experts = n_experts
    model = transformer.build(config, 'cpu', 8)
    params = transformer.abstract_params(model)
    model.rules.check(rules_lib.kernels(params))
    for keys, leaf in jax.tree_util.tree_leaves_with_path(params):
      path = '/'.join(key.key for key in keys)
      spec = sharding.partition_spec(path, leaf.ndim)
      assert len(spec) <= leaf.ndim
      split = [leaf.shape[i] for i, axis in enumerate(spec) if axis]
      # Matrices along d_model; what is small stays whole.
      assert split == ([1024] if leaf.ndim > 1 else []), path
