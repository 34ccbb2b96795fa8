"""Tokenizers rebuilt from GGUF fields against those they were made from."""

import pytest
import tokenizers
from tokenizers import models
from tokenizers import pre_tokenizers

from qat.data import tokenizer as tokenizer_lib
from qat.interop import gguf_tokenizer
from tests.interop import gguf_files

TEXTS = [
  '',
  'the sea, the ship',
  "It's 1999!  Two  spaces\n\nand lines\r\n ",
  'é 日本 🙂 <|endoftext|> the',
]


@pytest.fixture
def fields(tokenizer):
  return gguf_files.tokenizer_fields(tokenizer)


def ids(tokenizer, text):
  return tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize('text', TEXTS)
def test_a_byte_level_bpe_is_the_one_it_was_made_from(tokenizer, fields, text):
  made = gguf_tokenizer.rebuild(fields)
  assert ids(made, text) == ids(tokenizer, text)
  assert made.decode(ids(made, text)) == text
  assert made.get_vocab_size() == 264
  assert list(tokenizer_lib.token_bytes(made)) == list(
    tokenizer_lib.token_bytes(tokenizer)
  )


def test_it_survives_a_file(fields, tmp_path):
  made = gguf_tokenizer.rebuild(fields)
  (tmp_path / 'tokenizer.json').write_text(made.to_str())
  again = tokenizer_lib.load(tmp_path / 'tokenizer.json')
  for text in TEXTS:
    assert ids(again, text) == ids(made, text)


def words(made, text):
  return [text[a:b] for _, (a, b) in made.pre_tokenizer.pre_tokenize_str(text)]


@pytest.mark.parametrize(
  ('pre', 'expected'),
  [
    ('default', "It|'s| 12345| a|\n|\n|b|  | c|!"),
    ('gpt-2', "It|'s| 12345| a|\n|\n|b|  | c|!"),
    ('smollm', "It|'s| |1|2|3|4|5| a|\n|\n|b|  | c|!"),
    ('llama-bpe', "It|'s| |123|45| a|\n\n|b|  | c|!"),
    ('qwen2', "It|'s| |1|2|3|4|5| a|\n\n|b|  | c|!"),
  ],
)
def test_how_text_is_cut_into_words(fields, pre, expected):
  made = gguf_tokenizer.rebuild(fields | {'tokenizer.ggml.pre': pre})
  assert '|'.join(words(made, "It's 12345 a\n\nb   c!")) == expected


def test_a_beginning_is_put_where_the_file_asks_for_it(fields):
  made = gguf_tokenizer.rebuild(fields | {'tokenizer.ggml.add_bos_token': True})
  plain = gguf_tokenizer.rebuild(fields)
  text = TEXTS[1]
  assert plain.encode(text).ids == ids(plain, text)
  assert made.encode(text).ids == [0, *ids(plain, text)]
  assert made.encode('').ids == [0]
  assert ids(made, text) == ids(plain, text)
  # LLaMA 3's files do not say it, and llama.cpp puts it there.
  silent = dict(fields)
  silent.pop('tokenizer.ggml.add_bos_token', None)
  for pre, begun in (('llama-bpe', [0]), ('qwen2', [])):
    made = gguf_tokenizer.rebuild(silent | {'tokenizer.ggml.pre': pre})
    assert made.encode('').ids == begun


# SentencePiece's BPE: three special tokens, the bytes, then the pieces by rank.
PIECES = [
  *('\u2581t', 'he', '\u2581the', 'se', 'sea', '\u2581', 't', 'h', 'e', 's'),
  *('a', ','),
]
TOKENS = [
  '<unk>',
  '<s>',
  '</s>',
  *(f'<0x{b:02X}>' for b in range(256)),
  *PIECES,
]
SPM = {
  'tokenizer.ggml.model': 'llama',
  'tokenizer.ggml.tokens': TOKENS,
  'tokenizer.ggml.scores': [0.0] * 259
  + [-float(i) for i in range(len(PIECES))],
  'tokenizer.ggml.token_type': [2, 3, 3, *[6] * 256, *[1] * len(PIECES)],
  'tokenizer.ggml.bos_token_id': 1,
}


def spm_slowly(text: str) -> list[str]:
  """Merges the pair with the best score, the leftmost of several, and again."""
  score = dict(zip(TOKENS, SPM['tokenizer.ggml.scores'], strict=True))
  parts = list('\u2581' + text.replace(' ', '\u2581'))
  while True:
    pairs = [
      (-score[a + b], i)
      for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False))
      if a + b in PIECES
    ]
    if not pairs:
      break
    i = min(pairs)[1]
    parts[i : i + 2] = [parts[i] + parts[i + 1]]
  found = []
  for part in parts:
    known = part in PIECES
    found += [part] if known else [f'<0x{b:02X}>' for b in part.encode()]
  return found


@pytest.mark.parametrize(
  'text', ['the sea, the tea', 'hesea', 'é the\n', '  a']
)
def test_sentence_piece_merges_by_score(text):
  made = gguf_tokenizer.rebuild(SPM)
  assert made.encode(text, add_special_tokens=False).tokens == spm_slowly(text)
  assert made.encode(text).ids == [1, *ids(made, text)]
  assert made.decode(ids(made, text)) == text


def test_text_is_not_taken_for_a_special_token():
  made = gguf_tokenizer.rebuild(SPM)
  assert 1 not in ids(made, '<s>the')


def test_digits_of_smollm_stand_alone_as_in_its_own_tokenizer(fields):
  # Its published tokenizer.json has these two steps.
  stock = tokenizers.Tokenizer(models.BPE())
  stock.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Digits(individual_digits=True),
      pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
  )
  made = gguf_tokenizer.rebuild(fields | {'tokenizer.ggml.pre': 'smollm'})
  for text in [*TEXTS, 'x1y22 33z ٣٤ ²½']:
    assert words(made, text) == words(stock, text)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'tokenizer.ggml.model': 'bert'}, "kind 'bert'"),
    ({'tokenizer.ggml.pre': 'dbrx'}, "'dbrx'; known are default"),
    ({'tokenizer.ggml.tokens': ['a', 'a']}, 'twice'),
    ({'tokenizer.ggml.token_type': [1]}, 'no type'),
  ],
)
def test_what_cannot_be_rebuilt_is_named(fields, changes, message):
  with pytest.raises(ValueError, match=message):
    gguf_tokenizer.rebuild(fields | changes)
