"""Decoding by llama.cpp, to compare with: a model of random 1-bit weights.

The weights of linears are Q1_0: blocks of 128 along a row, each a float16 scale
d and then a bit a weight, the lowest of a byte first; 1 stands for d, 0 for -d.
Embedding and head are one float16 matrix, norms are float32. llama.cpp's C
interface is called token by token.
"""

from collections.abc import Iterator
from collections.abc import Sequence
import logging
import os
import pathlib
import tempfile
import weakref

import jax
from ml_collections import ConfigDict
import numpy as np

from qat.infer import measure

BLOCK = 128  # Weights of a row that have one scale.


def q1_0(positive_NK: np.ndarray, scale_NB: np.ndarray) -> np.ndarray:
  """Packs rows of weights, which are plus or minus their block's scale.

  Args:
    positive_NK: bool `[N, K]`; K is a multiple of `BLOCK`.
    scale_NB: float16 `[N, K / BLOCK]`.

  Returns:
    uint8 `[N, K / BLOCK * 18]`.

  Raises:
    ValueError: K is no multiple of `BLOCK`.
  """
  N, K = positive_NK.shape
  if K % BLOCK:
    raise ValueError(f'Rows of {K} weights; Q1_0 has multiples of {BLOCK}.')
  bits = np.packbits(
    positive_NK.reshape(N, -1, BLOCK), axis=-1, bitorder='little'
  )
  scales = scale_NB.astype('<f2')[..., None].view(np.uint8)
  return np.concatenate([scales, bits], -1).reshape(N, -1)


