"""A GGUF file's tokenizer, rebuilt from its fields as a `tokenizer.json`.

`tokenizer.ggml.model` is 'gpt2' (a byte-level BPE with its merges) or 'llama'
(SentencePiece's BPE: scores in the place of merges). How text is cut into words
before merging is only named there, in `tokenizer.ggml.pre`; the names known
here are the keys of `WORDS`.
"""

from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import tokenizers
from tokenizers import decoders
from tokenizers import models
from tokenizers import normalizers
from tokenizers import pre_tokenizers
from tokenizers import processors

# Token types of GGUF.
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_AFTER_NUMBERS = (
  r'| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'  # Signs, spaces.
)
_LETTERS = r'|[^\r\n\p{L}\p{N}]?\p{L}+'
# What a word is. None: GPT-2's own expression.
WORDS: dict[str, list[str | None]] = {
  'default': [None],
  'gpt-2': [None],
  'smollm': [r'\p{N}', None],  # Digits stand alone.
  'llama-bpe': [_CONTRACTIONS + _LETTERS + r'|\p{N}{1,3}' + _AFTER_NUMBERS],
  'qwen2': [_CONTRACTIONS + _LETTERS + r'|\p{N}' + _AFTER_NUMBERS],
}


def rebuild(fields: Mapping[str, Any]) -> tokenizers.Tokenizer:
  """The tokenizer of a GGUF file.

  Args:
    fields: of the file, by name.

  Returns:
    The tokenizer. `encode(text)` puts the beginning of a text first where the
    file asks for it; with `add_special_tokens=False` it does not.

  Raises:
    ValueError: a kind of tokenizer that is not known here.
    KeyError: a field is missing.
  """
  tokens = fields['tokenizer.ggml.tokens']
  types = fields.get('tokenizer.ggml.token_type', [1] * len(tokens))
  if len(set(tokens)) != len(tokens) or len(types) != len(tokens):
    raise ValueError('tokens come twice, or have no type each.')
  kind = fields['tokenizer.ggml.model']
  if kind == 'gpt2':
    made = _byte_level(fields, tokens)
    # As in llama.cpp: LLaMA 3's files do not say it.
    default_begin = fields.get('tokenizer.ggml.pre') == 'llama-bpe'
  elif kind == 'llama':
    made = _sentence_piece(fields, tokens, types)
    default_begin = True
  else:
    raise ValueError(f"it is of kind {kind!r}; known are 'gpt2' and 'llama'.")
  made.add_special_tokens(
    [t for t, type in zip(tokens, types, strict=True) if type == _CONTROL]
  )
  made.add_tokens(
    [
      tokenizers.AddedToken(t, normalized=False)
      for t, type in zip(tokens, types, strict=True)
      if type == _USER_DEFINED
    ]
  )
  if fields.get('tokenizer.ggml.add_bos_token', default_begin):
    begin = int(fields['tokenizer.ggml.bos_token_id'])
    made.post_processor = processors.TemplateProcessing(
      single=f'{tokens[begin]} $A', special_tokens=[(tokens[begin], begin)]
    )
  made.encode_special_tokens = True  # A text's '<s>' is four characters.
  return made


def _byte_level(
  fields: Mapping[str, Any], tokens: Sequence[str]
) -> tokenizers.Tokenizer:
  pre = fields.get('tokenizer.ggml.pre', 'default')
  if pre not in WORDS:
    raise ValueError(
      f'its pre-tokenizer is {pre!r}; known are {", ".join(WORDS)}.'
    )
  merges = [tuple(m.split(' ')) for m in fields['tokenizer.ggml.merges']]
  made = tokenizers.Tokenizer(
    models.BPE(
      vocab={token: i for i, token in enumerate(tokens)},
      merges=merges,
      # LLaMA 3 takes a word that is a token as it is.
      ignore_merges=pre == 'llama-bpe',
    )
  )
  if pre == 'qwen2':
    made.normalizer = normalizers.NFC()
  steps = []
  for expression in WORDS[pre]:
    if expression is not None:
      steps.append(
        pre_tokenizers.Split(tokenizers.Regex(expression), 'isolated')
      )
  own = None in WORDS[pre]
  steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=own))
  made.pre_tokenizer = pre_tokenizers.Sequence(steps)
  made.decoder = decoders.ByteLevel()
  return made


def _sentence_piece(
  fields: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]
) -> tokenizers.Tokenizer:
  """LLaMA 1 and 2: of all pairs, the one whose token has the best score."""
  scores = fields['tokenizer.ggml.scores']
  ids = {token: i for i, token in enumerate(tokens)}
  pairs = []
  for token, i in ids.items():
    for cut in range(1, len(token)) if types[i] == 1 else ():
      left, right = token[:cut], token[cut:]
      if left in ids and right in ids:
        pairs.append((-scores[i], ids[left], ids[right], left, right))
  unknown = [
    t for t, type in zip(tokens, types, strict=True) if type == _UNKNOWN
  ]
  made = tokenizers.Tokenizer(
    models.BPE(
      vocab=ids,
      merges=[pair[3:] for pair in sorted(pairs)],
      unk_token=unknown[0] if unknown else None,
      fuse_unk=True,
      byte_fallback=True,
    )
  )
  prefix = fields.get('tokenizer.ggml.add_space_prefix', True)
  steps = [normalizers.Prepend('\u2581')] if prefix else []
  made.normalizer = normalizers.Sequence(
    [*steps, normalizers.Replace(' ', '\u2581')]
  )
  made.decoder = decoders.Sequence(
    [
      decoders.Replace('\u2581', ' '),
      decoders.ByteFallback(),
      decoders.Fuse(),
      *([decoders.Strip(' ', 1, 0)] if prefix else []),
    ]
  )
  return made
