"""Byte-level BPE: text to token ids and back, and the bytes a token stands for.

Any Hugging Face `tokenizer.json` can be used in its place.
"""

from collections.abc import Iterable
from collections.abc import Sequence
import os
import re

import numpy as np
import tokenizers
from tokenizers import decoders
from tokenizers import models
from tokenizers import pre_tokenizers
from tokenizers import trainers

END_OF_TEXT = '<|endoftext|>'
# The 256 byte values and the end of text.
MIN_VOCAB_SIZE = 257
# Past any real vocabulary: a file that asks for more is damaged or hostile, and
# everything that is one number a token would be allocated at its word.
MAX_VOCAB_SIZE = 1 << 22


def train(
  texts: Iterable[str], vocab_size: int, end_of_text: str = END_OF_TEXT
) -> tokenizers.Tokenizer:
  """Trains a lossless byte-level BPE whose token 0 is the end of text.

  Args:
    texts: the documents; read once, in bounded memory.
    vocab_size: tokens, including the 256 bytes and the end of text.
    end_of_text: how token 0 is written.

  Returns:
    The tokenizer. It has exactly `vocab_size` tokens.

  Raises:
    ValueError: if the vocabulary cannot hold the bytes, or if the text has too
      few repeated words to fill it.
  """
  if not MIN_VOCAB_SIZE <= vocab_size <= MAX_VOCAB_SIZE:
    raise ValueError(
      f'vocab_size {vocab_size} is not in {MIN_VOCAB_SIZE}..{MAX_VOCAB_SIZE}:'
      ' a byte-level vocabulary holds 256 bytes and the end of text.'
    )
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size,
    min_frequency=2,
    special_tokens=[end_of_text],
    initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    show_progress=False,
  )
  tokenizer.train_from_iterator(texts, trainer)
  found = tokenizer.get_vocab_size()
  if found != vocab_size:
    raise ValueError(
      f'The text is enough for {found} tokens and vocab_size is {vocab_size};'
      f' ask for at most {found}, or give more text.'
    )
  tokenizer.encode_special_tokens = True
  return tokenizer


def load(path: str | os.PathLike[str]) -> tokenizers.Tokenizer:
  """Reads a `tokenizer.json`; text that looks like a special token stays text.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: if the file is not a tokenizer, or its ids are out of bounds.
  """
  if not os.path.isfile(path):
    raise FileNotFoundError(f'No tokenizer file {os.fspath(path)!r}.')
  try:
    tokenizer = tokenizers.Tokenizer.from_file(os.fspath(path))
  except Exception as error:  # The library raises bare Exception.
    raise ValueError(
      f'{os.fspath(path)!r} is not a Hugging Face tokenizer.json: {error}'
    ) from error
  size = vocab_size(tokenizer)
  if size > MAX_VOCAB_SIZE:
    raise ValueError(
      f'{os.fspath(path)!r} has token id {size - 1}; the largest that is'
      f' supported is {MAX_VOCAB_SIZE - 1}.'
    )
  # A document is text, all of it: no padding, nothing cut, and a literal
  # "<|endoftext|>" in it must not end it.
  tokenizer.no_padding()
  tokenizer.no_truncation()
  tokenizer.encode_special_tokens = True
  return tokenizer


def vocab_size(tokenizer: tokenizers.Tokenizer) -> int:
  """One more than the largest id: ids may have gaps."""
  return (
    max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
  )


def end_of_text_id(tokenizer: tokenizers.Tokenizer, token: str) -> int:
  """The id of `token`, or a ValueError that lists the special tokens."""
  found = tokenizer.token_to_id(token)
  if found is None:
    special = [
      added.content
      for added in tokenizer.get_added_tokens_decoder().values()
      if added.special
    ]
    raise ValueError(
      f'The tokenizer has no token {token!r} to end a document with; its'
      f' special tokens are {special}. Choose one (--end-of-text).'
    )
  return found


def encode(
  tokenizer: tokenizers.Tokenizer, texts: Sequence[str]
) -> list[np.ndarray]:
  """The ids of each text, int64, without any token that is not of the text."""
  found = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
  return [np.array(encoding.ids, np.int64) for encoding in found]


def token_bytes(tokenizer: tokenizers.Tokenizer) -> np.ndarray:
  """The UTF-8 bytes each token stands for, so that bits per byte is exact.

  Special tokens stand for no text: 0. Byte-level vocabularies (GPT-2's kind)
  and those with byte fallback (LLaMA's kind; U+2581 is a space) are known.

  Args:
    tokenizer: any Hugging Face tokenizer.

  Returns:
    int32 [V].

  Raises:
    ValueError: if the tokenizer is of neither kind.
  """
  decoder = repr(tokenizer.decoder)
  if 'ByteLevel' in decoder:
    # One character stands for one byte.
    size = len
  elif 'ByteFallback' in decoder:
    size = _fallback_bytes
  else:
    raise ValueError(
      f'The tokenizer decodes with {decoder[:80]}, which does not say how many'
      ' bytes a token stands for; use a byte-level BPE or one with byte'
      ' fallback.'
    )
  added = tokenizer.get_added_tokens_decoder()
  out_V = np.zeros(vocab_size(tokenizer), np.int32)
  for token, index in tokenizer.get_vocab(with_added_tokens=True).items():
    if index not in added:
      out_V[index] = size(token)
    elif not added[index].special:
      out_V[index] = len(token.encode())
  return out_V


def _fallback_bytes(token: str) -> int:
  if re.fullmatch('<0x[0-9A-F]{2}>', token):
    return 1
  return len(token.replace('\u2581', ' ').encode())
