"""Rules: what they cover, and what they refuse."""

import dataclasses

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from configs import common
from qat.quant import blocks
from qat.quant import learned
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
    ('weight', ['none', *weights.QUANTIZERS, *learned.QUANTIZERS]),
    ('activation', ['none', 'int8', 'int4']),
    ('granularity', ['tensor', 'channel', 'group']),
    ('activation_granularity', ['tensor', 'token', 'group']),
  ],
)
def test_a_spec_refuses_what_there_is_not(field, choices):
  with pytest.raises(ValueError, match=f"{field}='fp3'") as error:
    rules.Spec(**(BINARY | {field: 'fp3'}))
  assert all(choice in str(error.value) for choice in choices)


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    (dict(group_size=0), 'group_size=0 .* at least 1'),
    (dict(kept_share=1.0), 'kept_share=1.0 .* below 1'),
    (dict(kept_share=-0.1), 'kept_share=-0.1 .* at least 0'),
    (dict(kept_share=float('nan')), 'kept_share=nan'),
    (dict(weight='onebit'), "granularity='tensor' .*'onebit'.* channel"),
    (dict(weight='lwc4'), "granularity='tensor' .*'lwc4'.* channel, group"),
  ],
)
def test_a_spec_refuses_numbers_and_pairs_that_mean_nothing(fields, message):
  with pytest.raises(ValueError, match=message):
    rules.Spec(**(BINARY | fields))


def test_a_spec_has_the_fields_of_a_config():
  fields = [field.name for field in dataclasses.fields(rules.Spec)]
  made = common.spec('binary', 'int8')
  assert {*fields} == {*made}
  # What a config leaves out is the same here and there.
  assert dataclasses.asdict(rules.Spec(**BINARY)) == made.to_dict()


@pytest.mark.parametrize(
  ('weight', 'bits'),
  [
    ('none', 16),
    ('binary', 1),
    ('binary_mix', 0.92 * 1 + 0.08 * 16),
    ('ternary', 1.58),
    *((f'int{b}{end}', b) for b in (2, 3, 4, 8) for end in ('', '_asym')),
    ('fp8', 8),
    ('onebit', 1),
    ('lsq3', 3),
    ('lsq4', 4),
    ('paretoq1', 1),
    ('paretoq_ternary', 1.58),
    ('paretoq2', 2),
    *((f'lwc{b}', b) for b in (2, 3, 4, 6, 8)),
  ],
)
def test_the_bits_of_a_weight(weight, bits):
  spec = rules.Spec(weight, 'none', 'channel')
  assert spec.bits == pytest.approx(bits)
  assert rules.Spec('binary_mix', 'none', 'tensor', kept_share=0.5).bits == 8.5


def test_the_bits_of_every_weight_are_known():
  for weight in (*weights.QUANTIZERS, *learned.QUANTIZERS):
    assert 1 <= rules.Spec(weight, 'none', 'channel').bits <= 8


def test_a_width_that_groups_do_not_divide_is_refused():
  by_group = dict(granularity='group', group_size=4)
  rules.Spec('binary', 'int8', **by_group).check_width(8)
  with pytest.raises(ValueError, match="=4 .* 6 inputs.*granularity='channel'"):
    rules.Spec('lsq4', 'int8', **by_group).check_width(6)
  spec = rules.Spec('binary', 'int8', 'tensor', 'group', 4)
  with pytest.raises(ValueError, match="=4 .* 6.*activation_granularity='tok"):
    spec.check_width(6)
  # What is not quantized has no groups.
  rules.Spec('none', 'none', 'group', 'group', 4).check_width(6)


@pytest.mark.parametrize('weight', weights.QUANTIZERS)
@pytest.mark.parametrize('granularity', blocks.AXES)
def test_without_learned_scales_gradients_pass_straight_through(
  weight, granularity
):
  spec = rules.Spec(weight, 'none', granularity, group_size=2)
  w_KN, dw_KN = (jax.random.normal(jax.random.key(i), (4, 6)) for i in (0, 1))
  layer = {'kernel': w_KN}
  assert not spec.parameters and not spec.start(w_KN)
  quantized = spec.quantize(layer)
  value, vjp = jax.vjp(
    lambda layer: spec.fake_quantize(layer, quantized), layer
  )
  np.testing.assert_array_equal(value, quantized.dequantize())
  np.testing.assert_array_equal(vjp(dw_KN)[0]['kernel'], dw_KN)


@pytest.mark.parametrize('weight', learned.QUANTIZERS)
def test_learned_scales_have_names_and_are_found_beside_the_kernel(weight):
  spec = rules.Spec(weight, 'none', 'channel')
  kernel = jax.random.normal(jax.random.key(0), (3, 4, 6))
  start = spec.start(kernel)
  assert tuple(start) == spec.parameters != ()
  assert all(value.shape[0] == 3 for value in start.values())
  tree = {'block_0': {'q': {'kernel': kernel, **start}, 'norm': {'scale': 1}}}
  found = rules.layers(tree)
  assert {*found['block_0/q']} == {'kernel', *spec.parameters}
  quantized = rules.quantize_kernels(tree, rules.Rules((('.*', spec),)))
  np.testing.assert_array_equal(
    quantized['block_0/q'].codes, spec.quantize(found['block_0/q']).codes
  )


@pytest.mark.parametrize(
  'changes',
  [
    {},
    dict(activation='int4'),
    dict(activation_granularity='tensor'),
    dict(activation_granularity='group'),
    dict(activation_granularity='group', group_size=8),
    dict(group_size=8, kept_share=0.5),
  ],
)
def test_inputs_are_shared_by_those_who_quantize_them_alike(changes):
  spec = rules.Spec(**BINARY)
  other = rules.Spec(**(BINARY | {'weight': 'ternary'} | changes))
  alike = not {*changes} & {'activation', 'activation_granularity'}
  assert (other.input_key == spec.input_key) == alike


def test_rules_refuse_what_they_cannot_use():
  with pytest.raises(ValueError, match=r"'\(\.\*' is no regex"):
    make(('(.*', 'full'))
  with pytest.raises(ValueError, match="'.*' names spec 'b1'.*binary, full"):
    make(('.*', 'b1'))


@pytest.mark.parametrize('weight', weights.QUANTIZERS)
@pytest.mark.parametrize('granularity', blocks.AXES)
def test_a_spec_quantizes_as_it_says(weight, granularity):
  spec = rules.Spec(weight, 'int4', granularity, 'group', 2, 0.25)
  w_KN = params()['block_0']['attn']['q']['kernel']
  q = spec.quantize({'kernel': w_KN})
  more = (0.25,) if weight == 'binary_mix' else ()
  expected = weights.QUANTIZERS[weight](w_KN, granularity, 2, *more)
  np.testing.assert_array_equal(q.dequantize(), expected.dequantize())
  np.testing.assert_array_equal(q.scale, expected.scale)
  x = spec.quantize_input(w_KN)
  assert x.alphabet == 'int4' and x.scale.shape == (4, 3)


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
