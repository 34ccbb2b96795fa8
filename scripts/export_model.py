r"""Writes a model as a folder that transformers loads.

  python scripts/export_model.py models/gptq --out exported --dtype float16
  python scripts/export_model.py runs/fp-tiny --out exported

  transformers.AutoModelForCausalLM.from_pretrained('exported')

Matrices that were quantized after training are written as the floats that they
stand for. A model that quantizes its inputs, or that was trained with low-bit
weights, is refused: transformers would run it without its quantizers.
"""

import argparse
from collections.abc import Sequence
import pathlib
import sys

from qat import manifest
from qat.data import progress
from qat.infer import load
from qat.interop import files
from qat.interop import hf


def main(arguments: Sequence[str]) -> int:
  """Runs the command line; returns the exit status."""
  options = _parser().parse_args(arguments)
  try:
    files.check_new(options.out)
    loaded = load.load_model(options.model, None)
    hf.export(
      options.out,
      loaded.config,
      loaded.params,
      loaded.tokenizer,
      begin=loaded.begin,
      end=loaded.end,
      dtype=options.dtype,
    )
  except (ValueError, OSError, manifest.CorruptError) as error:
    progress.note(f'Error: {error}')
    return 2
  except KeyboardInterrupt:
    progress.note('Stopped; nothing was written.')
    return 130
  print(f'{options.out}: a folder for transformers, in {options.dtype}.')
  return 0


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
    '--dtype',
    choices=[str(dtype) for dtype in files.DTYPES.values()],
    default='float32',
    help='of the tensors (default: %(default)s)',
  )
  return parser


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
