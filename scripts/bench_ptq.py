"""Measures quantization after training: time and memory.

  python scripts/bench_ptq.py gptq --model=models/smollm2 \
      --sequences=128 --length=512
  python scripts/bench_ptq.py splitquant
  python scripts/bench_ptq.py dbellquant --model=models/smollm2 \
      --sequences=16 --length=512

`gptq` walks over the same model with the same settings twice, with this
repository and with a plain PyTorch GPTQ (needs the extra 'compare'), in turn.
`splitquant` splits and quantizes random matrices of the shapes of LLaMA 3.2 1B,
1.24B parameters in bfloat16, on the host. `dbellquant` compares its time with
BiLLM's. Calibration tokens are random: they change no times.
"""

import sys

from qat import launch

if __name__ == '__main__':
  launch.one_blas_thread()
  launch.tune_malloc()

import argparse
from collections.abc import Callable
from collections.abc import Sequence
import json
import os
import pathlib
import tempfile
import threading
import time
from typing import Any

from jax import numpy as jnp
from ml_collections import ConfigDict
import numpy as np

from configs import common
from configs.ptq import billm
from configs.ptq import dbellquant
from configs.ptq import gptq
from configs.ptq import splitquant as splitquant_config
from qat.infer import load
from qat.interop import hf
from qat.ptq import apply
from qat.ptq import examples
from qat.ptq import partial
from qat.ptq import splitquant
from qat.quant import packing

# Inputs and outputs of the matrices of a block of LLaMA 3.2 1B; 16 blocks, and
# an embedding of 128,256 x 2,048, which is also the head and stays unsplit.
LLAMA_BLOCK = (
  (2048, 2048),
  (2048, 512),
  (2048, 512),
  (2048, 2048),
  (2048, 8192),
  (2048, 8192),
  (8192, 2048),
)
LLAMA_BLOCKS, LLAMA_EMBEDDING = 16, (128_256, 2048)


def main(arguments: Sequence[str]) -> int:
  """Runs the command line; returns the exit status."""
  options = _parser().parse_args(arguments)
  found = options.run(options)
  print(json.dumps(found, indent=2))
  if options.json:
    options.json.write_text(json.dumps(found, indent=2) + '\n')
  return 0


def _gptq(options: argparse.Namespace) -> dict[str, Any]:
  """Ours against PyTorch's, round by round."""
  loaded = load.load_model(options.model, common.base('300m'))
  tokens_ST = _tokens(options, loaded.config)
  ptq = _config(gptq.get_config(), options)
  times: dict[str, list[float]] = {'ours': [], 'torch': []}
  with tempfile.TemporaryDirectory() as folder:
    exported = pathlib.Path(folder) / 'hf'
    hf.export(
      exported,
      loaded.config,
      loaded.params,
      loaded.tokenizer,
      begin=loaded.begin,
      end=loaded.end,
      dtype='float32',
    )
    for _ in range(options.rounds):
      times['torch'].append(
        _seconds(lambda: _torch_gptq(exported, tokens_ST, ptq, options.dtype))
      )
      times['ours'].append(_seconds(lambda: _ours(loaded, ptq, tokens_ST)))
  ratios = [b / a for a, b in zip(times['ours'], times['torch'], strict=True)]
  return {'seconds': times, 'times as fast as PyTorch': ratios}


def _dbellquant(options: argparse.Namespace) -> dict[str, Any]:
  """DBellQuant's time over BiLLM's, round by round."""
  loaded = load.load_model(options.model, common.base('300m'))
  tokens_ST = _tokens(options, loaded.config)
  times: dict[str, list[float]] = {'billm': [], 'dbellquant': []}
  for _ in range(options.rounds):
    for name, module in (('billm', billm), ('dbellquant', dbellquant)):
      ptq = _config(module.get_config(), options)
      times[name].append(
        _seconds(lambda ptq=ptq: _ours(loaded, ptq, tokens_ST))
      )
  pairs = zip(times['billm'], times['dbellquant'], strict=True)
  return {'seconds': times, 'overhead': [b / a - 1 for a, b in pairs]}


