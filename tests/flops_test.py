"""Counted operations against XLA's own count, and the measured peak."""

import jax
import numpy as np
import pytest

from qat import flops
from qat import objective as objective_lib
from qat.nn import transformer
from tests import tiny


def count(config):
  model = transformer.build(config, 'cpu', 1)
  return flops.train_flops_per_token(config, transformer.abstract_params(model))


def test_the_count_of_a_small_model_by_hand():
  config = tiny.config('bitnet', {'model.n_layers': 3})
  attention = 4 * 32 * 32
  feed_forward = 3 * 32 * 48
  weights = 3 * (attention + feed_forward) + 64 * 32
  # Scores and their sum over values: 2 products of T * d_model * T, half of
  # them masked, 3 times for the backward pass.
  scores = 3 * 2 * 2 * 32 * 16 / 2
  assert count(config) == 6 * weights + 3 * scores


def test_an_expert_layer_counts_the_expert_that_a_token_meets():
  # Wide and narrow branch together are as wide as the gated layer.
  expected = count(tiny.config('bitnet'))
  for method in ('pquant', 'pquant4', 'pquant8'):
    assert count(tiny.config(method)) == expected


def test_a_second_expert_a_token_counts():
  once = count(tiny.config('pquant4'))
  twice = count(tiny.config('pquant4', {'model.experts_per_token': 2}))
  assert twice - once == 6 * 3 * 32 * 8


def test_directions_of_quantizers_are_passes_of_their_own():
  fields = {'optim.estimator': 'spsa', 'zo.directions': 3}
  once = count(tiny.config('fp', fields))
  assert once == 2 * count(tiny.config('fp'))  # 6 passes, and not 3.
  assert count(tiny.config('fp', {**fields, 'zo.quantizer_eps': 0.01})) == (
    2 * once
  )


def test_the_count_ignores_recomputation_and_untied_heads():
  expected = count(tiny.config('fp'))
  for fields in ({'model.remat': 'block'}, {'model.tied_embeddings': False}):
    assert count(tiny.config('fp', fields)) == expected


def test_the_count_is_near_that_of_the_compiler():
  # Wide and short, so that products outweigh all else; the compiler's count
  # has norms, the softmax and the optimizer on top, and scores unmasked.
  fields = {
    **tiny.EXACT,
    'model.d_model': 128,
    'model.d_ff': 384,
    'model.attention': 'xla',
    'model.loss_chunk': 16,
  }
  config = tiny.config('fp', fields)
  mesh = tiny.mesh(config)
  # As for a TPU: of the loops that suit CPUs, the compiler counts one turn.
  model = transformer.build(config, 'tpu', 1)
  params = transformer.abstract_params(model)
  rows = jax.ShapeDtypeStruct((8, 16), 'int32')

  def gradient(params, batch):
    loss = lambda p: objective_lib.loss_sum(model, config, mesh, p, batch)[0]  # noqa: E731
    return jax.grad(loss)(params)

  batch = {'tokens': rows, 'targets': rows}
  with tiny.compiled_quickly():
    lowered = jax.jit(gradient).lower(params, batch)
  expected = lowered.compile().cost_analysis()['flops'] / (8 * 16)
  assert 0.7 * expected < count(config) < 1.1 * expected


@pytest.mark.parametrize('size', [128, 256])
def test_the_measured_peak_is_a_plausible_speed(size):
  found = flops.measured_peak(size=size, seconds=0.05)
  assert np.isfinite(found)
  assert 1e7 < found < 1e15


def test_estimators_count_their_passes():
  forward = count(tiny.config('fp')) / 3
  for estimator, passes in (('spsa', 2), ('forward', 3)):
    fields = {'optim.estimator': estimator, 'zo.directions': 5}
    assert count(tiny.config('fp', fields)) == 5 * passes * forward
