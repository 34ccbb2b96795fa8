"""Windows of a data set and whole prompts."""

import json

from ml_collections import ConfigDict
import numpy as np
import pytest

from qat.data import loader
from qat.ptq import examples
from tests import tiny


@pytest.fixture(scope='module')
def dataset(tmp_path_factory):
  return tiny.dataset(tmp_path_factory.mktemp('data'))


def section(**changes):
  fields = dict(sequences=6, length=16, seed=3, field='text')
  return ConfigDict(fields | changes)


def test_windows_are_those_of_the_training_split(dataset):
  found = examples.from_dataset(dataset, section())
  assert found.tokens_ST.shape == (6, 16) and found.weights_ST.all()
  expected = loader.calibration_batch(dataset, seq_len=16, sequences=6, seed=3)
  np.testing.assert_array_equal(found.tokens_ST, expected)
  other = examples.from_dataset(dataset, section(seed=4))
  assert np.any(other.tokens_ST != found.tokens_ST)
  assert other.digest != found.digest
  assert examples.from_dataset(dataset, section()).digest == found.digest


def test_too_few_tokens_are_told_with_the_way_out(dataset):
  with pytest.raises(ValueError, match='fewer than') as error:
    examples.from_dataset(dataset, section(sequences=10**6))
  for part in ('config.calibration.length=16', 'sequences=1000000', 'Lower'):
    assert part in str(error.value)
  with pytest.raises(ValueError, match='has 0 training sequences'):
    examples.from_dataset(dataset, section(length=10**7))


@pytest.fixture
def prompts(tmp_path):
  """40 texts of 3 to 12 characters, each of them a token."""
  rng = np.random.default_rng(0)
  texts = ['x' * n for n in rng.integers(3, 13, 40)]
  file = tmp_path / 'task.jsonl'
  file.write_text(''.join(json.dumps({'text': t}) + '\n' for t in texts))
  return file


def encode(text):
  return [1] + [7] * len(text)


def test_whole_prompts_are_taken_until_the_budget(prompts):
  found = examples.from_prompts(prompts, section(), encode)
  lengths = found.weights_ST.sum(1).astype(int)
  assert found.tokens_ST.shape == found.weights_ST.shape
  assert found.tokens_ST.shape[1] == lengths.max()
  assert 96 - 13 < lengths.sum() <= 96
  for tokens_T, weights_T, n in zip(
    found.tokens_ST, found.weights_ST, lengths, strict=True
  ):
    assert tokens_T[:n].tolist() == [1] + [7] * (n - 1)
    assert not tokens_T[n:].any() and not weights_T[n:].any()
  other = examples.from_prompts(prompts, section(seed=5), encode)
  assert other.digest != found.digest


def test_texts_may_be_as_long_as_the_budget(tmp_path):
  file = tmp_path / 'task.jsonl'
  file.write_text('{"text": "abcdefghijk"}\n' * 8)  # 12 tokens each, of 96.
  assert examples.from_prompts(file, section(), encode).count == 8


@pytest.mark.parametrize(
  ('content', 'changes', 'expected'),
  [
    ('{"text": "abcd"}\n' * 3, {}, 'has 15 tokens in 3 texts, fewer than'),
    ('{"text": "abcd"}\nnope\n', {}, 'task.jsonl:2: no JSON object'),
    ('{"body": "abcd"}\n', {}, "'text'"),
    ('{"text": 5}\n', {}, 'task.jsonl:1: .* is int, not a text'),
    ('[1]\n', {}, 'task.jsonl:1'),
    ('{"text": "' + 200 * 'a' + '"}\n', {}, 'no text fits into 96 tokens'),
    ('{"text": ""}\n', {}, 'text 1 has 1 tokens; at least 2'),
  ],
)
def test_a_file_that_is_no_list_of_texts_is_refused(
  tmp_path, content, changes, expected
):
  file = tmp_path / 'task.jsonl'
  file.write_text(content)
  with pytest.raises(ValueError, match=expected):
    examples.from_prompts(file, section(**changes), encode)


def test_lines_end_where_json_lines_end(tmp_path):
  file = tmp_path / 'texts.jsonl'
  line = json.dumps({'text': 'a\u2028b \x85 c'}, ensure_ascii=False)
  file.write_text(f'{line}\r\n{line}\n\n', 'utf-8')
  assert examples._texts(file, 'text') == ['a\u2028b \x85 c'] * 2


def test_a_file_that_is_not_there_is_told(tmp_path):
  with pytest.raises(FileNotFoundError, match='config.calibration.prompts'):
    examples.from_prompts(tmp_path / 'x', section(), encode)


def test_the_last_batch_is_filled_with_padding(prompts):
  found = examples.from_prompts(prompts, section(), encode)
  batches = list(found.batches(4))
  assert len(batches) == -(-found.count // 4)
  tokens = np.concatenate([tokens for tokens, _ in batches])
  weights = np.concatenate([weights for _, weights in batches])
  np.testing.assert_array_equal(tokens[: found.count], found.tokens_ST)
  np.testing.assert_array_equal(weights[: found.count], found.weights_ST)
  assert not weights[found.count :].any()


def test_rows_are_real_tokens_of_every_sequence(prompts):
  found = examples.from_prompts(prompts, section(), encode)
  assert found.rows(0, 4, 0) is None
  rows = found.rows(2 * found.count - 1, 4, seed=0)
  assert rows.shape == (-(-found.count // 4) * 4, 2)
  for s in range(found.count):
    assert found.weights_ST[s, rows[s]].all() and rows[s, 0] != rows[s, 1]
  # More than a sequence has: some are taken twice.
  rows = found.rows(20 * found.count, 4, seed=0)
  assert found.weights_ST[0, rows[0]].all()
