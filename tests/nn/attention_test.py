"""Attention in all its forms against one slow one in float64."""

import functools

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from qat.nn import attention
from qat.nn import kv_cache
from qat.quant import dot
from qat.quant import rules as rules_lib
from tests import jaxprs
from tests import tiny

METHOD = dot.Method(int8=False, dtype='float32')


def normal(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def slow_attention(q, k, v):
  """softmax(q k^T / sqrt(H), causal) v, head by head and query by query."""
  repeat = q.shape[2] // k.shape[2]
  rows = []
  for t in range(q.shape[1]):
    heads = []
    for n in range(q.shape[2]):
      past_k, past_v = (a[:, : t + 1, n // repeat] for a in (k, v))
      score = (past_k * q[:, t, n][:, None]).sum(-1) / q.shape[-1] ** 0.5
      p = np.exp(score) if isinstance(q, np.ndarray) else jnp.exp(score)
      p = p / p.sum(-1, keepdims=True)
      heads.append((p[..., None] * past_v).sum(1))
    rows.append(heads)
  stack = np.stack if isinstance(q, np.ndarray) else jnp.stack
  return stack([stack(heads, 1) for heads in rows], 1)


def slow_attention_matrices(q, k, v):
  """The same with whole matrices, so that autodiff of it is quick."""
  repeat = q.shape[2] // k.shape[2]
  k, v = (jnp.repeat(a, repeat, axis=2) for a in (k, v))
  s = jnp.einsum('btnh,bsnh->bnts', q, k) / q.shape[-1] ** 0.5
  future = ~np.tri(q.shape[1], dtype=bool)[None, None]
  p = jax.nn.softmax(jnp.where(future, -jnp.inf, s), axis=-1)
  return jnp.einsum('bnts,bsnh->btnh', p, v)


def qkv(length, heads, kv_heads, width=6, batch=2):
  q = normal(batch, length, heads, width)
  k, v = (normal(batch, length, kv_heads, width, seed=i) for i in (1, 2))
  return q, k, v


@functools.partial(jax.jit, static_argnums=2)
def value_and_gradients(inputs, dy, form):
  f = slow_attention_matrices
  if form != 'slow':
    f = functools.partial(attention.causal_attention, form=form)
  y, vjp = jax.vjp(f, *inputs)
  return y, *vjp(dy)


def in_float64(inputs, dy):
  with jax.enable_x64(True):
    inputs = tuple(jnp.asarray(np.float64(a)) for a in inputs)
    found = value_and_gradients(inputs, jnp.asarray(np.float64(dy)), 'slow')
    assert found[0].dtype == np.float64
    return [np.asarray(a) for a in found]


def test_the_reference_is_attention_query_by_query():
  inputs = qkv(5, 4, 2)
  expected = slow_attention(*map(np.float64, inputs))
  found = in_float64(inputs, np.zeros_like(inputs[0]))[0]
  np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize(
  ('form', 'heads', 'kv_heads', 'length'),
  [
    ('xla', 4, 2, 5),
    ('blocked', 2, 2, 1),
    ('blocked', 3, 1, 3),  # Shorter than a block,
    ('blocked', 4, 2, 8),  # whole blocks,
    ('blocked', 3, 1, 14),  # and a rest.
    ('looped', 3, 1, 3),
    ('looped', 4, 2, 8),
    ('looped', 3, 1, 14),
  ],
)
def test_a_form_is_attention_in_float64(
  monkeypatch, form, heads, kv_heads, length
):
  monkeypatch.setattr(attention, '_BLOCK', 4)
  inputs = qkv(length, heads, kv_heads)
  dy = normal(*inputs[0].shape, seed=3)
  for actual, expected in zip(
    value_and_gradients(inputs, dy, form), in_float64(inputs, dy), strict=True
  ):
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_blocks_of_the_real_size(dtype):
  length = attention._BLOCK + 9
  inputs = tuple(jnp.asarray(a, dtype) for a in qkv(length, 2, 1, batch=1))
  dy = jnp.asarray(normal(*inputs[0].shape, seed=3), dtype)
  tolerance = 1e-5 if dtype == 'float32' else 2e-2
  for actual, expected in zip(
    value_and_gradients(inputs, dy, 'blocked'),
    in_float64(inputs, dy),
    strict=True,
  ):
    assert actual.dtype == dtype
    size = np.abs(expected).max()
    np.testing.assert_allclose(
      np.float64(actual), expected, rtol=0, atol=tolerance * size
    )


@pytest.mark.parametrize('form', ['blocked', 'looped', 'xla'])
def test_large_scores_stay_finite(form):
  # exp(88) is the largest float32; these scores reach thousands.
  q, k, v = (100 * a for a in qkv(6, 2, 2))
  found = value_and_gradients((q, k, v), q, form)
  assert all(jnp.all(jnp.isfinite(a)) for a in found)


@pytest.mark.parametrize('form', ['blocked', 'looped', 'xla'])
def test_a_query_sees_nothing_after_itself(monkeypatch, form):
  monkeypatch.setattr(attention, '_BLOCK', 4)
  q, k, v = qkv(10, 2, 2)
  dy = np.zeros_like(q)
  dy[:, 6] = 1
  _, dq, dk, dv = value_and_gradients((q, k, v), dy, form)
  for gradient in (dk, dv):
    np.testing.assert_array_equal(gradient[:, 7:], 0)
    assert np.all(np.abs(gradient[:, :7]).max((0, 2, 3)) > 0)
  np.testing.assert_array_equal(np.delete(dq, 6, axis=1), 0)


def test_the_blocked_form_keeps_no_scores():
  inputs = tuple(jnp.ones((1, 256, 2, 8)) for _ in range(3))
  vjp = jax.eval_shape(
    lambda *a: jax.vjp(
      functools.partial(attention.causal_attention, form='blocked'), *a
    )[1],
    *inputs,
  )
  assert max(leaf.size for leaf in jax.tree.leaves(vjp)) == inputs[0].size


def test_rotary_multiplies_complex_numbers():
  x_BTNH, theta = normal(2, 5, 3, 8), 100.0
  positions_T = np.array([0, 1, 2, 7, 4000])
  z = x_BTNH[..., :4] + 1j * np.float64(x_BTNH[..., 4:])
  turns = np.exp(1j * positions_T[:, None] * theta ** (-np.arange(4) / 4))
  expected = z * turns[None, :, None]
  found = np.float64(attention.rotary(x_BTNH, positions_T, theta))
  np.testing.assert_allclose(found[..., :4], expected.real, atol=2e-3)
  np.testing.assert_allclose(found[..., 4:], expected.imag, atol=2e-3)
  near = positions_T < 100
  np.testing.assert_allclose(
    (found[..., :4] + 1j * found[..., 4:])[:, near],
    expected[:, near],
    atol=1e-5,
  )


def test_rotary_products_depend_on_distance_alone():
  q, k = normal(1, 1, 1, 16), normal(1, 1, 1, 16, seed=1)

  def turn(x, t):
    return attention.rotary(x, np.array([t]), 10_000.0)

  products = [
    float(jnp.sum(turn(q, 3 + shift) * turn(k, shift)))
    for shift in (0, 1, 50, 500)
  ]
  np.testing.assert_allclose(products, products[0], rtol=1e-4)
  assert turn(jnp.asarray(q, jnp.bfloat16), 1).dtype == jnp.float32


def layer(method='fp', **fields):
  """An attention layer of a small config, with parameters and an input."""
  fields = {f'model.{key}': value for key, value in fields.items()}
  config = tiny.config(method, {**tiny.EXACT, 'model.n_heads': 4, **fields})
  rules = rules_lib.make_rules(config.quant.rules, config.quant.specs)
  model = config.model.copy_and_resolve_references().unlock()
  if model.attention == 'auto':
    model.attention = 'xla'
  module = attention.Attention(model, rules, METHOD)
  x_BTD = normal(2, 7, model.d_model)
  variables = module.init(jax.random.key(0), x_BTD, np.arange(7))
  return module, {'params': variables['params']}, x_BTD


def test_the_layer_is_its_parts():
  module, variables, x_BTD = layer(norm='inside', n_kv_heads=2)
  params = jax.tree.map(lambda p: np.float64(p), variables['params'])

  def norm(x):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)

  x = norm(np.float64(x_BTD)) * params['norm']['scale']
  q, k, v = (
    (x @ params[name]['kernel']).reshape(2, 7, -1, 8) for name in 'qkv'
  )
  assert q.shape[2] == 4 and k.shape[2] == v.shape[2] == 2
  q, k = (
    np.float64(attention.rotary(np.float32(a), np.arange(7), 10_000.0))
    for a in (q, k)
  )
  y = slow_attention(q, k, v).reshape(2, 7, -1)
  y = norm(y) * params['o']['norm']['scale'] @ params['o']['kernel']
  found, cache = module.apply(variables, x_BTD, np.arange(7))
  assert cache is None
  np.testing.assert_allclose(found, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
  ('norm', 'shared', 'norms'),
  [
    ('pre', True, {'norm'}),
    ('inside', True, {'norm', 'o/norm'}),
    ('inside', False, {'q/norm', 'k/norm', 'v/norm', 'o/norm'}),
  ],
)
def test_norms_are_where_the_config_says(norm, shared, norms):
  _, variables, _ = layer('bitnet', norm=norm, norm_shared=shared)
  found = {
    '/'.join(key.key for key in keys[:-1])
    for keys, _ in jax.tree_util.tree_leaves_with_path(variables['params'])
    if keys[-1].key == 'scale'
  }
  assert found == norms


def test_queries_keys_and_values_share_one_quantized_input():
  # A binary weight is not rounded: one rounding for q, k and v, one for o.
  for shared, rounded in ((True, 2), (False, 4)):
    module, variables, x_BTD = layer('bitnet', norm_shared=shared)
    args = (variables, x_BTD, np.arange(7))
    assert jaxprs.count('round', module.apply, *args) == rounded


@pytest.mark.parametrize(
  ('kv_heads', 'cuts'),
  [(4, (4, 1, 1, 1)), (2, (1,) * 7), (1, (3, 4))],
)
def test_a_cache_continues_where_it_was_left(kv_heads, cuts):
  module, variables, x_BTD = layer(attention='blocked', n_kv_heads=kv_heads)
  expected, _ = module.apply(variables, x_BTD, np.arange(7))
  empty = jnp.zeros((2, 9, kv_heads, 8))  # Two positions more than needed.
  cache, ys, start = kv_cache.Cache(empty, empty), [], 0
  step = jax.jit(module.apply)
  for cut in cuts:
    x_BtD = x_BTD[:, start : start + cut]
    y, cache = step(variables, x_BtD, start + jnp.arange(cut), cache)
    ys.append(y)
    start += cut
  np.testing.assert_allclose(
    jnp.concatenate(ys, 1), expected, rtol=1e-5, atol=1e-6
  )
  np.testing.assert_array_equal(cache.keys_BSKH[:, 7:], 0)


@pytest.mark.parametrize(
  ('name', 'platform', 'devices', 'width', 'expected'),
  [
    ('auto', 'cpu', 1, 64, 'blocked'),
    ('auto', 'cpu', 8, 64, 'xla'),
    ('auto', 'tpu', 1, 64, 'xla'),
    ('auto', 'gpu', 1, 64, 'cudnn'),
    ('auto', 'gpu', 8, 128, 'cudnn'),
    ('auto', 'gpu', 1, 20, 'xla'),
    ('auto', 'gpu', 1, 256, 'xla'),
    ('xla', 'cpu', 1, 64, 'xla'),
    ('xla', 'gpu', 1, 64, 'xla'),
    ('blocked', 'tpu', 8, 64, 'blocked'),
    ('cudnn', 'gpu', 1, 64, 'cudnn'),
  ],
)
def test_choose_form(name, platform, devices, width, expected):
  found = attention.choose_form(name, platform, devices, 'bfloat16', width)
  assert found == expected


def test_choose_form_refuses_what_it_does_not_know():
  with pytest.raises(ValueError, match="attention='flash'; one of auto"):
    attention.choose_form('flash', 'cpu', 1, 'bfloat16', 64)
