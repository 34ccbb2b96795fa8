"""Schedules against their closed forms, and the chain against AdamW by hand."""

from hypothesis import given
from hypothesis import strategies as st
import jax
from jax import numpy as jnp
from ml_collections import ConfigDict
import numpy as np
import pytest

from configs import bitnet
from configs import common
from qat import optim
from qat.nn import transformer
from tests import tiny


def section(**changes) -> ConfigDict:
  """The `optim` section of a full-precision run, with changes."""
  config = common.base('tiny').optim
  config.update(changes)
  return config


def updated_at(optimizer, step: int):
  """The state's hyperparams after an update whose count is `step`."""
  params = {'w': jnp.ones((2, 2))}
  state = jax.tree.map(
    lambda leaf: jnp.full_like(leaf, step) if leaf.dtype == jnp.int32 else leaf,
    optimizer.init(params),
  )
  state = optimizer.update(params, state, params)[1]
  return {k: float(v) for k, v in state.hyperparams.items()}


@pytest.mark.parametrize('step', [0, 499, 500, 49_999, 50_000, 99_999])
def test_two_phase_is_the_schedule_of_the_paper(step):
  # pQuant's 300M and 700M: 100K steps, 500 of warm-up, 1.5e-3 and then 1e-3.
  config = bitnet.get_config('300m')
  assert (config.train.steps, config.optim.warmup_steps) == (100_000, 500)
  assert config.optim.peak_lr == 1.5e-3
  found = updated_at(optim.make(config.optim, config.train.steps), step)
  peak = 1.5e-3 if step < 50_000 else 1.0e-3
  expected = peak * min(step / 500, (100_000 - step) / (100_000 - 500))
  np.testing.assert_allclose(found['learning_rate'], expected, rtol=1e-6)
  assert found['weight_decay'] == np.float32(0.1 if step < 50_000 else 0.0)


def closed_form(config: ConfigDict, steps: int, t: np.ndarray) -> np.ndarray:
  """Every schedule, as its definition reads, in float64."""
  peak, final = config.peak_lr, config.peak_lr * config.final_lr_ratio
  warmup = config.warmup_steps
  since = (t - warmup) / (steps - warmup)
  if config.schedule == 'two_phase':
    second = t >= round(config.switch_fraction * steps)
    peak = peak * np.where(second, config.second_peak_ratio, 1)
    down = peak * (1 - since)
  elif config.schedule == 'cosine':
    down = final + (peak - final) * (1 + np.cos(np.pi * since.clip(0))) / 2
  elif config.schedule == 'wsd':
    left = (steps - t) / (config.decay_fraction * steps)
    down = final + (peak - final) * left.clip(0, 1)
  else:
    down = np.full(t.shape, peak)
  up = peak * t / warmup if warmup else np.inf
  return np.minimum(up, down)


@given(
  st.sampled_from(['two_phase', 'cosine', 'wsd', 'constant']),
  st.integers(2, 300),
  st.data(),
)
def test_every_schedule_is_its_closed_form_at_every_step(schedule, steps, data):
  config = section(
    schedule=schedule,
    warmup_steps=data.draw(st.integers(0, steps - 1)),
    peak_lr=2.0,
    switch_fraction=data.draw(st.floats(0, 1)),
  )
  t = np.arange(300)  # One shape for all examples: it compiles once.
  found = np.asarray(optim.learning_rate(config, steps)(jnp.asarray(t)))
  found, expected = found[:steps], closed_form(config, steps, t)[:steps]
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
  assert np.all((0 <= found) & (found <= 2.0))


def test_cosine_goes_from_the_peak_to_the_final_rate():
  config = section(
    schedule='cosine', warmup_steps=100, peak_lr=1e-2, final_lr_ratio=0.1
  )
  rate = optim.learning_rate(config, 1100)
  for step, expected in ((50, 5e-3), (100, 1e-2), (600, 5.5e-3), (1100, 1e-3)):
    np.testing.assert_allclose(rate(step), expected, rtol=1e-5)


