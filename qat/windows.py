"""Perplexity and bits per byte of a text, as papers on quantization measure.

The whole text is tokenized at once and cut into windows that follow each other
without overlap; what is left at the end, shorter than a window, is dropped. In
each window every token but the first is predicted from those before it, so no
token sees what stands before its window. This is how GPTQ (2210.17323) and
those who compare with it measure, with windows of 2048 tokens.

Their WikiText-2 is the raw form, its lines joined by empty lines. Perplexities
of the tokenized form (with `<unk>` and ` @-@ `) are higher and compare only
with each other. Bits per byte compare between tokenizers, too.
"""

from collections.abc import Iterator
from collections.abc import Sequence
import math
import time
from typing import Any

import jax
from jax import numpy as jnp
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict
import numpy as np
import tokenizers

from qat import display
from qat import evaluate
from qat.data import progress
from qat.data import sources
from qat.data import tokenizer as tokenizer_lib
from qat.infer import load
from qat.nn import transformer
from qat.quant import composed


def read(name: str, field: str = 'text') -> str:
  """The text of a file: of several documents, with an empty line between.

  Args:
    name: a file or a folder, as `sources.resolve` takes it: .txt, .jsonl,
      .parquet, also compressed.
    field: the text's field, where a file has fields.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: an unknown extension, damage, or no text.
  """
  texts = [
    document.text
    for source in sources.resolve([name])
    for document in sources.read(source, field=field, split=None)
  ]
  text = '\n\n'.join(texts)
  if not text:
    raise ValueError(f'{name} is empty: there is no text to evaluate on.')
  return text


def start(model: load.Loaded) -> list[int]:
  """The tokens that begin a text for a model.

  A model that this framework trained begins as its config says (`begin`).
  Another model gets what its tokenizer puts before a text: LLaMA's `<s>`,
  nothing for SmolLM2. A quantized model begins as the one it was made from.
  """
  source = model.source
  while source['format'] == 'quantized':
    source = source['model']
  if source['format'] == 'run':
    return begin(model.config, model.tokenizer, model.begin)
  return model.tokenizer.encode('').ids


def begin(
  config: ConfigDict, tokenizer: tokenizers.Tokenizer, end: int
) -> list[int]:
  """The tokens that begin a text for a run's model.

  Args:
    config: of the run; `data.begin` says which.
    tokenizer: of its data set.
    end: the token that ends a document.
  """
  if config.data.begin == 'end':
    return [end]
  return tokenizer.encode('').ids


def encode(
  tokenizer: tokenizers.Tokenizer, text: str, start: Sequence[int]
) -> np.ndarray:
  """The tokens of a whole text, int32, behind the tokens of `start`.

  Args:
    tokenizer: of the model.
    text: all of it.
    start: what begins a text for this model: its beginning of sequence, or
      nothing. It stands in the first window alone, as in the papers' code.
  """
  (ids,) = tokenizer_lib.encode(tokenizer, [text])
  return np.concatenate([np.asarray(start, np.int32), ids.astype(np.int32)])


def batches(
  ids: np.ndarray, window: int, windows: int, rows: int
) -> Iterator[dict[str, np.ndarray]]:
  """Cuts tokens into windows; the last batch is filled up with weights of 0.

  Args:
    ids: int32 tokens of a text.
    window: tokens of a window, T.
    windows: at most so many; 0: all.
    rows: windows of a batch, B.

  Yields:
    'tokens', 'targets', int32 `[B, T]`, and 'weights', float32: 0 at the last
    position of a window, whose next token is in another one.

  Raises:
    ValueError: the text has no whole window.
  """
  count = number(ids, window, windows)
  cut_WT = ids[: count * window].reshape(count, window)
  for i in range(0, count, rows):
    tokens_BT = cut_WT[i : i + rows]
    weights_BT = np.ones(tokens_BT.shape, np.float32)
    weights_BT[:, -1] = 0
    fill = ((0, rows - len(tokens_BT)), (0, 0))
    yield {
      'tokens': np.pad(tokens_BT, fill),
      'targets': np.pad(np.roll(tokens_BT, -1, 1), fill),
      'weights': np.pad(weights_BT, fill),
    }


