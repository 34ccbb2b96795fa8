"""The training of blocks, and the walk of which it is a part."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from qat.interop import folder
from qat.nn import transformer
from qat.ptq import apply
from qat.ptq import calibrate
from qat.ptq import job as job_lib
from qat.ptq import omniquant
from qat.ptq import omniquant_train
from qat.ptq import partial
from qat.ptq import rtn
from qat.quant import rules as rules_lib
from tests import clean
from tests import tiny
from tests.ptq import omniquant_transforms_test as transforms_test

SHORT = {
  'method__epochs': 5,
  'method__bits': 3,
  'method__group_size': 8,
  'method__batch_size': 2,
  # Far in few steps.
  'method__lwc_init': 2.0,
  'method__lwc_lr': 0.3,
}
LET = {
  'method__bits': 4,
  'method__group_size': 0,
  'method__let': True,
  'method__let_lr': 0.02,
  'method__let_qk': True,
  'activation': 'int4_asym',
}


@pytest.fixture(scope='module', autouse=True)
def quickly():
  with tiny.compiled_quickly():
    yield


@pytest.fixture(scope='module')
def quantize(config, params, tmp_path_factory):
  """Quantizes the model in a folder of its own; again is the same result."""

  @functools.cache
  def run(**fields):
    store = partial.Store(tmp_path_factory.mktemp('parts'), {})
    ptq = clean.ptq('omniquant', **fields)
    return apply.quantize(config, params, ptq, clean.examples(), store)

  return run


def output_error(config, params, result):
  """Relative squared error of the logits."""
  tokens = clean.examples().tokens_ST[:5]  # Without padding.
  before = clean.logits(config, params, tokens)
  leaves = folder.nested(dict(result.leaves()))
  after = clean.logits(result.config, leaves, tokens)
  return np.mean((after - before) ** 2) / np.mean(before**2)


def test_without_training_it_is_round_to_nearest_of_the_clipped_range(
  params, quantize
):
  result = quantize(method__epochs=0, method__lwc_init=50.0)
  options = rtn.Options(4, 'channel', 0, False, False)
  before = folder.flat(params)
  for path, leaf in result.leaves():
    if path.endswith('/kernel'):
      expected = rtn.quantize(before[path], options)
      jax.tree.map(np.testing.assert_array_equal, leaf, expected)
    else:
      np.testing.assert_array_equal(leaf, before[path])
  assert result.notes['losses'] == {'block_0': [], 'block_1': []}


def test_training_brings_the_output_nearer(config, params, quantize):
  trained = quantize(**SHORT)
  losses = trained.notes['losses']
  assert all(found[-1] < 0.9 * found[0] for found in losses.values())
  assert set(trained.seconds) == {'training', 'quantization'}
  nearest = {'method__epochs': 0, 'method__lwc_init': 50.0}
  plain = quantize(**SHORT | nearest)
  errors = [output_error(config, params, r) for r in (trained, plain)]
  assert errors[0] < 0.7 * errors[1]


@pytest.mark.slow
def test_transformations_are_trained_and_folded(config, params, quantize):
  trained = quantize(**SHORT | LET)
  losses = trained.notes['losses']
  assert all(found[-1] < found[0] for found in losses.values())
  leaves, before = dict(trained.leaves()), folder.flat(params)
  for path in ('block_0/attn/norm/scale', 'block_1/ffn/norm/scale'):
    assert not np.allclose(leaves[path], before[path])
  rules = rules_lib.make_rules(
    trained.config.quant.rules, trained.config.quant.specs
  )
  assert rules.find('block_1/attn/o').activation == 'int4_asym'
  plain = quantize(
    **SHORT | LET | {'method__let': False, 'method__let_qk': False}
  )
  for block, found in losses.items():
    assert found[-1] < 0.8 * plain.notes['losses'][block][-1]


@pytest.mark.parametrize(
  'fields',
  [
    pytest.param(SHORT | LET, marks=pytest.mark.slow),
    SHORT | {'method__epochs': 0, 'layers': 'block_1/.*'},
  ],
  ids=['trained', 'not trained'],
)
def test_a_latent_result_is_the_same_model_and_can_be_trained_on(
  config, params, quantize, fields
):
  latent, final = quantize(**fields, latent=True), quantize(**fields)
  assert [dataclasses.replace(r, seconds=0) for r in latent.records] == [
    dataclasses.replace(r, seconds=0) for r in final.records
  ]
  found = folder.nested(dict(latent.leaves()))
  rules = rules_lib.make_rules(
    latent.config.quant.rules, latent.config.quant.specs
  )
  grids = jax.jit(rules_lib.quantize_kernels, static_argnums=1)(found, rules)
  expected = dict(final.leaves())
  assert len(grids) == len(latent.records)
  for path, leaf in folder.flat(found).items():
    layer, _, last = path.rpartition('/')
    if last == 'kernel' and layer in grids:
      assert leaf.dtype == np.float32
      wanted = expected.pop(path)
      jax.tree.map(np.testing.assert_array_equal, grids[layer], wanted)
    elif not last.startswith('clip_'):
      np.testing.assert_array_equal(leaf, expected.pop(path))
  assert not expected
  # The model finds its parameters by itself, and gives the same.
  model = transformer.build(latent.config, 'cpu', 1)
  assert jax.tree.map(np.shape, found) == jax.tree.map(
    np.shape, transformer.abstract_params(model)
  )
  tokens = clean.examples().tokens_ST
  np.testing.assert_allclose(
    clean.logits(latent.config, found, tokens),
    clean.logits(final.config, folder.nested(dict(final.leaves())), tokens),
    rtol=1e-4,
    atol=1e-5,
  )


def test_the_loss_is_that_of_the_quantized_block(config, params, tmp_path):
  """Of a block with its final codes, against what the clean one gives."""
  ptq = clean.ptq('omniquant', activation='int4_asym', method__batch_size=6)
  store = partial.Store(tmp_path / 'parts', {})
  job = job_lib.Job(config, params, ptq, clean.examples(), store, print)
  streams = omniquant_train.Streams(job)
  streams.pass_clean(params['block_0'], keep=True)
  setup = omniquant_train.setup_of(job)
  learned = {}
  for name in job.plan.layers['block_0']:
    learned |= omniquant.start(name, (32, 32), setup.options)
  batch = streams.states[0], streams.weights[0], streams.targets[0]
  found = jax.jit(omniquant_train.loss, static_argnums=(0, 1))(
    streams.block, setup, params['block_0'], learned, batch
  )
  final = omniquant_train.quantized(setup, params['block_0'], learned)
  error = omniquant_train.forward(streams.block, final, batch[0]) - batch[2][0]
  there = clean.examples().weights_ST > 0
  expected = np.mean(np.square(np.asarray(error)[there]))
  assert found == pytest.approx(expected, rel=1e-3)


def test_the_second_target_is_the_clean_block_on_the_quantized_inputs(
  config, params, tmp_path
):
  ptq = clean.ptq('omniquant', method__aug_loss=True, method__batch_size=6)
  store = partial.Store(tmp_path / 'parts', {})
  job = job_lib.Job(config, params, ptq, clean.examples(), store, print)
  streams = omniquant_train.Streams(job)
  streams.states = [2 * x_BTD for x_BTD in streams.states]
  states = streams.states[0], streams.states[0] / 2
  streams.pass_clean(params['block_0'], keep=True)
  block = calibrate.one_block(streams.block, params)
  for target, x_BTD in zip(streams.targets[0], states[::-1], strict=True):
    expected = omniquant_train.forward(block, params['block_0'], x_BTD)
    np.testing.assert_allclose(target, expected, rtol=1e-4, atol=1e-5)


def test_what_is_learned_is_not_learned_again_and_the_rest_is_the_same(
  config, params, quantize, tmp_path, monkeypatch
):
  expected = quantize(**SHORT | LET)
  ptq, examples = clean.ptq('omniquant', **SHORT | LET), clean.examples()
  store = partial.Store(tmp_path / 'parts', {})

  def stop(done, total, words):
    if words == 'training, block_1, epoch 2':
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    apply.quantize(config, params, ptq, examples, store, stop)
  assert store.has('learned-block_0') and not store.has('learned-block_1')
  trained, shown = [], []
  train = omniquant_train._train_block
  monkeypatch.setattr(
    omniquant_train,
    '_train_block',
    lambda *args: trained.append(args[-1]) or train(*args),
  )
  again = apply.quantize(
    config, params, ptq, examples, store, lambda *step: shown.append(step)
  )
  assert trained == ['block_1']
  found, wanted = dict(again.leaves()), dict(expected.leaves())
  jax.tree.map(np.testing.assert_array_equal, found, wanted)
  assert again.notes == expected.notes
  # 5 epochs of 2 blocks, then 14 matrices.
  assert shown[0][0] == 5 and shown[-1][:2] == (24, 24)


def test_only_the_chosen_layers_are_trained(quantize, params):
  result = quantize(**SHORT, layers='block_1/ffn/up')
  assert list(result.notes['losses']) == ['block_1']
  before = folder.flat(params)
  for path, leaf in result.leaves():
    if path != 'block_1/ffn/up/kernel':
      np.testing.assert_array_equal(leaf, before[path])


@pytest.mark.slow
def test_a_model_with_biases_is_shifted(tmp_path):
  fields = transforms_test.OPT | {'model__n_layers': 1}
  config = clean.config(**fields)
  params = clean.params(config)
  ptq = clean.ptq('omniquant', **SHORT | LET, method__let_shift=True)
  store = partial.Store(tmp_path / 'parts', {})
  result = apply.quantize(config, params, ptq, clean.examples(), store)
  (losses,) = result.notes['losses'].values()
  assert losses[-1] < losses[0]
  learned, _ = store.load('learned-block_0')
  assert {name for name in learned if name.endswith('/shift')} == {
    'attn/norm/shift',
    'ffn/norm/shift',
    'attn/v/shift',
  }
  leaves, before = dict(result.leaves()), folder.flat(params)
  for path in ('block_0/attn/norm/bias', 'block_0/ffn/up/bias'):
    assert not np.allclose(leaves[path], before[path])


def test_a_value_that_is_not_finite_is_told(config, params, tmp_path):
  broken = jax.tree.map(np.array, params)
  broken['block_1']['ffn']['down']['kernel'][3, 4] = np.nan
  ptq = clean.ptq('omniquant', **SHORT)
  store = partial.Store(tmp_path / 'parts', {})
  with pytest.raises(ValueError, match='In epoch 1 block_1 is not finite'):
    apply.quantize(config, broken, ptq, clean.examples(), store)