def hidden_width(config: ConfigDict) -> int:
  """The config's hidden width, filled up to whole blocks."""
  return -(-config.model.d_ff // BLOCK) * BLOCK


def write(path: pathlib.Path, config: ConfigDict, seed: int) -> int:
  """Writes a GGUF file of llama.cpp's architecture 'llama'.

  Args:
    path: where.
    config: of a model with a gated feed-forward layer and a tied head, of
      which the shape is taken; the hidden width is `hidden_width(config)`.
    seed: of the weights.

  Returns:
    The bytes of all tensors.

  Raises:
    ImportError: the package `gguf` is missing.
    ValueError: a width is no multiple of `BLOCK`.
  """
  import gguf

  rng = np.random.default_rng(seed)
  model, hidden = config.model, hidden_width(config)
  D, head = model.d_model, model.d_model // model.n_heads
  file = gguf.GGUFWriter(path, 'llama')
  file.add_block_count(model.n_layers)
  file.add_context_length(config.data.seq_len)
  file.add_embedding_length(D)
  file.add_feed_forward_length(hidden)
  file.add_head_count(model.n_heads)
  file.add_head_count_kv(model.n_kv_heads)
  file.add_rope_dimension_count(head)
  file.add_rope_freq_base(model.rope_theta)
  file.add_layer_norm_rms_eps(model.norm_eps)
  file.add_vocab_size(model.vocab_size)
  file.add_tokenizer_model('none')
  size = 0

  def add(name: str, data: np.ndarray, **kind) -> None:
    nonlocal size
    size += data.nbytes
    file.add_tensor(f'{name}.weight', data, **kind)

  values_VD = 0.02 * rng.standard_normal((model.vocab_size, D), np.float32)
  add('token_embd', values_VD.astype(np.float16))
  add('output_norm', np.ones(D, np.float32))
  queries, keys = model.n_heads * head, model.n_kv_heads * head
  for layer in range(model.n_layers):
    for name in ('attn_norm', 'ffn_norm'):
      add(f'blk.{layer}.{name}', np.ones(D, np.float32))
    for name, N, K in (
      ('attn_q', queries, D),
      ('attn_k', keys, D),
      ('attn_v', keys, D),
      ('attn_output', D, queries),
      ('ffn_gate', hidden, D),
      ('ffn_up', hidden, D),
      ('ffn_down', D, hidden),
    ):
      positive_NK = rng.integers(0, 2, (N, K), np.uint8).astype(bool)
      scale_NB = rng.uniform(0.01, 0.03, (N, K // BLOCK)).astype(np.float16)
      add(
        f'blk.{layer}.{name}',
        q1_0(positive_NK, scale_NB),
        raw_dtype=gguf.GGMLQuantizationType.Q1_0,
      )
  file.write_header_to_file()
  file.write_kv_data_to_file()
  file.write_tensors_to_file()
  file.close()
  return size


class Decoder:
  """One text at a time, by llama.cpp on the CPUs that this process may use."""

  def __init__(self, path: pathlib.Path, positions: int) -> None:
    """Reads the file into memory; it may be deleted then.

    Args:
      path: a GGUF file.
      positions: tokens of the longest text.

    Raises:
      ImportError: the package `llama_cpp` is missing.
      RuntimeError: llama.cpp takes no such file.
    """
    import llama_cpp

    logging.getLogger('llama-cpp-python').setLevel(logging.CRITICAL)
    self._cpp = llama_cpp
    llama_cpp.llama_backend_init()
    how = llama_cpp.llama_model_default_params()
    how.n_gpu_layers = 0
    # Into memory that malloc gives, as XLA's, rather than mapped pages.
    how.load_mode = llama_cpp.LLAMA_LOAD_MODE_NONE
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), how)
    if not model:
      raise RuntimeError(f'llama.cpp cannot read {path}.')
    weakref.finalize(self, llama_cpp.llama_model_free, model)
    how = llama_cpp.llama_context_default_params()
    how.n_ctx = positions
    how.n_threads = how.n_threads_batch = len(os.sched_getaffinity(0))
    self._context = llama_cpp.llama_init_from_model(model, how)
    if not self._context:
      raise RuntimeError(f'llama.cpp has no room for {positions} positions.')
    # The newest finalizer runs first.
    weakref.finalize(self, llama_cpp.llama_free, self._context)
    vocabulary = llama_cpp.llama_model_get_vocab(model)
    self.vocabulary: int = llama_cpp.llama_vocab_n_tokens(vocabulary)

  def start(self) -> None:
    """Forgets the text."""
    memory = self._cpp.llama_get_memory(self._context)
    self._cpp.llama_memory_clear(memory, True)

  def advance(self, ids_T: Sequence[int]) -> np.ndarray:
    """The text goes on with `ids_T`.

    Returns:
      float32 logits `[V]` after the last of them, valid until the next call.

    Raises:
      RuntimeError: llama.cpp fails; the text may be too long.
    """
    ids = (self._cpp.llama_token * len(ids_T))(*ids_T)
    batch = self._cpp.llama_batch_get_one(ids, len(ids_T))
    if code := self._cpp.llama_decode(self._context, batch):
      raise RuntimeError(f'llama_decode gave {code} for {len(ids_T)} tokens.')
    logits = self._cpp.llama_get_logits_ith(self._context, -1)
    return np.ctypeslib.as_array(logits, (self.vocabulary,))

  def write(
    self, prompts: Sequence[Sequence[int]], tokens: int
  ) -> Iterator[list[int]]:
    """The `tokens` likeliest new tokens of one prompt, in turn."""
    (ids,) = prompts
    self.start()
    for _ in range(tokens):
      ids = [int(self.advance(ids).argmax())]
      yield ids


def random_model(
  config: ConfigDict, positions: int
) -> tuple[str, measure.Model]:
  """A model of random weights, to measure; see `write` for its shape.

  Args:
    config: of a model of ours.
    positions: tokens of the longest text.

  Returns:
    What to call it, and the model.

  Raises:
    ImportError: one of the packages is missing.
    ValueError: this process does not compute on CPUs.
  """
  if (platform := jax.default_backend()) != 'cpu':
    raise ValueError(f'llama.cpp is measured on CPUs; this is a {platform}.')
  try:
    import gguf  # noqa: F401
    import llama_cpp  # noqa: F401
  except ImportError as error:
    raise ImportError(
      f'The package {error.name} is missing, with which llama.cpp is measured:'
      " `make bench-llama`, or pip install -e '.[llama]'."
    ) from error
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder, 'random.gguf')
    size = write(path, config, seed=0)
    decoder = Decoder(path, positions)
  name = f'llama.cpp, d_ff {hidden_width(config)}'
  return name, measure.Model(decoder.write, size, decoder.vocabulary)
