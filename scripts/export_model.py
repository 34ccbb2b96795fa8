r"""Writes a model as a folder that transformers loads, or in packed form.

  python scripts/export_model.py models/gptq --out exported --dtype float16
  python scripts/export_model.py runs/fp-tiny --out exported
  python scripts/export_model.py runs/pquant-tiny --out packed --format packed

  transformers.AutoModelForCausalLM.from_pretrained('exported')

Matrices that were quantized after training are written as the floats that they
stand for. A model that quantizes its inputs, or that was trained with low-bit
weights, is refused: transformers would run it without its quantizers.

In packed form each quantized matrix is the bytes that this framework's kernels
multiply, in the layout of this machine (docs/kernels.md): a model folder for
scripts/generate.py and scripts/evaluate.py, not to be trained.
"""

import argparse
from collections.abc import Sequence
import pathlib
import sys

from qat import display
from qat import manifest
from qat.data import progress
from qat.infer import load
from qat.infer import pack
from qat.interop import files
from qat.interop import folder
from qat.interop import hf


def main(arguments: Sequence[str]) -> int:
  """Runs the command line; returns the exit status."""
  options = _parser().parse_args(arguments)
  try:
    files.check_new(options.out)
    if options.format == 'packed':
      _pack(options)
    else:
      _export(options)
  except (ValueError, OSError, manifest.CorruptError) as error:
    progress.note(f'Error: {error}')
    return 2
  except KeyboardInterrupt:
    progress.note('Stopped; nothing was written.')
    return 130
  return 0


def _export(options: argparse.Namespace) -> None:
  dtype = options.dtype or 'float32'
  loaded = load.load_model(options.model, None)
  hf.export(
    options.out,
    loaded.config,
    loaded.params,
    loaded.tokenizer,
    begin=loaded.begin,
    end=loaded.end,
    dtype=dtype,
  )
  print(f'{options.out}: a folder for transformers, in {dtype}.')


def _pack(options: argparse.Namespace) -> None:
  if options.dtype not in (None, *pack.FLOATS):
    raise ValueError(
      f'--dtype {options.dtype} with --format packed; one of'
      f' {", ".join(pack.FLOATS)}.'
    )
  loaded = load.load_model(options.model, None, by_layer=False)
  pack.save(options.out, loaded, options.dtype)
  found = folder.open_folder(options.out).source[load.PACKED]['bytes']
  parts = ', '.join(f'{display.count(n)}B {k}' for k, n in found.items())
  print(f'{options.out}: a packed model: {parts}.')


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add(
    'model',
    type=pathlib.Path,
    help='a model folder, or the workdir of a run',
  )
  add(
    '--out',
    type=pathlib.Path,
    required=True,
    metavar='DIR',
    help='the folder to write',
  )
  add(
    '--format',
    choices=('transformers', 'packed'),
    default='transformers',
    help='of the folder (default: %(default)s)',
  )
  add(
    '--dtype',
    choices=[str(dtype) for dtype in files.DTYPES.values()],
    help='of the tensors (default: float32); packed, of matrices that are not'
    ' quantized (default: what the model reads them in)',
  )
  return parser


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
