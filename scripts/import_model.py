r"""Makes a model folder of another program's model, or of a run's newest step.

  python scripts/import_model.py HuggingFaceTB/SmolLM2-135M --out models/smollm2
  python scripts/import_model.py downloads/Llama-3.2-1B --out models/llama-1b
  python scripts/import_model.py model.Q8_0.gguf --out models/q8 \
      --end-of-text '<|endoftext|>'
  python scripts/import_model.py runs/fp-tiny --out models/fp-tiny

LLaMA 1 to 3, Mistral, Qwen2 and Qwen2.5, SmolLM2 and OPT, from safetensors; the
LLaMAs and Qwen2 from GGUF. docs/interop.md says more.
"""

import argparse
from collections.abc import Iterator
from collections.abc import Sequence
import pathlib
import sys
from typing import Any

import numpy as np

from configs import common
from qat import display
from qat import manifest
from qat.data import progress
from qat.infer import load
from qat.interop import files
from qat.interop import folder
from qat.interop import foreign
from qat.quant import composed

KEEP = 'keep'


def main(arguments: Sequence[str]) -> int:
  """Runs the command line; returns the exit status."""
  options = _parser().parse_args(arguments)
  try:
    _import(options)
  except (ValueError, OSError, ImportError, manifest.CorruptError) as error:
    progress.note(f'Error: {error}')
    return 2
  except KeyboardInterrupt:
    progress.note('Stopped; nothing was written.')
    return 130
  return 0


def _import(options: argparse.Namespace) -> None:
  files.check_new(options.out)
  path = pathlib.Path(options.source)
  if (path / 'checkpoints').is_dir():
    loaded = load.load_model(path, None)
    config, leaves = loaded.config, folder.flat(loaded.params).items()
    about, total = loaded.source, len(leaves)
  else:
    loaded = foreign.open_model(
      options.source,
      tokenizer=options.tokenizer,
      end_of_text=options.end_of_text,
    )
    config = foreign.config(loaded, common.base('tiny'), options.dot_dtype)
    leaves = foreign.leaves(loaded, config)
    about, total = loaded.about, len(loaded.tensors)
  counted = {'parameters': 0}
  folder.save(
    options.out,
    config,
    _shown(_as(leaves, options.dtype), total, counted),
    loaded.tokenizer,
    begin=loaded.begin,
    end=loaded.end,
    source=about,
  )
  size = sum(file.stat().st_size for file in options.out.iterdir())
  m = config.model
  print(
    f'{options.out}: {display.count(counted["parameters"])} parameters,'
    f' {display.count(size)} bytes; {m.n_layers} layers of width {m.d_model},'
    f' {m.n_heads} heads ({m.n_kv_heads} of keys), vocabulary {m.vocab_size}.'
  )
  texts = [loaded.tokenizer.id_to_token(i) for i in (loaded.begin, loaded.end)]
  print(f'A text begins with {texts[0]!r} and ends with {texts[1]!r}.')


def _as(
  leaves: Iterator[tuple[str, Any]], dtype: str
) -> Iterator[tuple[str, Any]]:
  for path, leaf in leaves:
    if dtype != KEEP and not composed.is_quantized(leaf):
      leaf = np.asarray(leaf).astype(_dtypes()[dtype])
    yield path, leaf


def _dtypes() -> dict[str, np.dtype]:
  return {str(dtype): dtype for dtype in files.DTYPES.values()}


def _shown(leaves, total: int, counted: dict[str, int]):
  with progress.bar('Reading', total) as show:
    for i, (path, leaf) in enumerate(leaves):
      counted['parameters'] += int(np.prod(leaf.shape))
      yield path, leaf
      show(i + 1, path)


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add(
    'source',
    help='a folder of transformers, a .gguf file, org/name[@revision] of the'
    ' Hugging Face hub, or the workdir of a run',
  )
  add(
    '--out',
    type=pathlib.Path,
    required=True,
    metavar='DIR',
    help='the model folder to write',
  )
  add(
    '--tokenizer',
    type=pathlib.Path,
    metavar='FILE',
    help="a tokenizer.json to take instead of the model's",
  )
  add(
    '--end-of-text',
    default='',
    metavar='TOKEN',
    help='the token that ends a text and begins the next, where it is another'
    ' than the model says (an instruct model ends an answer with its own)',
  )
  add(
    '--dtype',
    choices=(KEEP, *_dtypes()),
    default=KEEP,
    help='of the stored parameters (default: as they are; those of GGUF are'
    ' float32)',
  )
  add(
    '--dot-dtype',
    choices=('float32', 'bfloat16'),
    default='float32',
    help="config.model.dot_dtype: of matrix products' inputs (default:"
    ' %(default)s; bfloat16 is faster on accelerators)',
  )
  return parser


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
