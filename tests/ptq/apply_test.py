"""The walk over a model: order, statistics, errors, going on after an end."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from qat.interop import folder
from qat.ptq import apply
from qat.ptq import calibrate
from qat.ptq import gptq
from qat.ptq import partial
from qat.ptq import rtn
from qat.ptq import statistics as statistics_lib
from qat.quant import composed
from qat.quant import rules as rules_lib
from tests import clean
from tests import tiny


@pytest.fixture(scope='module', autouse=True)
def quickly():
  with tiny.compiled_quickly():
    yield


@pytest.fixture(scope='module')
def quantize(config, params, tmp_path_factory):
  """Quantizes the model in a folder of its own; again is the same result."""

  @functools.cache
  def run(stem, **fields):
    return apply.quantize(
      config,
      params,
      clean.ptq(stem, **fields),
      clean.examples(),
      partial.Store(tmp_path_factory.mktemp('parts'), {}),
    )

  return run


def kernels(result):
  params = folder.nested(dict(result.leaves()))
  return rules_lib.kernels(params)


def test_every_matrix_of_the_blocks_is_quantized_and_nothing_else(
  params, quantize
):
  result = quantize('rtn')
  leaves = dict(result.leaves())
  before = folder.flat(params)
  assert list(leaves) == list(before)
  quantized = {p for p, leaf in leaves.items() if composed.is_quantized(leaf)}
  assert quantized == {p for p in before if p.endswith('/kernel')}
  for path in before.keys() - quantized:
    np.testing.assert_array_equal(leaves[path], before[path])
  options = rtn.Options(**clean.ptq('rtn').method.to_dict())
  for path in quantized:
    expected = rtn.quantize(before[path], options)
    jax.tree.map(np.testing.assert_array_equal, leaves[path], expected)


def test_each_matrix_is_quantized_on_what_the_quantized_part_gives(
  config, params, quantize
):
  result = quantize('gptq')
  found = dict(result.leaves())
  # The first layers of block 1 read what a quantized block 0 passes on.
  mixed = folder.nested(
    {
      p: found[p].dequantize() if p.endswith('/kernel') else leaf
      for p, leaf in folder.flat(params).items()
      if not p.startswith('block_1')
    }
  )
  mixed['block_1'] = params['block_1']
  x_MK = clean.inputs(config, mixed, 'block_1/attn/q')
  options = gptq.Options(**clean.ptq('gptq').method.to_dict())
  expected = gptq.quantize(
    params['block_1']['attn']['q']['kernel'],
    statistics_lib.of(x_MK),
    options,
  )
  leaf = found['block_1/attn/q/kernel']
  # Sums in another order may turn a code at the border between two.
  assert np.mean(leaf.codes != np.asarray(expected.codes)) < 0.01
  np.testing.assert_allclose(leaf.scale, expected.scale, rtol=1e-3)


def test_errors_of_outputs_are_those_on_the_inputs(config, params, quantize):
  record = quantize('gptq').records[0]
  assert record.path == 'block_0/attn/q'
  x_MK = clean.inputs(config, params, record.path)
  w_KN = np.asarray(params['block_0']['attn']['q']['kernel'])
  q_KN = np.asarray(kernels(quantize('gptq'))[record.path].dequantize())
  before, error = x_MK @ w_KN, x_MK @ (w_KN - q_KN)
  expected = (error**2).sum() / (before**2).sum()
  assert record.output_error == pytest.approx(expected, rel=1e-3)
  expected = ((w_KN - q_KN) ** 2).sum() / (w_KN**2).sum()
  assert record.weight_error == pytest.approx(expected, rel=1e-4)


def test_gptq_beats_rounding_on_what_the_first_layers_read(quantize):
  ours = {r.path: r for r in quantize('gptq', method__bits=3).records}
  plain = quantize('rtn', method__bits=3, output_errors=True)
  assert len(plain.records) == len(ours) == 14
  for record in plain.records[:3]:
    assert ours[record.path].output_error < 0.9 * record.output_error


def test_stored_bits_are_counted(quantize):
  for record in quantize('rtn').records:
    # Codes of 4 bits, a scale of 16 and a zero point of at most 8 an output.
    assert 4 + 16 / 32 < record.bits <= 4 + 24 / 32


def test_groups_follow_one_another_in_a_block(config, params, quantize):
  first = quantize('gptq')
  second = quantize('gptq', true_sequential=True)
  a, b = kernels(first), kernels(second)
  for name in 'qkv':
    path = f'block_0/attn/{name}'
    jax.tree.map(np.testing.assert_array_equal, a[path], b[path])
  for path in ('block_0/attn/o', 'block_0/ffn/up', 'block_0/ffn/down'):
    assert np.any(a[path].codes != b[path].codes)


def test_what_is_finished_is_not_done_again_and_the_rest_is_the_same(
  config, params, quantize, tmp_path, monkeypatch
):
  expected = dict(quantize('gptq').leaves())
  store = partial.Store(tmp_path / 'parts', {'a': 1})
  ptq, examples = clean.ptq('gptq'), clean.examples()

  def stop(done, total, words):
    if 'block_1/ffn/up' in words:
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    apply.quantize(config, params, ptq, examples, store, stop)
  assert store.has('quantized-block_0') and not store.has('quantized-block_1')
  calls = []
  observe = calibrate.Calibration.statistics
  monkeypatch.setattr(
    calibrate.Calibration,
    'statistics',
    lambda self, params, names, path: (
      calls.append(path) or observe(self, params, names, path)
    ),
  )
  shown = []
  store = partial.Store(tmp_path / 'parts', {'a': 1})
  result = apply.quantize(
    config, params, ptq, examples, store, lambda *step: shown.append(step)
  )
  assert calls == ['block_1']
  found = dict(result.leaves())
  jax.tree.map(np.testing.assert_array_equal, found, expected)
  assert [r.path for r in result.records] == [
    r.path for r in quantize('gptq').records
  ]
  assert shown[0][0] == 7 and shown[-1][:2] == (14, 14)
  # And a third time, with nothing left to do.
  again = apply.quantize(config, params, ptq, examples, store)
  assert calls == ['block_1'] and again.records == result.records


@pytest.mark.parametrize('stem', ['gptq', 'tacq'])
def test_parameters_on_the_host_give_the_same(
  config, params, quantize, tmp_path, stem
):
  store = partial.Store(tmp_path / 'parts', {})
  ptq, examples = clean.ptq(stem), clean.examples()
  on_host = jax.device_get(params)
  result = apply.quantize(config, on_host, ptq, examples, store)
  expected = quantize(stem)
  jax.tree.map(
    np.testing.assert_array_equal,
    dict(result.leaves()),
    dict(expected.leaves()),
  )
  for mine, other in zip(result.records, expected.records, strict=True):
    assert dataclasses.replace(mine, seconds=other.seconds) == other
  assert result.notes == expected.notes


def test_a_layer_that_is_not_chosen_stays(config, params, quantize):
  leaves = dict(quantize('rtn', layers='block_1/ffn/(up|down)').leaves())
  quantized = [p for p, leaf in leaves.items() if composed.is_quantized(leaf)]
  assert quantized == ['block_1/ffn/down/kernel', 'block_1/ffn/up/kernel']


def test_inputs_are_quantized_in_calibration_and_in_the_result(
  config, params, quantize
):
  result = quantize('gptq', activation='int4', layers='block_\\d/ffn/.*')
  rules = rules_lib.make_rules(
    result.config.quant.rules, result.config.quant.specs
  )
  for path in kernels(result):
    spec = rules.find(path)
    assert spec.weight == 'none'
    assert spec.activation == ('int4' if '/ffn/' in path else 'none')
  rules.check(kernels(result))
  assert config.quant.rules == (('.*', 'full'),)
  plain = quantize('gptq', layers='block_\\d/ffn/.*')
  path = 'block_0/ffn/gate'
  assert np.any(kernels(plain)[path].codes != kernels(result)[path].codes)


def test_biases_are_split_with_their_matrices(tmp_path):
  config = clean.config(model__bias='qkv', model__n_layers=1)
  params = clean.params(config)
  result = apply.quantize(
    config,
    params,
    clean.ptq('splitquant'),
    None,
    partial.Store(tmp_path / 'parts', {}),
  )
  after = dict(result.leaves())['block_0/attn/q/bias']
  before = np.asarray(params['block_0']['attn']['q']['bias'])
  assert np.any(after != before)
  assert ((after - before) ** 2).sum() < 0.05 * (before**2).sum()


@pytest.mark.parametrize(
  ('value', 'expected'),
  [(np.nan, 'inputs of block_0/attn/q'), (np.inf, 'block_0/attn/q')],
)
def test_a_value_that_is_not_finite_names_its_layer(
  config, params, tmp_path, value, expected
):
  embedding = np.array(params['embed']['embedding'])
  embedding[clean.examples().tokens_ST[0, 0], 0] = value
  broken = {**params, 'embed': {'embedding': embedding}}
  store = partial.Store(tmp_path / 'parts', {})
  with pytest.raises(ValueError, match=expected):
    apply.quantize(config, broken, clean.ptq('gptq'), clean.examples(), store)


def test_a_weight_that_is_not_finite_names_its_layer(config, params, tmp_path):
  broken = jax.tree.map(np.array, params)
  broken['block_1']['ffn']['down']['kernel'][3, 4] = np.nan
  store = partial.Store(tmp_path / 'parts', {})
  with pytest.raises(ValueError, match='block_1/ffn/down: the weights'):
    apply.quantize(config, broken, clean.ptq('rtn'), None, store)


def test_a_record_tells_bits():
  record = apply.Record('a', 8, 4, 96, 0.0, None, 0.0)
  assert record.bits == 3
  assert dataclasses.asdict(record)['stored_bits'] == 96


@pytest.mark.parametrize(
  ('stem', 'kind', 'fields', 'most'),
  [
    ('spqr', 'TwoLevel', {'method__second_group_size': 16}, 0.03),
    ('slim_llm', 'MixedBits', {'method__group_size': 8}, 0.2),
    ('billm', 'Binarized', {'method__block_size': 16}, 0.3),
  ],
)
def test_every_other_method_walks_too(quantize, stem, kind, fields, most):
  result = quantize(stem, layers='block_1/attn/[qk]', **fields)
  assert [r.path for r in result.records] == [
    'block_1/attn/q',
    'block_1/attn/k',
  ]
  leaves = dict(result.leaves())
  for record in result.records:
    assert type(leaves[f'{record.path}/kernel']).__name__ == kind
    assert 0 < record.output_error < most