def _splitquant(options: argparse.Namespace) -> dict[str, Any]:
  """Splits and quantizes every matrix of a block, 16 times, and packs it."""
  fields = splitquant_config.get_config().method
  settings = splitquant.Options(**fields)
  random = np.random.default_rng(0)
  blocks = 1 if options.quick else LLAMA_BLOCKS
  embedding = None if options.quick else _matrix(random, LLAMA_EMBEDDING)
  model = [
    [_matrix(random, shape) for shape in LLAMA_BLOCK] for _ in range(blocks)
  ]
  size = sum(w.nbytes for block in model for w in block)
  size += 0 if embedding is None else embedding.nbytes
  parameters = size // 2
  with _PeakMemory() as memory:
    start = time.monotonic()
    stored = 0
    for block in model:
      for i, w_KN in enumerate(block):
        packed, _ = packing.pack(splitquant.quantize(w_KN, settings))
        stored += sum(array.nbytes for array in packed.values())
        block[i] = packed  # What was, is no longer needed.
    seconds = time.monotonic() - start
  return {
    'parameters': parameters,
    'seconds': seconds,
    'bfloat16 model, bytes': size,
    'stored, bytes': stored,
    'peak resident memory, bytes': memory.peak,
    'peak over the bfloat16 model': memory.peak / size,
  }


def _matrix(random: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
  w = random.standard_normal(shape, np.float32)
  w *= 0.02
  return w.astype(jnp.bfloat16)


class _PeakMemory:
  """The largest resident memory of this process meanwhile, looked up often."""

  def __enter__(self):
    self.peak, self._end = 0, threading.Event()
    self._thread = threading.Thread(target=self._watch, daemon=True)
    self._thread.start()
    return self

  def _watch(self) -> None:
    page = os.sysconf('SC_PAGE_SIZE')
    while not self._end.wait(0.02):
      resident = int(pathlib.Path('/proc/self/statm').read_text().split()[1])
      self.peak = max(self.peak, resident * page)

  def __exit__(self, *_):
    self._end.set()
    self._thread.join()


def _tokens(options: argparse.Namespace, config: ConfigDict) -> np.ndarray:
  random = np.random.default_rng(0)
  shape = (options.sequences, options.length)
  return random.integers(0, config.model.vocab_size, shape).astype(np.int32)


def _config(ptq: ConfigDict, options: argparse.Namespace) -> ConfigDict:
  with ptq.unlocked():
    ptq.calibration.sequences = options.sequences
    ptq.calibration.length = options.length
    ptq.calibration.batch_size = options.batch
  return ptq


def _seconds(work: Callable[[], Any]) -> float:
  start = time.monotonic()
  work()
  return time.monotonic() - start


def _ours(loaded: load.Loaded, ptq: ConfigDict, tokens_ST: np.ndarray) -> None:
  chosen = examples.Examples(
    tokens_ST, np.ones(tokens_ST.shape, np.float32), 'random tokens'
  )
  with tempfile.TemporaryDirectory() as folder:
    store = partial.Store(pathlib.Path(folder) / 'partial', {})
    apply.quantize(loaded.config, loaded.params, ptq, chosen, store)


def _torch_gptq(
  folder: pathlib.Path, tokens_ST: np.ndarray, ptq: ConfigDict, dtype: str
) -> None:
  """The algorithm of 2210.17323 in plain PyTorch, block by block.

  Hidden states and products in `dtype`, Hessians and rounding in float32; a
  block is run once for each group of layers, and once more to go on.
  """
  import torch
  import transformers

  torch.set_num_threads(os.cpu_count())
  model = transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=getattr(torch, dtype)
  ).eval()
  body, size = model.model, ptq.calibration.batch_size
  with torch.no_grad():
    tokens = torch.from_numpy(tokens_ST).long().split(size)
    states = [body.embed_tokens(part) for part in tokens]
    positions = torch.arange(tokens_ST.shape[1])[None]
    turns = body.rotary_emb(states[0], positions)

    def run(layer, x):
      y = layer(x, attention_mask=None, position_embeddings=turns)
      return y[0] if isinstance(y, tuple) else y

    for layer in body.layers:
      a, f = layer.self_attn, layer.mlp
      for group in (
        (a.q_proj, a.k_proj, a.v_proj),
        (a.o_proj,),
        (f.gate_proj, f.up_proj),
        (f.down_proj,),
      ):
        width = group[0].in_features
        hessian, seen = torch.zeros(width, width), 0

        def add(_, inputs, hessian=hessian, width=width):
          x = inputs[0].reshape(-1, width).float()
          hessian.addmm_(x.T, x)

        hook = group[0].register_forward_pre_hook(add)
        for x in states:
          run(layer, x)
          seen += x.shape[0]
        hook.remove()
        for linear in group:
          w = linear.weight.float()
          linear.weight.copy_(_torch_matrix(w, hessian * 2 / seen, ptq.method))
      states = [run(layer, x) for x in states]


