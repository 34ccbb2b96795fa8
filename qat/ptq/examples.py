"""What a model is calibrated on: windows of a data set, or whole prompts."""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
import dataclasses
import functools
import hashlib
import json
import os
import pathlib

from ml_collections import ConfigDict
import numpy as np

from qat.data import dataset as dataset_lib
from qat.data import loader


@dataclasses.dataclass(frozen=True)
class Examples:
  """Token sequences of one length, shorter ones padded at their end.

  Attributes:
    tokens_ST: int32.
    weights_ST: float32, 1 where a token is, 0 on padding.
    source: where they come from, for people.
  """

  tokens_ST: np.ndarray
  weights_ST: np.ndarray
  source: str

  @functools.cached_property
  def digest(self) -> str:
    """sha256 of all tokens and weights."""
    content = hashlib.sha256(repr(self.tokens_ST.shape).encode())
    for array in (self.tokens_ST, self.weights_ST):
      content.update(np.ascontiguousarray(array).tobytes())
    return content.hexdigest()

  @property
  def count(self) -> int:
    """S: how many sequences there are."""
    return len(self.tokens_ST)

  def batches(self, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields (tokens, weights) `[size, T]`; the last is filled with padding."""
    for start in range(0, self.count, size):
      parts = (
        a[start : start + size] for a in (self.tokens_ST, self.weights_ST)
      )
      tokens_BT, weights_BT = (
        np.pad(part, ((0, size - len(part)), (0, 0))) for part in parts
      )
      yield tokens_BT, weights_BT

  def rows(self, count: int, size: int, seed: int) -> np.ndarray | None:
    """Positions of tokens to keep the inputs of, as many in every sequence.

    Args:
      count: how many tokens at least, of all sequences together; 0: none.
      size: of a batch.
      seed: of the choice.

    Returns:
      int32 `[S, R]`, S padded to a multiple of `size`; None without `count`.
    """
    if not count:
      return None
    each = -(-count // self.count)
    random = np.random.default_rng(seed)
    chosen = np.zeros((-(-self.count // size) * size, each), np.int32)
    for row, weights_T in zip(chosen, self.weights_ST, strict=False):
      real = np.flatnonzero(weights_T)
      row[:] = random.choice(real, each, replace=len(real) < each)
    return chosen


def from_dataset(
  path: str | os.PathLike[str], calibration: ConfigDict
) -> Examples:
  """Windows of a data set's training split, without overlap.

  Args:
    path: folder of a prepared data set.
    calibration: the section of a config: `sequences`, `length`, `seed`.

  Raises:
    FileNotFoundError: no data set is there.
    ValueError: it has too few tokens.
  """
  c = calibration
  opened = dataset_lib.open_dataset(path)
  there = (len(dataset_lib.Stream(opened, 'train')) - 1) // c.length
  if there < c.sequences:
    raise ValueError(
      f'{os.fspath(path)!r} has {max(there, 0)} training sequences of'
      f' config.calibration.length={c.length} tokens, fewer than'
      f' config.calibration.sequences={c.sequences}. Lower one of them, or name'
      ' a larger data set.'
    )
  tokens_ST = loader.calibration_batch(
    path, seq_len=c.length, sequences=c.sequences, seed=c.seed
  )
  return Examples(
    tokens_ST,
    np.ones(tokens_ST.shape, np.float32),
    f'{c.sequences} x {c.length} tokens of {os.fspath(path)}, seed {c.seed}',
  )


def from_prompts(
  path: str | os.PathLike[str],
  calibration: ConfigDict,
  encode: Callable[[str], Sequence[int]],
) -> Examples:
  """Whole texts in random order, until sequences x length tokens are taken.

  As TaCQ (2504.07389) calibrates on a task: nothing is packed or cut. The first
  text for which there is no room ends the choice.

  Args:
    path: a file with a JSON object a line.
    calibration: the section of a config; `field` is the text's.
    encode: from a text to the tokens that the model reads.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: a line is none of this kind, or the texts have fewer tokens
      than are asked for.
  """
  c = calibration
  texts = _texts(pathlib.Path(path), c.field)
  budget = c.sequences * c.length
  rows, total = [], 0
  for i in np.random.default_rng(c.seed).permutation(len(texts)):
    ids = list(encode(texts[i]))
    if len(ids) < 2:
      raise ValueError(
        f'{path}: text {i + 1} has {len(ids)} tokens; at least 2.'
      )
    if total + len(ids) > budget:
      break
    rows.append(ids)
    total += len(ids)
  else:
    if total < budget:
      raise ValueError(
        f'{path} has {total} tokens in {len(texts)} texts, fewer than'
        f' config.calibration.sequences={c.sequences} x'
        f' config.calibration.length={c.length}. Lower one of them, or give'
        ' more texts.'
      )
  if not rows:
    raise ValueError(
      f'{path}: no text fits into {budget} tokens; raise'
      ' config.calibration.sequences or config.calibration.length.'
    )
  longest = max(map(len, rows))
  tokens_ST = np.zeros((len(rows), longest), np.int32)
  weights_ST = np.zeros((len(rows), longest), np.float32)
  for s, ids in enumerate(rows):
    tokens_ST[s, : len(ids)] = ids
    weights_ST[s, : len(ids)] = 1
  source = f'{len(rows)} texts of {path}, {total} tokens, seed {c.seed}'
  return Examples(tokens_ST, weights_ST, source)


def check(
  examples: Examples | None, config: ConfigDict, algorithm: str
) -> None:
  """Raises a ValueError for no examples, or such as a model cannot read.

  Args:
    examples: the calibration sequences.
    config: of the model.
    algorithm: what needs them.
  """
  if examples is None:
    raise ValueError(
      f'config.algorithm={algorithm!r} needs calibration sequences.'
    )
  most, length = config.model.max_positions, examples.tokens_ST.shape[1]
  if 0 < most < length:
    raise ValueError(
      f'Calibration sequences of {length} tokens; the model takes at most'
      f' {most}. Lower config.calibration.length, or give shorter texts.'
    )
  highest = int(examples.tokens_ST.max())
  if highest >= config.model.vocab_size:
    raise ValueError(
      f'Calibration token {highest} is none of the model, which has'
      f' {config.model.vocab_size}: {examples.source} was prepared with another'
      ' tokenizer.'
    )


def _texts(path: pathlib.Path, field: str) -> list[str]:
  if not path.is_file():
    raise FileNotFoundError(
      f'There is no file {str(path)!r} (config.calibration.prompts); it has a'
      f' JSON object a line, with its text in {field!r}.'
    )
  texts = []
  # Not `splitlines`: JSON strings may hold other ends of lines than these.
  for number, line in enumerate(path.read_text('utf-8').split('\n'), 1):
    if not line.strip():
      continue
    try:
      text = json.loads(line)[field]
    except (ValueError, KeyError, TypeError) as error:
      raise ValueError(
        f'{path}:{number}: no JSON object with a text in {field!r}'
        f' (config.calibration.field): {type(error).__name__}: {error}.'
      ) from error
    if not isinstance(text, str):
      raise ValueError(
        f'{path}:{number}: {field!r} is {type(text).__name__}, not a text.'
      )
    texts.append(text)
  return texts
