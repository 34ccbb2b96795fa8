"""Which parameters are perturbed, by which noise, and where."""

import jax
from jax import lax
from jax import numpy as jnp
import numpy as np
import pytest

from qat.nn import stacked
from qat.quant import learned
from qat.zo import perturb

KEY = jax.random.key(7)


def tree(layers: int = 3) -> dict:
  """Parameters of a model that scans over its layers."""
  rng = np.random.default_rng(0)

  def normal(*shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)

  return {
    'blocks': {
      'attn': {'q': {'kernel': normal(layers, 4, 6)}},
      'norm': {'scale': normal(layers, 4)},
    },
    'embed': {'embedding': normal(8, 4)},
  }


def test_layers_have_the_same_noise_stacked_and_not():
  params = tree()
  found = stacked.unstacked(perturb.direction(params, KEY, '.*'))
  expected = perturb.direction(stacked.unstacked(params), KEY, '.*')
  jax.tree.map(np.testing.assert_array_equal, found, expected)
  parts = np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(found)])
  assert len(np.unique(parts)) == parts.size  # No noise occurs twice.


def test_noise_does_not_depend_on_what_else_is_chosen_or_there():
  params = tree()
  full = perturb.direction(params, KEY, '.*')
  kernels = perturb.direction(params, KEY, '.*kernel')
  alone = perturb.direction({'embed': params['embed']}, KEY, '.*')
  expected = full['blocks']['attn']['q']['kernel']
  np.testing.assert_array_equal(
    kernels['blocks']['attn']['q']['kernel'], expected
  )
  assert not kernels['embed']['embedding'].any()
  np.testing.assert_array_equal(
    alone['embed']['embedding'], full['embed']['embedding']
  )


def test_another_key_is_another_direction():
  params = tree()
  one = perturb.direction(params, jax.random.key(1), '.*')
  two = perturb.direction(params, jax.random.key(2), '.*')
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
    assert not np.any(a == b)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_read_adds_scaled_noise_in_float32(dtype):
  params = jax.tree.map(lambda w: w.astype(dtype), tree())
  moved = perturb.perturb(params, KEY, -0.25, '.*(kernel|scale)')
  read = perturb.read(moved)
  z = perturb.direction(params, KEY, '.*(kernel|scale)')
  for path in (('attn', 'q', 'kernel'), ('norm', 'scale')):
    w, e, r = params['blocks'], z['blocks'], read['blocks']
    for name in path:
      w, e, r = w[name], e[name], r[name]
    assert r.dtype == jnp.float32
    # A product and a sum, or both at once.
    np.testing.assert_allclose(r, np.float32(w) - 0.25 * e, rtol=0, atol=3e-7)
  assert moved['embed']['embedding'] is params['embed']['embedding']


def test_a_loop_reads_each_layers_own_form():
  params = tree()
  moved = perturb.perturb(params, KEY, 0.5, 'blocks/.*')
  expected = perturb.read(moved)['blocks']
  _, found = lax.scan(
    lambda _, layer: (None, perturb.read(layer)), None, moved['blocks']
  )
  jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_quantizer_makes_the_noise_of_a_matrix_once():
  quantizer = learned.QUANTIZERS['lwc4']
  w_KN = jnp.ones((64, 96))
  clip = quantizer.start(w_KN, 'channel', 0)
  params = {'block_0': {'q': {'kernel': w_KN}}}
  moved = perturb.perturb(params, KEY, 0.5, '.*')['block_0']['q']['kernel']

  def quantized(moved):
    layer = {'kernel': moved.read(), **clip}
    return quantizer.quantize(layer, 'channel', 0).dequantize()

  program = jax.jit(quantized).lower(moved).compile().as_text()
  assert program.count('shift-left(') == 20  # One for a round of threefry.


def test_at_no_distance_parameters_are_what_they_were():
  params = tree()
  found = perturb.read(perturb.perturb(params, KEY, 0.0, '.*'))
  jax.tree.map(np.testing.assert_array_equal, found, params)


def test_packed_parameters_can_stand_beside_perturbed_ones():
  params = {
    'q': jnp.ones((2, 2)),
    'codes': np.zeros((2, 2), np.int8),
  }
  assert list(perturb.leaf_keys(params, KEY, 'q')) == ['q']
  with pytest.raises(ValueError, match="'codes', which is int8"):
    perturb.leaf_keys(params, KEY, '.*')


def test_a_regex_that_covers_nothing_is_refused():
  with pytest.raises(ValueError, match='covers no parameter'):
    perturb.leaf_keys(tree(), KEY, 'kernel')  # Not the whole path.


def test_a_tree_with_both_forms_of_a_layer_is_refused():
  params = tree()
  params['block_1'] = {'norm': {'scale': jnp.ones(4)}}
  with pytest.raises(ValueError, match='same noise'):
    perturb.leaf_keys(params, KEY, '.*')


@pytest.mark.parametrize(
  'key',
  [
    jax.random.key(0, impl='rbg'),
    jax.random.split(jax.random.key(0)),
    jax.random.PRNGKey(0),
  ],
)
def test_other_keys_are_refused(key):
  with pytest.raises(ValueError, match='one key of'):
    perturb.leaf_keys(tree(), key, '.*')
