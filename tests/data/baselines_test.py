"""The baselines against slow ones."""

import gzip
import math
import pathlib

import numpy as np
import pytest

from qat.data import baselines
from qat.data import dataset as dataset_lib


def test_gzip_is_gzip() -> None:
  text = b'the sea was calm, the ship was slow. ' * 500
  expected = 8 * len(gzip.compress(text, 9))
  assert baselines.gzip_bits([text]) == expected
  assert baselines.gzip_bits([text[:999], b'', text[999:]]) == expected


def test_unigram_by_hand() -> None:
  # Of 4 + 3 tokens with one added to each: 3/7, 3/7 and 1/7.
  found = baselines.unigram_bits(np.array([2, 2, 0]), np.array([1, 0, 2]))
  assert found == pytest.approx(-math.log2(3 / 7) - 2 * math.log2(1 / 7))


def test_the_baselines_are_what_they_say(
  prepared: pathlib.Path, texts: list[str]
) -> None:
  opened = dataset_lib.open_dataset(prepared)
  valid = opened.manifest['splits']['valid']
  streams = []
  for split in dataset_lib.SPLITS:
    stream = dataset_lib.Stream(opened, split)
    streams.append(stream.read(1, len(stream)))
  train_tokens, valid_tokens = streams
  counts = {t: 1 for t in range(opened.vocab_size)}
  for token in train_tokens.tolist():
    counts[token] += 1
  total = sum(counts.values())
  bits = sum(-np.log2(counts[t] / total) for t in valid_tokens.tolist())
  np.testing.assert_allclose(
    valid['unigram_bits_per_byte'], bits / valid['bytes']
  )
  chosen = opened.tokenizer.decode(valid_tokens.tolist())
  text = ''.join(t for t in texts if t in chosen).encode()
  assert len(text) == valid['bytes']
  assert valid['gzip_bits_per_byte'] == (
    8 * len(gzip.compress(text, 9)) / len(text)
  )
