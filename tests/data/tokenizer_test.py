"""The round trip of text, and the bytes of tokens."""

import hypothesis
from hypothesis import strategies as st
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders
from tokenizers import models

from qat.data import tokenizer as tokenizer_lib


@pytest.fixture(scope='module')
def bpe(texts: list[str]) -> tokenizers.Tokenizer:
  return tokenizer_lib.train(texts, 300)


# Text with the things that tokenizers trip over.
TEXT = st.lists(
  st.text()
  | st.sampled_from(['<|endoftext|>', ' ', '\r\n', '\x00', '\u2581', 'the sea'])
).map(''.join)


@hypothesis.given(text=TEXT)
def test_any_text_comes_back(bpe: tokenizers.Tokenizer, text: str) -> None:
  (ids,) = tokenizer_lib.encode(bpe, [text])
  assert bpe.decode(ids.tolist(), skip_special_tokens=False) == text


@hypothesis.given(text=TEXT)
def test_bytes_of_tokens_are_the_bytes_of_the_text(
  bpe: tokenizers.Tokenizer, text: str
) -> None:
  (ids,) = tokenizer_lib.encode(bpe, [text])
  assert tokenizer_lib.token_bytes(bpe)[ids].sum() == len(text.encode())


@hypothesis.given(text=TEXT)
def test_no_text_contains_the_end_of_text(
  bpe: tokenizers.Tokenizer, text: str
) -> None:
  eot = tokenizer_lib.end_of_text_id(bpe, tokenizer_lib.END_OF_TEXT)
  assert eot not in tokenizer_lib.encode(bpe, [text])[0]
  assert tokenizer_lib.token_bytes(bpe)[eot] == 0


def test_training_is_deterministic_and_exact_in_size(texts: list[str]) -> None:
  first = tokenizer_lib.train(iter(texts), 290)
  assert first.to_str() == tokenizer_lib.train(texts, 290).to_str()
  assert tokenizer_lib.vocab_size(first) == 290
  other = tokenizer_lib.train(texts, 290, '</s>')
  assert tokenizer_lib.end_of_text_id(other, '</s>') == 0


def test_a_file_gives_the_same_tokens(
  bpe: tokenizers.Tokenizer, tmp_path, texts: list[str]
) -> None:
  path = tmp_path / 'tokenizer.json'
  bpe.save(str(path))
  found = tokenizer_lib.encode(tokenizer_lib.load(path), ['<|endoftext|>'])
  np.testing.assert_array_equal(
    found[0], tokenizer_lib.encode(bpe, ['<|endoftext|>'])[0]
  )


@pytest.mark.parametrize('size', [0, 256, 1 << 23])
def test_impossible_sizes_are_refused(size: int) -> None:
  with pytest.raises(ValueError, match=f'vocab_size {size} is not in 257'):
    tokenizer_lib.train(['text'], size)


def test_too_little_text_says_how_much_it_is_enough_for() -> None:
  with pytest.raises(ValueError, match='enough for 258 tokens'):
    tokenizer_lib.train(['ab ab'], 1000)


def test_files_that_are_no_tokenizer_are_refused(tmp_path) -> None:
  path = tmp_path / 'tokenizer.json'
  with pytest.raises(FileNotFoundError, match='No tokenizer file'):
    tokenizer_lib.load(path)
  path.write_text('{"model": ' + '[' * 100_000)
  with pytest.raises(ValueError, match='is not a Hugging Face tokenizer.json'):
    tokenizer_lib.load(path)


def test_a_huge_token_id_is_refused_before_it_costs_memory(tmp_path) -> None:
  path = tmp_path / 'tokenizer.json'
  small = tokenizers.Tokenizer(models.BPE({'a': 0, 'b': 12345}, []))
  path.write_text(small.to_str().replace('12345', str(2**31)))
  with pytest.raises(ValueError, match=f'token id {2**31}'):
    tokenizer_lib.load(path)


def test_a_missing_end_of_text_lists_the_special_tokens(
  bpe: tokenizers.Tokenizer,
) -> None:
  with pytest.raises(ValueError, match=r"no token '</s>'.*<\|endoftext\|>"):
    tokenizer_lib.end_of_text_id(bpe, '</s>')


def test_bytes_of_a_vocabulary_with_byte_fallback() -> None:
  vocabulary = {'</s>': 0, '<0xE6>': 1, '\u2581the': 2, 'é': 3, 'x': 5}
  tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, []))
  tokenizer.add_special_tokens(['</s>'])
  tokenizer.decoder = decoders.Sequence(
    [decoders.Replace('\u2581', ' '), decoders.ByteFallback(), decoders.Fuse()]
  )
  # Id 4 is a gap: nothing has it.
  assert tokenizer_lib.token_bytes(tokenizer).tolist() == [0, 1, 4, 2, 0, 1]


def test_a_vocabulary_of_unknown_bytes_is_refused() -> None:
  tokenizer = tokenizers.Tokenizer(models.WordPiece({'a': 0}))
  tokenizer.decoder = decoders.WordPiece()
  with pytest.raises(ValueError, match='how many bytes a token stands for'):
    tokenizer_lib.token_bytes(tokenizer)
