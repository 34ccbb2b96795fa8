"""A small corpus, and data sets made from it."""

from collections.abc import Callable
import json
import pathlib

import numpy as np
import pytest

from qat.data import prepare
from tests import tiny

WORDS = 'the sea was calm and a ship, Élise said; under “grey” skies: 日本 🙂\n'


def make_texts(n: int, seed: int) -> list[str]:
  """`n` documents of 1 to 400 words; no two are the same."""
  rng = np.random.default_rng(seed)
  words = WORDS.split(' ')
  return [
    f'{i} ' + ' '.join(rng.choice(words, rng.integers(1, 400)))
    for i in range(n)
  ]


@pytest.fixture(scope='session')
def texts() -> list[str]:
  return make_texts(120, 0)


@pytest.fixture(scope='session')
def jsonl(
  tmp_path_factory: pytest.TempPathFactory, texts: list[str]
) -> pathlib.Path:
  """`texts` as JSON lines."""
  path = tmp_path_factory.mktemp('corpus') / 'texts.jsonl'
  path.write_text(''.join(json.dumps({'text': t}) + '\n' for t in texts))
  return path


@pytest.fixture(scope='session')
def options() -> Callable[..., prepare.Options]:
  """Makes options for `texts`; keyword arguments change them."""

  def make(**changes: object) -> prepare.Options:
    fields = dict(valid_fraction=0.1, shard_tokens=12_000)
    return tiny.options(**fields | changes)

  return make


@pytest.fixture(scope='session')
def prepared(
  tmp_path_factory: pytest.TempPathFactory,
  jsonl: pathlib.Path,
  options: Callable[..., prepare.Options],
) -> pathlib.Path:
  """A data set of `texts` with several shards; tests do not change it."""
  out = tmp_path_factory.mktemp('prepared') / 'set'
  return prepare.prepare([str(jsonl)], out, options())
