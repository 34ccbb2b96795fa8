"""Sampling against NumPy, and the cache against forward passes without one."""

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import jax
from jax import numpy as jnp
import numpy as np
import pytest

from qat.infer import generate
from qat.nn import transformer
from tests import tiny

# The width of all logits here: one shape, so that it compiles once.
V = 12
LOGITS = st.permutations(range(V)).flatmap(
  lambda order: st.lists(st.floats(0.01, 2.0), min_size=V, max_size=V).map(
    lambda gaps: np.cumsum(gaps)[list(order)].astype(np.float32)
  )
)


@given(
  LOGITS,
  st.floats(0.1, 4.0),
  st.integers(0, V + 3),
  st.floats(0.02, 1.0),
)
@settings(max_examples=60)
def test_filters_keep_what_they_should(logits_V, temperature, top_k, top_p):
  logits_BV = jnp.asarray(logits_V)[None]
  found_BV = generate.filter_logits(logits_BV, temperature, top_k, top_p)
  found = np.asarray(found_BV)[0]
  scaled = logits_V.astype(np.float64) / temperature
  order = np.argsort(-scaled)
  kept = order[: top_k or V]
  p = np.exp(scaled[kept] - scaled[kept].max())
  p /= p.sum()
  before = np.cumsum(p) - p
  if np.any(np.abs(before - top_p) < 1e-5):
    return  # On the edge, where float32 and float64 may differ.
  kept = kept[before < top_p]
  assert set(np.flatnonzero(np.isfinite(found))) == set(kept)
  assert order[0] in kept
  np.testing.assert_allclose(found[kept], scaled[kept], rtol=1e-5)
  assert np.all(found[np.setdiff1d(order, kept)] == -np.inf)


@given(LOGITS, st.floats(0.1, 4.0), st.integers(0, 5))
@settings(max_examples=20)
def test_one_candidate_is_the_likeliest(logits_V, temperature, seed):
  logits_BV = jnp.asarray(logits_V)[None]
  key = jax.random.key(seed)
  greedy = generate.sample(logits_BV, key, 0.0, 0, 1.0)
  assert greedy == np.argmax(logits_V)
  assert generate.sample(logits_BV, key, temperature, 1, 1.0) == greedy
  assert generate.sample(logits_BV, key, temperature, 0, 1e-6) == greedy


def test_samples_come_as_often_as_they_are_likely():
  logits_V = np.log([0.5, 0.3, 0.15, 0.05]).astype(np.float32)
  logits_BV = jnp.broadcast_to(logits_V, (20_000, 4))
  for temperature, top_k, p in (
    (1.0, 0, [0.5, 0.3, 0.15, 0.05]),
    (1.0, 2, [0.625, 0.375, 0, 0]),
    (0.5, 0, np.square([0.5, 0.3, 0.15, 0.05]) / 0.365),
  ):
    ids = generate.sample(logits_BV, jax.random.key(0), temperature, top_k, 1.0)
    found = np.bincount(ids, minlength=4) / 20_000
    np.testing.assert_allclose(found, p, atol=0.015)


@pytest.fixture(autouse=True, scope='module')
def quickly():
  with tiny.compiled_quickly():
    yield


@pytest.fixture(scope='module', params=['bitnet', 'pquant4'])
def trained_enough(request):
  """A model that prefers some tokens over others, and its parameters."""
  config = tiny.config(request.param, {**tiny.EXACT, 'model.n_kv_heads': 1})
  model = transformer.build(config, 'cpu', 1)
  tokens = jnp.zeros((1, 8), jnp.int32)
  params = jax.jit(lambda key: model.init(key, tokens)['params'])(
    jax.random.key(0)
  )
  params['final_norm']['scale'] = params['final_norm']['scale'] * 5
  return model, params


OPTIONS = dict(tokens=8, temperature=1.0, top_k=0, top_p=1.0, seed=0, stop=-1)


def run(trained, prompt, **changes):
  return list(generate.generate(*trained, prompt, **{**OPTIONS, **changes}))


PROMPT = [3, 60, 7, 7, 21]


def test_greedy_text_is_that_of_forward_passes_without_a_cache(trained_enough):
  model, params = trained_enough
  # One length for all: what comes later changes nothing earlier.
  logits = jax.jit(
    lambda tokens: model.apply({'params': params}, tokens, method='logits')[0]
  )
  ids = list(PROMPT)
  for _ in range(8):
    padded = np.zeros((1, 16), np.int32)
    padded[0, : len(ids)] = ids
    ids.append(int(np.argmax(logits(padded)[0, len(ids) - 1])))
  found = run(trained_enough, PROMPT, temperature=0.0)
  assert found == ids[len(PROMPT) :]
  assert len(set(found)) > 1, 'One token for ever would say little.'
  assert run(trained_enough, PROMPT, top_k=1) == found
  # A token alone continues as it does within a longer run.
  assert run(trained_enough, ids[:-1], temperature=0.0, tokens=1) == ids[-1:]


def test_a_seed_decides_about_the_text(trained_enough):
  texts = [run(trained_enough, PROMPT, seed=seed) for seed in (0, 0, 1, 2)]
  assert texts[0] == texts[1]
  assert len({tuple(text) for text in texts}) == 3
  assert all(0 <= token < 64 for text in texts for token in text)


def test_the_stop_token_ends_the_text_and_is_left_out(trained_enough):
  text = run(trained_enough, PROMPT)
  stop = text[4]
  first = text.index(stop)
  assert run(trained_enough, PROMPT, stop=stop) == text[:first]


def test_tokens_come_as_they_are_sampled(trained_enough):
  stream = generate.generate(*trained_enough, PROMPT, **OPTIONS)
  assert next(stream) == run(trained_enough, PROMPT)[0]


def test_no_tokens_make_no_text(trained_enough):
  assert run(trained_enough, PROMPT, tokens=0) == []


@pytest.mark.parametrize(
  ('prompt', 'changes', 'expected'),
  [
    ([], {}, 'empty prompt'),
    (PROMPT, {'temperature': -1.0}, 'temperature=-1.0'),
    (PROMPT, {'temperature': float('nan')}, 'temperature=nan'),
    (PROMPT, {'top_k': -1}, 'top_k=-1'),
    (PROMPT, {'top_p': 0.0}, 'top_p=0.0'),
    (PROMPT, {'top_p': 1.5}, 'top_p=1.5'),
    (PROMPT, {'tokens': -1}, 'tokens=-1'),
  ],
)
def test_bad_options_are_refused(trained_enough, prompt, changes, expected):
  with pytest.raises(ValueError, match=expected):  # Before any token is.
    generate.generate(*trained_enough, prompt, **{**OPTIONS, **changes})
