"""Scales that are folded, and weights that are kept."""

import jax
import numpy as np
import pytest

from qat.interop import folder
from qat.ptq import apply
from qat.ptq import dbellquant
from qat.ptq import job as job_lib
from qat.ptq import partial
from qat.ptq import prepare
from qat.ptq import smoothquant
from qat.ptq import tacq
from qat.quant import composed
from tests import clean
from tests import tiny

SHORT = {'method__epochs': 3, 'quantizer_options__block_size': 16}


@pytest.fixture(scope='module', autouse=True)
def quickly():
  with tiny.compiled_quickly():
    yield


@pytest.fixture
def job(config, params, tmp_path):
  def make(stem, **fields):
    return job_lib.Job(
      config,
      params,
      clean.ptq(stem, **fields),
      clean.examples(),
      partial.Store(tmp_path / 'parts', {}),
      lambda *step: None,
    )

  return make


@pytest.mark.parametrize('stem', ['smoothquant', 'dbellquant'])
def test_folded_scales_leave_the_models_function(config, params, job, stem):
  made = job(stem, **(SHORT if stem == 'dbellquant' else {}))
  notes = prepare.find_scales(made)
  folded = {**params, **{name: made.block(name) for name in made.blocks}}
  tokens = clean.examples().tokens_ST
  before = clean.logits(config, params, tokens)
  after = clean.logits(config, folded, tokens)
  assert np.abs(after - before).max() < 1e-4 * np.abs(before).max()
  # Not because nothing happened.
  ratio = (
    folded['block_1']['ffn']['norm']['scale']
    / (params['block_1']['ffn']['norm']['scale'])
  )
  assert np.max(ratio) > 1.5 * np.min(ratio)
  # The scales are those of the method, from the inputs of the clean model.
  layer = params['block_1']['ffn']
  kernels = [layer['gate']['kernel'], layer['up']['kernel']]
  x_MK = clean.inputs(config, params, 'block_1/ffn/gate')
  largest_K = np.abs(x_MK).max(0)
  if stem == 'smoothquant':
    expected = smoothquant.scales(largest_K, kernels, made.plan.options)
    assert not notes
  else:
    expected, _ = dbellquant.scales(largest_K, kernels, made.plan.options)
    assert len(notes['block_1/ffn/norm']) == 2
  np.testing.assert_allclose(
    made.scales['block_1/ffn/norm'], expected, rtol=1e-3
  )
  # The second time they are read.
  again = job(stem, **(SHORT if stem == 'dbellquant' else {}))
  again.calibration = None
  assert prepare.find_scales(again) == notes
  jax.tree.map(np.testing.assert_array_equal, again.scales, made.scales)


def test_the_result_has_the_folded_gains_and_quantized_inputs(
  config, params, tmp_path
):
  result = apply.quantize(
    config,
    params,
    clean.ptq('dbellquant', activation='int8', **SHORT),
    clean.examples(),
    partial.Store(tmp_path / 'parts', {}),
  )
  leaves = dict(result.leaves())
  assert isinstance(leaves['block_0/attn/q/kernel'], composed.Binarized)
  path = 'block_0/attn/norm/scale'
  assert np.any(leaves[path] != folder.flat(params)[path])
  assert result.config.quant.rules[0][1] == 'inputs_int8'
  assert set(result.seconds) == {'scales', 'quantization'}
  assert set(result.notes) == {'scales'}
  tokens = clean.examples().tokens_ST
  after = clean.logits(result.config, folder.nested(leaves), tokens)
  before = clean.logits(config, params, tokens)
  assert ((after - before) ** 2).sum() < 0.9 * (before**2).sum()


def run(config, params, folder, stem, **fields):
  return apply.quantize(
    config,
    params,
    clean.ptq(stem, **fields),
    clean.examples(),
    partial.Store(folder, {}),
  )


@pytest.fixture(scope='module')
def kept(config, params, tmp_path_factory):
  """TaCQ that keeps a twentieth of the weights, and its store."""
  path = tmp_path_factory.mktemp('tacq') / 'parts'
  return run(config, params, path, 'tacq', method__share=0.05), path


def test_without_weights_to_keep_tacq_is_gptq(config, params, kept, tmp_path):
  none = run(config, params, tmp_path / 'a', 'tacq', method__share=0.0)
  plain = run(
    config,
    params,
    tmp_path / 'b',
    'gptq',
    method__bits=3,
    method__mse=True,
  )
  found, expected = dict(none.leaves()), dict(plain.leaves())
  for path, leaf in found.items():
    one, other = leaf, expected[path]
    if composed.is_quantized(leaf):
      assert not np.any(leaf.exact)
      one, other = leaf.dequantize(), other.dequantize()
    np.testing.assert_array_equal(one, other)
  assert none.notes['kept weights']['kept'] == 0
  # With some kept, more is right.
  errors = [
    sum(record.output_error for record in result.records)
    for result in (kept[0], none)
  ]
  assert errors[0] < errors[1]


def test_the_share_is_of_all_weights_together(kept):
  result, _ = kept
  notes = result.notes['kept weights']
  matrices = [leaf for p, leaf in result.leaves() if p.endswith('/kernel')]
  count = sum(np.count_nonzero(leaf.exact) for leaf in matrices)
  assert notes['weights'] == 14 * 32 * 32
  assert notes['kept'] == int(0.05 * notes['weights'])
  # One of them may be the level of its code to the last bit.
  assert notes['kept'] - 3 <= count <= notes['kept']
  shares = [np.mean(leaf.exact != 0) for leaf in matrices]
  assert max(shares) > 1.2 * min(shares)


def test_scores_are_of_the_clean_model_and_the_corrupted_copy(params, kept):
  result, path = kept
  store = partial.Store(path, {})
  sums, _ = store.load('gradients')
  corrupted, _ = store.load_packed('corrupt-block_1')
  layer = 'block_1/attn/v'
  scores_KN = tacq.scores(
    params['block_1']['attn']['v']['kernel'],
    sums[layer],
    corrupted[layer].dequantize(),
  )
  mask_KN = scores_KN > result.notes['kept weights']['threshold']
  exact_KN = dict(result.leaves())[f'{layer}/kernel'].exact
  assert np.count_nonzero(mask_KN) and not np.any(exact_KN[~mask_KN])
