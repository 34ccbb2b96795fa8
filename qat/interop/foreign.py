"""Models of other programs: a GGUF file, a folder of transformers', the hub."""

from collections.abc import Iterator
import pathlib

from ml_collections import ConfigDict
import numpy as np

from qat.interop import families
from qat.interop import gguf
from qat.interop import hf
from qat.interop import tensors


def is_foreign(path: pathlib.Path) -> bool:
  """Whether there is another program's model at `path`."""
  if path.is_dir():
    return hf.is_folder(path)
  return path.is_file() and path.suffix == '.gguf'


def open_model(
  name: str,
  *,
  tokenizer: pathlib.Path | None = None,
  end_of_text: str = '',
) -> tensors.Source:
  """Opens a model; reads what it holds, not yet its tensors.

  Args:
    name: a `.gguf` file, a folder with config.json and safetensors, or
      'org/name[@revision]' of the Hugging Face hub.
    tokenizer: a tokenizer.json instead of the model's.
    end_of_text: the token that ends a text and begins the next, where it is
      another than the model says.

  Raises:
    FileNotFoundError, ImportError, ValueError: says what is missing or wrong.
  """
  path = pathlib.Path(name)
  if path.suffix == '.gguf':
    return gguf.open_file(path, tokenizer=tokenizer, end_of_text=end_of_text)
  about = path.absolute().name
  if not path.exists():
    if not hf.is_hub(name):
      raise FileNotFoundError(
        f'No file or folder {name!r}, and it does not look like a model of the'
        ' Hugging Face hub (org/name).'
      )
    about, path = name, hf.download(name)
  return hf.open_folder(
    path, name=about, tokenizer=tokenizer, end_of_text=end_of_text
  )


def config(
  source: tensors.Source, base: ConfigDict, dot_dtype: str
) -> ConfigDict:
  """Our config of a model, whose tensors are those that it needs.

  Args:
    source: the model.
    base: as for `families.config`.
    dot_dtype: as for `families.config`.

  Raises:
    ValueError: the model is not supported, or its tensors are not the model's.
  """
  made = families.config(base, source.config, source.about['name'], dot_dtype)
  places = tensors.table(made)
  tensors.check(places, source, made.model.tied_embeddings)
  return made


def leaves(
  source: tensors.Source, made: ConfigDict
) -> Iterator[tuple[str, np.ndarray]]:
  """Path and array of each leaf of our tree, read one by one."""
  return tensors.leaves(source, tensors.table(made))
