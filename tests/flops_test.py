"""Counted operations against XLA's own count, and the measured peak."""

import types

import jax

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


def test_the_measured_peak_is_that_of_the_fastest_products(monkeypatch):
  # Four products each take 8, 2 and 4 s by this clock, then the time is over.
  ticks = iter([0.0, 8.0, 10.0, 12.0, 20.0, 24.0])
  ends = iter([0.0, 0.1, 0.2, 0.3, 9.0])
  clock = types.SimpleNamespace(
    perf_counter=lambda: next(ticks), monotonic=lambda: next(ends)
  )
  monkeypatch.setattr(flops, 'time', clock)
  assert flops.measured_peak(size=128, seconds=0.5) == 2 * 128**3 / (2 / 4)


def test_speeds_leave_pauses_out(monkeypatch):
  now = [100.0]
  clock = types.SimpleNamespace(monotonic=lambda: now[0])
  monkeypatch.setattr(flops, 'time', clock)
  config = tiny.config('fp', {'train.steps': 20})
  model = transformer.build(config, 'cpu', 1)
  params = transformer.abstract_params(model)
  meter = flops.Meter(config, params, peak=1e9, first=5)
  now[0] += 6.0
  with meter.pause():
    now[0] += 4.0
  found = meter.read(8)  # 3 steps in 6 s.
  tokens = config.data.batch_size * config.data.seq_len
  assert found['train/tokens'] == 8 * tokens
  assert found['train/tokens_per_s'] == tokens / 2
  assert found['train/eta_s'] == 12 * 2
  assert found['train/flops_per_s'] == tokens / 2 * count(config)
  assert found['train/flops_share'] == tokens / 2 * count(config) / 1e9
  now[0] += 5.0
  assert meter.read(9)['train/tokens_per_s'] == tokens / 5


def test_estimators_count_their_passes():
  forward = count(tiny.config('fp')) / 3
  for estimator, passes in (('spsa', 2), ('forward', 3)):
    fields = {'optim.estimator': estimator, 'zo.directions': 5}
    assert count(tiny.config('fp', fields)) == 5 * passes * forward