def test_wsd_is_flat_and_then_falls_in_a_line():
  config = section(
    schedule='wsd',
    warmup_steps=10,
    peak_lr=1.0,
    final_lr_ratio=0.2,
    decay_fraction=0.25,
  )
  rate = optim.learning_rate(config, 400)
  for step, expected in ((5, 0.5), (10, 1), (300, 1), (350, 0.6), (400, 0.2)):
    np.testing.assert_allclose(rate(step), expected, rtol=1e-5)


def test_constant_stays_at_the_peak():
  rate = optim.learning_rate(
    section(schedule='constant', warmup_steps=4, peak_lr=1.0), 100
  )
  rates = [float(rate(step)) for step in (0, 1, 4, 50, 99)]
  np.testing.assert_allclose(rates, [0, 0.25, 1, 1, 1])


@pytest.mark.parametrize('schedule', ['cosine', 'wsd', 'constant'])
def test_weight_decay_is_one_value_outside_of_two_phase(schedule):
  config = section(schedule=schedule, second_weight_decay=0.0)
  decay = optim.weight_decay(config, 100)
  assert float(decay(0)) == float(decay(99)) == np.float32(0.1)


@pytest.mark.parametrize('method', ['fp', 'bitnet', 'pquant', 'pquant4'])
def test_matrices_alone_decay(method):
  fields = {
    'optim.schedule': 'constant',
    'optim.warmup_steps': 0,
    'optim.peak_lr': 0.5,
    'model.tied_embeddings': False,
  }
  config = tiny.config(method, fields)
  model = transformer.build(config, 'cpu', 1)
  params = jax.tree.map(
    lambda leaf: jnp.full(leaf.shape, 3.0), transformer.abstract_params(model)
  )
  optimizer = optim.make(config.optim, config.train.steps)
  zero = jax.tree.map(jnp.zeros_like, params)
  updates, _ = jax.jit(optimizer.update)(zero, optimizer.init(params), params)
  seen = set()
  for keys, update in jax.tree_util.tree_leaves_with_path(updates):
    name = keys[-1].key
    seen.add(name)
    undecayed = update.ndim < 2
    assert undecayed == (name in ('scale', 'alpha', 'beta')), name
    expected = 0.0 if undecayed else -0.5 * 0.1 * 3.0
    np.testing.assert_allclose(update, expected, rtol=1e-6, err_msg=name)
  expected = {'embedding', 'head', 'kernel', 'scale'}
  if method.startswith('pquant'):
    expected |= {'alpha', 'beta'}
  if method == 'pquant4':
    expected |= {'router'}
  assert seen == expected


def test_learned_scales_have_a_rate_of_their_own_and_no_decay():
  params = {
    'block_0': {
      'q': {
        name: jnp.full((2, 2), 3.0) for name in ('kernel', 'learned_scale')
      },
      'k': {
        name: jnp.full((2,), 3.0)
        for name in ('gain_in', 'gain_out', 'clip_high', 'clip_low')
      },
    }
  }
  grads = jax.tree.map(jnp.ones_like, params)
  found = {}
  for ratio in (1.0, 0.25):
    optimizer = optim.make(
      section(
        schedule='constant',
        warmup_steps=0,
        peak_lr=0.5,
        weight_decay=0.1,
        scale_lr_ratio=ratio,
      ),
      100,
    )
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    found[ratio] = jax.tree.map(lambda u: float(u.max()), updates['block_0'])
  # Adam's first step is the rate, whatever the size of the gradient.
  assert found[1.0]['q']['kernel'] == pytest.approx(-0.5 * (1 + 0.1 * 3))
  assert found[1.0]['q']['kernel'] == found[0.25]['q']['kernel']
  for ratio, layers in found.items():
    for rate in (layers['q']['learned_scale'], *layers['k'].values()):
      assert rate == pytest.approx(-0.5 * ratio)


def anneal(**changes) -> ConfigDict:
  """The `quant.anneal` section, with changes."""
  config = common.base('tiny').quant.anneal
  config.update(changes)
  return config


