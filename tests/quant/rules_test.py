"""Rules: what they cover, and what they refuse."""

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from qat.quant import rules
from qat.quant import weights

FULL = {'weight': 'none', 'activation': 'none', 'granularity': 'tensor'}
BINARY = {'weight': 'binary', 'activation': 'int8', 'granularity': 'tensor'}
INT8 = {'weight': 'int8', 'activation': 'int8', 'granularity': 'channel'}
SPECS = {'full': FULL, 'binary': BINARY, 'int8': INT8}


def make(*pairs):
  return rules.make_rules(pairs, SPECS)


def params():
  def matrix(*shape):
    return jax.random.normal(jax.random.key(0), shape)

  return {
    'embed': {'embedding': matrix(8, 4)},
    'block_0': {
      'attn': {'q': {'kernel': matrix(4, 6), 'norm': {'scale': jnp.ones(4)}}},
      'ffn': {
        'narrow': {'up': {'kernel': matrix(3, 4, 2)}},
        'router': matrix(4, 3),
      },
    },
    'head': matrix(8, 4),
  }


def test_the_first_rule_that_covers_a_path_wins():
  found = make(('.*/narrow/.*', 'int8'), ('.*/q', 'full'), ('.*', 'binary'))
  assert found.find('block_0/ffn/narrow/up') == rules.Spec(**INT8)
  assert found.find('block_0/attn/q') == rules.Spec(**FULL)
  assert found.find('block_0/attn/k') == rules.Spec(**BINARY)
  assert [found.index(p) for p in ('a/narrow/b', 'a/q', 'q')] == [0, 1, 2]


def test_a_rule_covers_whole_paths():
  found = make(('block_1/.*', 'full'), ('.*', 'binary'))
  assert found.find('block_10/attn/q').weight == 'binary'
  assert found.find('a/block_1/attn/q').weight == 'binary'
  assert make(('q|k', 'full'), ('.*', 'binary')).index('qk') == 1


def test_a_layer_without_a_rule_is_an_error():
  with pytest.raises(ValueError, match='block_0/attn/k.*end the rules with'):
    make(('.*/q', 'full')).find('block_0/attn/k')
  with pytest.raises(ValueError, match='block_0/attn/k'):
    make(('.*/q', 'full')).check(['block_0/attn/q', 'block_0/attn/k'])


@pytest.mark.parametrize(
  'pairs',
  [
    (('.*/narow/.*', 'int8'), ('.*', 'binary')),  # A slip of the pen.
    (('.*', 'binary'), ('.*/narrow/.*', 'int8')),  # Never reached.
  ],
)
def test_a_rule_without_a_layer_is_an_error(pairs):
  paths = ['block_0/attn/q', 'block_0/ffn/narrow/up']
  with pytest.raises(ValueError, match='nar.*decides about no layer'):
    make(*pairs).check(paths)
  make(('.*/narrow/.*', 'int8'), ('.*', 'binary')).check(iter(paths))


@pytest.mark.parametrize(
  ('field', 'choices'),
  [
    ('weight', ['none', *weights.QUANTIZERS]),
    ('activation', ['none', 'int8']),
    ('granularity', [*weights.GRANULARITIES]),
  ],
)
def test_a_spec_refuses_what_there_is_not(field, choices):
  with pytest.raises(ValueError, match=f"{field}='fp3'") as error:
    rules.Spec(**(BINARY | {field: 'fp3'}))
  assert all(choice in str(error.value) for choice in choices)


def test_rules_refuse_what_they_cannot_use():
  with pytest.raises(ValueError, match=r"'\(\.\*' is no regex"):
    make(('(.*', 'full'))
  with pytest.raises(ValueError, match="'.*' names spec 'b1'.*binary, full"):
    make(('.*', 'b1'))


@pytest.mark.parametrize('weight', weights.QUANTIZERS)
@pytest.mark.parametrize('granularity', weights.GRANULARITIES)
def test_a_spec_quantizes_as_it_says(weight, granularity):
  spec = rules.Spec(weight, 'int8', granularity)
  w_KN = params()['block_0']['attn']['q']['kernel']
  q = spec.quantize({'kernel': w_KN})
  expected = weights.QUANTIZERS[weight](w_KN, granularity)
  np.testing.assert_array_equal(q.codes, expected.codes)
  np.testing.assert_array_equal(q.scale, expected.scale)
  assert spec.quantize_input(w_KN).alphabet == 'int8'


def test_a_spec_without_quantizers_quantizes_nothing():
  spec = rules.Spec(**FULL)
  assert spec.quantize({'kernel': jnp.ones((2, 2))}) is None
  assert spec.quantize_input(jnp.ones((2, 2))) is None


def test_kernels_are_the_matrices_of_linears():
  found = rules.kernels(params())
  assert list(found) == ['block_0/attn/q', 'block_0/ffn/narrow/up']
  assert found['block_0/ffn/narrow/up'].shape == (3, 4, 2)
  abstract = rules.kernels(jax.eval_shape(params))
  assert abstract['block_0/attn/q'].shape == (4, 6)


def test_quantize_kernels_quantizes_each_by_its_rule():
  found = make(('.*/narrow/.*', 'int8'), ('.*', 'full'))
  quantized = rules.quantize_kernels(params(), found)
  assert list(quantized) == ['block_0/ffn/narrow/up']
  assert quantized['block_0/ffn/narrow/up'].scale.shape == (3, 1, 2)