def number(ids: np.ndarray, window: int, windows: int) -> int:
  """How many windows `batches` cuts; the same arguments, the same errors."""
  if window < 2 or windows < 0:
    raise ValueError(
      f'window={window}, windows={windows}: a window is 2 tokens or more, and'
      ' their number 0 (all) or more.'
    )
  whole = len(ids) // window
  if not whole:
    raise ValueError(
      f'The text has {len(ids)} tokens, less than a window of {window}; take a'
      ' shorter window or a longer text.'
    )
  return min(whole, windows) if windows else whole


def measure(
  eval_step: evaluate.EvalStep,
  params: Any,
  ids: np.ndarray,
  token_bytes_V: np.ndarray,
  mesh: Mesh,
  *,
  window: int,
  windows: int,
  rows: int,
  label: str,
) -> dict[str, float]:
  """The loss of a model on the windows of a text.

  Args:
    eval_step: from `evaluate.make_eval_step`; give the same one again to
      compare parameters, and it is compiled once.
    params: the parameters.
    ids: from `encode`.
    token_bytes_V: `tokenizer.token_bytes`.
    mesh: the mesh; `rows` is a multiple of its size.
    window: tokens of a window.
    windows: at most so many; 0: all.
    rows: windows of a batch.
    label: what the progress is called.

  Returns:
    'loss', nats per predicted token; 'perplexity'; 'bits_per_byte', over the
    bytes that the predicted tokens stand for; 'windows', 'tokens' (predicted)
    and 'bytes', how many.

  Raises:
    ValueError: the text has no whole window, or a token that the model, or
      `token_bytes_V`, does not know.
  """
  count = number(ids, window, windows)
  if ids.max() >= len(token_bytes_V):
    raise ValueError(
      f'The text has token {ids.max()}, but the vocabulary has'
      f' {len(token_bytes_V)}; take the tokenizer of the model.'
    )
  bytes_V = jnp.asarray(token_bytes_V, jnp.float32)
  sums, start = [], time.monotonic()
  with jax.set_mesh(mesh), progress.bar(label, count) as show:
    for batch in batches(ids, window, windows, rows):
      sums.append(eval_step(params, evaluate.put(batch, mesh), bytes_V))
      sums[-1].nats.block_until_ready()
      done = min(len(sums) * rows, count)
      left = display.left(start, done, count)
      show(done, f'{done} of {count} windows, {left}')
  nats, tokens, size = np.sum(np.array(jax.device_get(sums), np.float64), 0)
  loss = float(nats / tokens)
  return {
    'loss': loss,
    'perplexity': math.exp(min(loss, 700.0)),
    'bits_per_byte': float(nats / math.log(2) / size),
    'windows': count,
    'tokens': int(tokens),
    'bytes': int(size),
  }


def settled(model: load.Loaded) -> load.Loaded:
  """A model in the form that evaluates many batches fastest.

  Quantized matrices become arrays (see `materialize`). Layers that are alike
  become one block that is compiled once: on a CPU thirty layers take minutes to
  compile, and tasks compile several shapes.

  Args:
    model: any; it stays as it is.

  Returns:
    The model; its parameters are in memory twice until the other one is gone.
  """
  params = materialize(model.model, model.params)
  scanned, params = transformer.scanned(model.model, params)
  config = model.config.copy_and_resolve_references().unlock()
  config.model.scan_layers = scanned.config.scan_layers
  config.lock()
  params = jax.device_put(params, NamedSharding(model.mesh, P()))
  return model._replace(config=config, model=scanned, params=params)


def materialize(model: transformer.Transformer, params: Any) -> Any:
  """Parameters with quantized matrices as the arrays that they stand for.

  A model dequantizes in each step what was quantized after training; to
  evaluate on many batches, it is faster to do so once, for the memory of the
  model at full size. Inputs are still quantized as the rules say. Where a rule
  quantizes weights, too, a matrix stays as it is: it would be quantized twice.

  Args:
    model: what the parameters belong to.
    params: a parameter tree.

  Returns:
    The tree; its new arrays have the `dot_dtype` of the model, which is what
    its products round them to.
  """
  dtype = model.config.dot_dtype
  expand = jax.jit(lambda leaf: leaf.dequantize(dtype))

  def one(keys, leaf):
    if not composed.is_quantized(leaf):
      return leaf
    path = '/'.join(key.key for key in keys[:-1])
    return expand(leaf) if model.rules.find(path).weight == 'none' else leaf

  return jax.tree_util.tree_map_with_path(
    one, params, is_leaf=composed.is_quantized
  )
