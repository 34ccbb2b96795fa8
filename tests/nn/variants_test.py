"""Qwen's and OPT's forms of the model, and weights quantized after training."""

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from qat.infer import generate
from qat.nn import attention
from qat.nn import kv_cache
from qat.nn import transformer
from qat.quant import composed
from qat.quant import qtensor
from qat.quant import rules as rules_lib
from qat.quant import weights
from tests import tiny

OPT = {
  'model.norm_type': 'layer',
  'model.norm_eps': 1e-5,
  'model.bias': 'all',
  'model.positions': 'learned',
  'model.max_positions': 12,
  'model.ffn': 'plain',
  'model.activation': 'relu',
}


def build(**fields):
  """A float32 model with random biases and gains, and its parameters."""
  fields = {name.replace('__', '.'): value for name, value in fields.items()}
  config = tiny.config('fp', {**tiny.EXACT, 'model.attention': 'xla', **fields})
  model = transformer.build(config, 'cpu', 1)
  shapes = transformer.abstract_params(model)
  leaves, tree = jax.tree.flatten(shapes)
  rng = np.random.default_rng(0)
  params = [
    jnp.asarray(0.3 * rng.normal(size=leaf.shape) + (leaf.ndim == 1), 'f4')
    for leaf in leaves
  ]
  return config, model, jax.tree.unflatten(tree, params)


TOKENS = np.random.default_rng(1).integers(0, 64, (2, 12))


def slow_opt(params, tokens_BT, n_heads):
  """The published formulas of OPT in float64; one block."""
  p = jax.tree.map(np.float64, params)

  def norm(x, own):
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5)
    return x * own['scale'] + own['bias']

  def linear(x, own):
    return x @ own['kernel'] + own['bias']

  batch, length = tokens_BT.shape
  x = p['embed']['embedding'][tokens_BT] + p['positions'][:length]
  own = p['block_0']['attn']
  y = norm(x, own['norm'])
  q, k, v = (
    linear(y, own[name]).reshape(batch, length, n_heads, -1) for name in 'qkv'
  )
  scores = np.einsum('btnh,bsnh->bnts', q, k) / np.sqrt(q.shape[-1])
  scores = np.where(np.tri(length, dtype=bool), scores, -np.inf)
  shares = np.exp(scores - scores.max(-1, keepdims=True))
  shares /= shares.sum(-1, keepdims=True)
  y = np.einsum('bnts,bsnh->btnh', shares, v).reshape(x.shape)
  x = x + linear(y, own['o'])
  own = p['block_0']['ffn']
  hidden = np.maximum(linear(norm(x, own['norm']), own['up']), 0)
  x = x + linear(hidden, own['down'])
  return norm(x, p['final_norm']) @ p['embed']['embedding'].T


def test_opt_is_its_formulas():
  config, model, params = build(**OPT)
  logits, _ = model.apply({'params': params}, TOKENS, method='logits')
  expected = slow_opt(params, TOKENS, config.model.n_heads)
  np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


def test_the_cache_continues_learned_positions():
  config, model, params = build(**OPT)
  variables = {'params': params}
  whole, _ = model.apply(variables, TOKENS, method='logits')
  shape = (2, 12, config.model.n_kv_heads, 16)
  caches = [kv_cache.Cache(jnp.zeros(shape), jnp.zeros(shape))]
  _, caches = model.apply(variables, TOKENS[:, :9], caches, method='logits')
  rest, _ = model.apply(variables, TOKENS[:, 9:], caches, 9, method='logits')
  np.testing.assert_allclose(rest, whole[:, 9:], rtol=1e-4, atol=1e-4)


def test_a_sequence_that_is_too_long_is_refused():
  _, model, params = build(**OPT)
  with pytest.raises(ValueError, match='13 tokens; .*12'):
    model.apply({'params': params}, np.zeros((1, 13), int))
  options = dict(temperature=1.0, top_k=0, top_p=1.0, seed=0, stop=-1)
  with pytest.raises(ValueError, match='8 new ones; .*at most 12'):
    generate.generate(model, params, [1] * 5, tokens=8, **options)


def test_biases_of_queries_keys_and_values_alone():
  _, model, params = build(model__bias='qkv')
  biased = {
    path for path, layer in rules_lib.layers(params).items() if 'bias' in layer
  }
  assert biased == {f'block_0/attn/{name}' for name in 'qkv'}
  changed = jax.tree.map(lambda leaf: leaf, params)
  changed['block_0']['attn']['v']['bias'] += 1.0
  before, _ = model.apply({'params': params}, TOKENS)
  after, _ = model.apply({'params': changed}, TOKENS)
  assert not np.allclose(before, after)


