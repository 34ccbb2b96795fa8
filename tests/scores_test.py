"""Log-probabilities of continuations, against one request at a time."""

import contextlib

import jax
import numpy as np
import pytest

from qat import scores
from qat.data import tokenizer as tokenizer_lib
from qat.nn import transformer
from tests import tiny

TEXTS = ['the sea was calm and the ship was calm ' * 9, 'a ship, said she']


@pytest.fixture(autouse=True, scope='module')
def quickly():
  with tiny.compiled_quickly():
    yield


@pytest.fixture(scope='module')
def tokenizer():
  return tokenizer_lib.train(TEXTS, 270)


def encode(tokenizer, *requests, start=(), longest=0):
  requests = [scores.Request(*r) for r in requests]
  return scores.encode(tokenizer, requests, start=start, longest=longest)


def halves(tokenizer, tokens):
  """The texts of what is read for the context, and of what is scored."""
  cut = len(tokens.ids) - tokens.scored
  return tokenizer.decode(tokens.ids[:cut]), tokenizer.decode(tokens.ids[cut:])


def test_a_continuation_is_what_the_whole_text_has_more(tokenizer):
  (tokens,) = encode(tokenizer, ('the sea', ' was calm'))
  assert halves(tokenizer, tokens) == ('the sea', ' was calm')
  assert tokens.ids.dtype == np.int32
  assert not tokens.cut
  whole = tokenizer.encode('the sea was calm', add_special_tokens=False).ids
  assert tokens.ids.tolist() == whole


def test_spaces_at_the_end_of_a_context_are_the_continuations(tokenizer):
  expected, found, lines = encode(
    tokenizer, ('the sea', ' was'), ('the sea ', 'was'), ('the sea \n', 'was')
  )
  np.testing.assert_array_equal(found.ids, expected.ids)
  assert found.scored == expected.scored
  assert halves(tokenizer, lines) == ('the sea', ' \nwas')


def test_the_split_is_by_the_number_of_the_contexts_tokens(tokenizer):
  """Alone 'the sea w' ends in ' ', 'w'; the whole text has ' was' there."""
  (tokens,) = encode(tokenizer, ('the sea w', 'as calm calm'))
  whole = tokenizer.encode('the sea was calm calm')
  assert whole.tokens == ['the', 'Ġs', 'e', 'a', 'Ġwas', *['Ġcalm'] * 2]
  assert tokens.ids.tolist() == whole.ids
  assert tokens.scored == 1


def test_what_begins_a_text_is_never_scored(tokenizer):
  (bare,) = encode(tokenizer, ('the sea', ' was'))
  (found,) = encode(tokenizer, ('the sea', ' was'), start=[0])
  assert found.ids.tolist() == [0, *bare.ids]
  assert found.scored == bare.scored
  (alone,) = encode(tokenizer, ('', 'was'), start=[0])
  assert halves(tokenizer, alone) == (tokenizer.decode([0]), 'was')


def test_a_long_context_loses_its_beginning(tokenizer):
  (whole,) = encode(tokenizer, (TEXTS[0], ' the ship'), start=[0])
  (cut,) = encode(tokenizer, (TEXTS[0], ' the ship'), start=[0], longest=9)
  assert cut.cut and not whole.cut
  assert len(cut.ids) == 10, 'Nine are read, and the last is predicted.'
  assert cut.scored == whole.scored
  np.testing.assert_array_equal(cut.ids, whole.ids[-10:])
  # The longest that is not cut.
  (same,) = encode(
    tokenizer, (TEXTS[0], ' the ship'), start=[0], longest=len(whole.ids) - 1
  )
  assert same.ids.tolist() == whole.ids.tolist() and not same.cut


@pytest.mark.parametrize(
  ('request_', 'longest'),
  [
    (('', 'was'), 0),
    (('the sea', ' was calm and the ship'), 3),
    (('the sea wa', 's'), 0),  # Fewer tokens than the context alone.
  ],
)
def test_a_continuation_needs_tokens_and_one_before_them(
  tokenizer, request_, longest
):
  with pytest.raises(ValueError, match='tokens of its own'):
    encode(tokenizer, request_, longest=longest)