def _torch_matrix(w, hessian, method: ConfigDict):
  """One matrix `[N, K]`: columns in blocks, lazily compensated."""
  import torch

  width, most = w.shape[1], 2**method.bits - 1
  dead = hessian.diagonal() == 0
  hessian.diagonal()[dead] = 1
  w = w.clone()
  w[:, dead] = 0
  hessian.diagonal().add_(method.percdamp * hessian.diagonal().mean())
  inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
  upper = torch.linalg.cholesky(inverse, upper=True)
  low, high = w.amin(1).clamp(max=0), w.amax(1).clamp(min=0)
  scale = ((high - low) / most).clamp(min=1e-8)
  zero = (-low / scale).round()
  result = torch.empty_like(w)
  for start in range(0, width, method.block_size):
    end = min(start + method.block_size, width)
    part, errors = w[:, start:end].clone(), torch.empty(len(w), end - start)
    for j in range(end - start):
      column, d = part[:, j], upper[start + j, start + j]
      codes = ((column / scale).round() + zero).clamp(0, most)
      rounded = (codes - zero) * scale
      result[:, start + j] = rounded
      error = (column - rounded) / d
      row = upper[start + j, start + j + 1 : end]
      part[:, j + 1 :].sub_(torch.outer(error, row))
      errors[:, j] = error
    w[:, end:].sub_(errors @ upper[start:end, end:])
  return result


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  commands = parser.add_subparsers(required=True, metavar='WHAT')
  for name, run, words in (
    ('gptq', _gptq, 'GPTQ against a plain PyTorch one'),
    ('dbellquant', _dbellquant, "DBellQuant's time over BiLLM's"),
    ('splitquant', _splitquant, 'SplitQuantV2 on 1.24B parameters'),
  ):
    command = commands.add_parser(name, help=words)
    command.set_defaults(run=run)
    add = command.add_argument
    add('--json', type=pathlib.Path, metavar='FILE', help='also write it here')
    if name == 'splitquant':
      add('--quick', action='store_true', help='one block alone')
      continue
    add('--model', required=True, metavar='DIR', help='a LLaMA-like model')
    add('--sequences', type=int, default=128, help='calibration (default: 128)')
    add('--length', type=int, default=512, help='tokens each (default: 512)')
    add('--batch', type=int, default=4, help='sequences at once (default: 4)')
    add('--rounds', type=int, default=1, help='repetitions (default: 1)')
    if name == 'gptq':
      add(
        '--dtype',
        choices=('float32', 'bfloat16'),
        default='float32',
        help="of PyTorch's hidden states and products (default: float32)",
      )
  return parser


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