def test_llama3_stretches_long_wavelengths_alone():
  scaling = tiny.config('fp').model.rope_scaling.copy_and_resolve_references()
  scaling.kind, scaling.original_positions = 'llama3', 1000
  x_BTNH, theta = np.ones((1, 1, 1, 16), 'f4'), 10_000.0
  angles = []
  for used in (None, scaling):
    y = np.float64(attention.rotary(x_BTNH, np.array([1]), theta, used))[0, 0]
    z = (y[0, :8] + 1j * y[0, 8:]) / (1 + 1j)
    angles.append(np.angle(z))
  wavelength = 2 * np.pi / angles[0]
  ratio = angles[0] / angles[1]
  short, long = wavelength < 1000 / 4, wavelength > 1000 / 1
  assert short.any() and long.any() and (~short & ~long).any()
  np.testing.assert_allclose(ratio[short], 1, rtol=1e-4)
  np.testing.assert_allclose(ratio[long], 8, rtol=1e-2)
  between = ratio[~short & ~long]
  assert ((between > 1) & (between < 8)).all()


def quantized_leaves(w_KN):
  """The matrix in every form that quantization after training leaves."""
  k, n = w_KN.shape
  rng = np.random.default_rng(k * n)
  asymmetric = weights.asymmetric(w_KN, 'group', 16, bits=4)
  kept = jnp.asarray(rng.random((k, n)) < 0.1)
  exact = jnp.where(kept, w_KN, 0).astype(jnp.float16)
  zero = qtensor.spread(asymmetric.zero, (k, n))
  codes = jnp.where(kept, zero, asymmetric.codes)

  def either():
    return jnp.asarray(rng.choice([-1, 1], (k, n)), jnp.int8)

  def normal(*shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)

  def levels(values):
    base = jnp.min(values, 1, keepdims=True)
    step = (jnp.max(values, 1, keepdims=True) - base + 1e-4) / 7
    found = jnp.round((values - base) / step).astype(jnp.uint8)
    return composed.Levels(found, base, step, 3)

  return {
    'channel': weights.symmetric(w_KN, 'channel', bits=8),
    'group': asymmetric,
    'outliers': qtensor.QTensor(
      codes, asymmetric.scale, 'int4', asymmetric.zero, exact
    ),
    'sum': composed.Sum(
      tuple(weights.asymmetric(w_KN * s, bits=4) for s in (0.2, 0.5, 0.3))
    ),
    'clustered': composed.Clustered(
      asymmetric.codes,
      jnp.asarray(rng.integers(0, 3, (k, n)), jnp.int8),
      jnp.asarray([[0.02], [0.05], [0.01]], jnp.float32),
      jnp.asarray([[0.0], [1.5], [-3.0]], jnp.float32),
      'int4',
    ),
    'mixed': composed.MixedBits(
      asymmetric.codes,
      0.02 * normal(-(-k // 20), n),
      normal(-(-k // 20), n),
      jnp.full(-(-k // 20), 4, jnp.int8),
      20,
    ),
    'binarized': composed.Binarized(
      either(),
      either(),
      jnp.asarray(rng.random(k) < 0.2),
      0.1 * normal(-(-k // 20), 7, n),
      20,
    ),
    'two levels': composed.TwoLevel(
      asymmetric.codes,
      levels(asymmetric.scale),
      'int4',
      levels(asymmetric.zero.astype(jnp.float32)),
      exact,
    ),
  }


KINDS = tuple(quantized_leaves(np.ones((32, 2), 'f4')))


@pytest.mark.slow
@pytest.mark.parametrize('activation', ['none', 'int6'])
def test_a_model_runs_quantized_matrices_as_their_values(activation):
  _, model, params = build(
    **{
      'quant.specs.full.activation': activation,
      'quant.specs.full.activation_granularity': 'token',
    }
  )

  @jax.jit
  def run(params):
    return model.apply({'params': params}, TOKENS)[0]

  block = params['block_0']
  for kind in KINDS:
    changed, floats = (jax.tree.map(lambda a: a, params) for _ in range(2))
    for part, name in (('attn', 'o'), ('ffn', 'up'), ('ffn', 'down')):
      leaf = quantized_leaves(block[part][name]['kernel'])[kind]
      assert composed.is_quantized(leaf)
      assert leaf.shape == block[part][name]['kernel'].shape
      changed['block_0'][part][name] = {'kernel': leaf}
      floats['block_0'][part][name] = {'kernel': leaf.dequantize()}
    np.testing.assert_allclose(
      run(changed), run(floats), rtol=2e-4, atol=2e-4, err_msg=kind
    )
    assert rules_lib.kernels(changed).keys() == rules_lib.kernels(params).keys()