def test_lengths_are_few():
  found = [scores.padded(n) for n in range(1, 2049)]
  assert all(n <= size for n, size in enumerate(found, 1))
  assert sorted({*found}) == [
    32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048
  ]  # fmt: skip
  assert found == sorted(found)


def test_scores_are_those_of_each_request_alone():
  config = tiny.config('fp', tiny.EXACT)
  model = transformer.build(config, 'cpu', 1)
  params = tiny.params(model)
  # Sure of itself: the likeliest token is the right one now and then.
  params['final_norm']['scale'] = params['final_norm']['scale'] * 6
  logits = jax.jit(
    lambda tokens: model.apply({'params': params}, tokens, method='logits')[0]
  )
  rng = np.random.default_rng(0)
  requests, expected = [], []
  for i in range(40):
    length = int(rng.integers(2, 49))
    scored = int(rng.integers(1, min(length, 12)))
    ids = rng.integers(0, 64, length).astype(np.int32)
    padded = np.zeros((1, 48), np.int32)
    if i % 2:  # What the model itself would say.
      for t in range(length - scored, length):
        padded[0, :t] = ids[:t]
        ids[t] = int(np.argmax(logits(padded)[0, t - 1]))
    padded[0, :length] = ids
    logits_TV = np.asarray(logits(padded)[0, : length - 1], np.float64)
    log_p_TV = logits_TV - np.log(np.exp(logits_TV).sum(-1, keepdims=True))
    at = np.arange(length - 1 - scored, length - 1)
    targets = ids[-scored:]
    requests.append(scores.Tokens(ids, scored, False))
    expected.append(
      (
        -log_p_TV[at, targets].sum(),
        bool(np.all(logits_TV[at].argmax(-1) == targets)),
      )
    )
  step = scores.make_step(config, model)
  long = [i for i, r in enumerate(requests) if len(r.ids) > 33]
  limits = []

  @contextlib.contextmanager
  def limit():
    limits.append('begun')
    yield
    limits[-1] = 'done'

  for batch_tokens, longest, some in ((256, 0, range(40)), (1, 47, long)):
    found = scores.score(
      step,
      params,
      tiny.mesh(config),
      [requests[i] for i in some],
      batch_tokens=batch_tokens,
      longest=longest,
      label='task',
      limit=limit,
    )
    nats, greedy = zip(*found, strict=True)
    np.testing.assert_allclose(
      nats, [expected[i][0] for i in some], rtol=2e-5, atol=2e-5
    )
    assert list(greedy) == [expected[i][1] for i in some]
  assert 10 < sum(right for _, right in expected) < 35
  # One for each batch: the last ones are of one request each.
  assert limits[-len(long) :] == ['done'] * len(long) < limits


def test_choices_of_one_token_share_a_row():
  config = tiny.config('fp', tiny.EXACT)
  model = transformer.build(config, 'cpu', 1)
  params = tiny.params(model)
  step = scores.make_step(config, model)
  context = [5, 9, 2, 7]
  requests = [
    scores.Tokens(np.array(ids, np.int32), scored, False)
    for ids, scored in (
      ([*context, 1], 1),
      ([3, 8], 1),
      ([*context, 4], 1),
      ([*context, 4], 2),  # Behind fewer tokens of context.
      ([3, 6], 1),  # One token has room for one target.
      ([*context, 1, 2], 2),
    )
  ]

  def score(requests):
    batches = []
    found = scores.score(
      step,
      params,
      tiny.mesh(config),
      requests,
      batch_tokens=1,  # A batch for each row.
      longest=0,
      label='',
      limit=lambda: contextlib.nullcontext(batches.append(1)),
    )
    return found, len(batches)

  found, rows = score(requests)
  assert rows == 4
  for request, together in zip(requests, found, strict=True):
    (alone,), _ = score([request])
    np.testing.assert_allclose(together.nats, alone.nats, rtol=1e-6)
    assert together.greedy == alone.greedy
