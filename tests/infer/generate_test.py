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


@pytest.fixture(
  scope='module',
  params=['bitnet', pytest.param('pquant4', marks=pytest.mark.slow)],
)
def trained_enough(request):
  """A model that prefers some tokens over others, and its parameters."""
  config = tiny.config(request.param, {**tiny.EXACT, 'model.n_kv_heads': 1})
  model = transformer.build(config, 'cpu', 1)
  params = tiny.params(model)
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


# ---------------------------------------------------------------- several texts

PROMPTS = [PROMPT, [9, 50], [33, 1, 1, 8, 40]]


def several(trained, **changes):
  """The texts of a batch, up to where each ends."""
  options = {**OPTIONS, 'seeds': [4, 5, 6], **changes}
  del options['seed']
  rows = list(generate.batch(*trained, PROMPTS, **options))
  columns = [list(column) for column in zip(*rows, strict=True)]
  texts = [
    [token for token in column if token is not None] for column in columns
  ]
  for text, column in zip(texts, columns, strict=True):
    assert column == text + [None] * (len(column) - len(text))
  return texts


def test_texts_of_a_batch_are_those_of_each_alone(trained_enough):
  # More tokens than some calls of the compiled program make.
  options = dict(tokens=19)
  alone = [
    run(trained_enough, prompt, seed=4 + i, **options)
    for i, prompt in enumerate(PROMPTS)
  ]
  assert several(trained_enough, **options) == alone
  assert {len(text) for text in alone} == {options['tokens']}
  # A text that ends leaves the others as they are.
  stop = alone[1][3]
  ended = [text[: text.index(stop)] if stop in text else text for text in alone]
  assert several(trained_enough, stop=stop, **options) == ended


def test_a_text_is_the_same_whatever_its_length(trained_enough):
  long = run(trained_enough, PROMPT, tokens=19)
  for tokens in (1, 2, 8, 16):
    assert run(trained_enough, PROMPT, tokens=tokens) == long[:tokens]


@pytest.mark.parametrize(
  ('kind', 'error'), [('int8', 0.05), ('bfloat16', 0.05)]
)
def test_a_smaller_cache_is_close(trained_enough, kind, error):
  model, params = trained_enough
  tokens_BT = np.array([PROMPT[:4], PROMPT[1:]], np.int32)

  @jax.jit
  def after(caches):
    found = []
    for i in range(0, 4, 2):  # The second half reads the first from the cache.
      logits_BV, caches = generate.advance(
        *(model, params, tokens_BT[:, i : i + 2], caches),
        *(jnp.full(2, i), jnp.full(2, 1)),
      )
      found.append(logits_BV)
    return jnp.stack(found), caches

  exact, _ = after(generate.empty_caches(model, 2, 5))
  found, caches = after(generate.empty_caches(model, 2, 5, kind))
  assert {a.dtype.name for a in jax.tree.leaves(caches)} <= {kind, 'float32'}
  assert jax.tree.leaves(caches)[0].dtype == kind
  difference = np.abs(found - exact).max() / np.abs(exact).max()
  assert 0 < difference < error


def test_a_batch_is_checked(trained_enough):
  with pytest.raises(ValueError, match='2 seeds for 3 prompts'):
    several(trained_enough, seeds=[1, 2])
  with pytest.raises(ValueError, match="kind 'int4'"):
    several(trained_enough, cache='int4')
  with pytest.raises(ValueError, match='empty prompt'):
    generate.batch(
      *trained_enough,
      [[1], []],
      **{**{k: v for k, v in OPTIONS.items() if k != 'seed'}, 'seeds': [0, 0]},
    )