@pytest.mark.parametrize('shape', ['linear', 'cosine'])
@pytest.mark.parametrize(('start', 'steps'), [(0, 8), (5, 8), (3, 1), (4, 0)])
def test_quantization_rises_from_0_to_1(shape, start, steps):
  share = jax.jit(
    optim.quantization(anneal(shape=shape, start_step=start, steps=steps))
  )
  found = np.array([share(t) for t in range(20)])
  p = [
    min(max(t - start, 0) / steps, 1) if steps else float(t >= start)
    for t in range(20)
  ]
  p = np.array(p)
  expected = p if shape == 'linear' else (1 - np.cos(np.pi * p)) / 2
  np.testing.assert_allclose(found, expected, atol=1e-6)
  # Exactly full precision before, exactly quantized after.
  assert not found[:start].any()
  assert (found[start + steps :] == 1).all()
  assert share(10**6) == 1


def test_without_annealing_there_is_no_share():
  assert optim.quantization(anneal()) is None


@pytest.mark.parametrize(
  ('clip', 'factor'), [(1.0, 0.1), (20.0, 1.0), (0.0, 1.0)]
)
def test_clipping_bounds_the_norm_over_all_parameters(clip, factor):
  params = {'a': {'kernel': jnp.zeros(2)}, 'b': {'kernel': jnp.zeros(1)}}
  grads = {
    'a': {'kernel': jnp.array([2.0, 4.0])},
    'b': {'kernel': jnp.array([np.sqrt(80.0)])},
  }  # Its norm is 10.
  optimizer = optim.make(section(clip_norm=clip, b1=0.9), 100)
  _, state = optimizer.update(grads, optimizer.init(params), params)
  first_moments = [
    leaf
    for keys, leaf in jax.tree_util.tree_leaves_with_path(state)
    if jax.tree_util.GetAttrKey('mu') in keys
  ]
  for found, gradient in zip(
    first_moments, jax.tree.leaves(grads), strict=True
  ):
    np.testing.assert_allclose(found, 0.1 * factor * gradient, rtol=1e-5)


def test_the_chain_is_adamw():
  config = section(
    schedule='two_phase',
    warmup_steps=2,
    peak_lr=0.1,
    weight_decay=0.3,
    second_weight_decay=0.0,
    clip_norm=0.0,
  )
  steps = 8
  optimizer = optim.make(config, steps)
  rng = np.random.default_rng(0)
  w = rng.standard_normal((3, 2)).astype(np.float32)
  params = {'kernel': jnp.asarray(w)}
  state = optimizer.init(params)
  m = v = np.zeros_like(w)
  for t in range(steps):
    g = rng.standard_normal(w.shape).astype(np.float32)
    updates, state = optimizer.update({'kernel': jnp.asarray(g)}, state, params)
    params = jax.tree.map(lambda p, u: p + u, params, updates)
    peak, decay = (0.1, 0.3) if t < 4 else (0.1 * 2 / 3, 0.0)
    rate = peak * min(t / 2, (8 - t) / 6)
    m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
    adam = (m / (1 - 0.9 ** (t + 1))) / (
      np.sqrt(v / (1 - 0.95 ** (t + 1))) + 1e-8
    )
    w = w - rate * (adam + decay * w)
    np.testing.assert_allclose(params['kernel'], w, rtol=1e-5, atol=1e-6)


def test_without_moments_the_chain_is_plain_descent():
  config = section(
    optimizer='sgd',
    schedule='constant',
    warmup_steps=0,
    peak_lr=0.1,
    weight_decay=0.3,
    clip_norm=1.0,
  )
  optimizer = optim.make(config, 8)
  params = {'kernel': jnp.array([3.0]), 'alpha': jnp.array(2.0)}
  grads = {'kernel': jnp.array([6.0]), 'alpha': jnp.array(8.0)}
  state = optimizer.init(params)
  updates, state = optimizer.update(grads, state, params)
  np.testing.assert_allclose(updates['kernel'], -0.1 * (0.6 + 0.3 * 3))
  np.testing.assert_allclose(updates['alpha'], -0.1 * 0.8)
  # Counts and rates alone: nothing of the size of a parameter.
  assert all(leaf.shape == () for leaf in jax.tree.leaves(state))
  assert state.hyperparams['learning_rate'] == np.float32(0.1)
