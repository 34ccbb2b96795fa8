"""Hugging Face checkpoints in and out.

Tensors are read one by one, so that an import takes no more memory than what is
made of them. Weights are read from safetensors only: other formats of theirs
can run code.
"""

from collections.abc import Mapping
import itertools
import json
import pathlib
import re
from typing import Any

from ml_collections import ConfigDict
import numpy as np
import tokenizers

from qat.data import tokenizer as tokenizer_lib
from qat.interop import families
from qat.interop import files
from qat.interop import folder as folder_lib
from qat.interop import tensors
from qat.quant import composed
from qat.quant import rules as rules_lib

CONFIG = 'config.json'
TOKENIZER = 'tokenizer.json'
_ONE = 'model.safetensors'
_INDEX = 'model.safetensors.index.json'
_HUB = re.compile(r'([\w.-]+/[\w.-]+)(?:@([\w./-]+))?')


def is_hub(name: str) -> bool:
  """Whether a name could be a model's on the hub: 'org/name', '...@version'."""
  return bool(_HUB.fullmatch(name))


def download(name: str) -> pathlib.Path:
  """The folder of a model of the hub, which is downloaded unless it was before.

  Args:
    name: 'org/name' or 'org/name@revision'.

  Raises:
    ImportError: the library is missing.
    ValueError: no such model, no permission, or no connection.
  """
  match = _HUB.fullmatch(name)
  if not match:
    raise ValueError(f'{name!r} is no model of the hub: org/name[@revision].')
  try:
    import huggingface_hub
    from huggingface_hub import errors
  except ImportError as error:
    raise ImportError(
      f'{name!r} is on the Hugging Face hub, which needs the package'
      " huggingface-hub; pip install -e '.[interop]'."
    ) from error
  try:
    found = huggingface_hub.snapshot_download(
      match[1],
      revision=match[2],
      allow_patterns=['*.json', '*.safetensors'],
    )
  except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError) as error:
    raise ValueError(
      f'{name!r} could not be downloaded: {str(error).strip()} (A model that'
      ' asks for permission needs `hf auth login`. Without a connection, copy'
      ' the folder from a machine that has it.)'
    ) from error
  return pathlib.Path(found)


def is_folder(path: pathlib.Path) -> bool:
  """Whether a folder has a config.json of transformers'."""
  try:
    return 'model_type' in json.loads((path / CONFIG).read_bytes())
  except (OSError, ValueError, TypeError):
    return False


def open_folder(
  path: pathlib.Path,
  *,
  name: str = '',
  tokenizer: pathlib.Path | None = None,
  end_of_text: str = '',
) -> tensors.Source:
  """Opens a model of transformers; reads its tensors' names and shapes only.

  Args:
    path: its folder.
    name: to tell of; the folder's where it is empty.
    tokenizer: another tokenizer.json than the folder's.
    end_of_text: the token that ends a text and begins the next, where it is
      another than config.json says.

  Raises:
    FileNotFoundError: a file is missing.
    ValueError: a file is damaged, or says what cannot be.
  """
  content = _json(path / CONFIG)
  found = _headers(path)
  name = name or path.absolute().name
  read_from = {
    short: (tensor.file, full) for full, (short, tensor) in found.items()
  }
  file = tokenizer or path / TOKENIZER
  if not file.is_file():
    raise FileNotFoundError(
      f'{path} has no {TOKENIZER}; give one (--tokenizer). transformers writes'
      ' it: AutoTokenizer.from_pretrained(...).save_pretrained(...).'
    )
  loaded = tokenizer_lib.load(file)
  begin, end = text_ids(
    loaded,
    content.get('bos_token_id'),
    content.get('eos_token_id'),
    end_of_text,
  )
  return tensors.Source(
    config=content,
    tensors={short: tensor for short, tensor in found.values()},
    read=lambda short: files.read(*read_from[short]),
    tokenizer=loaded,
    begin=begin,
    end=end,
    about={
      'name': name,
      'format': 'safetensors',
      'model_type': content.get('model_type'),
      'files': {
        file.name: file.stat().st_size
        for file in sorted({tensor.file for _, tensor in found.values()})
      },
    },
  )


def _json(file: pathlib.Path) -> dict[str, Any]:
  if not file.is_file():
    raise FileNotFoundError(f'{file} is missing.')
  try:
    found = json.loads(file.read_bytes())
  except ValueError as error:
    raise ValueError(f'{file} is damaged: {error}') from error
  if not isinstance(found, dict):
    raise ValueError(f'{file} is damaged: it holds no object.')
  return found


def _headers(
  path: pathlib.Path,
) -> dict[str, tuple[str, files.Tensor]]:
  """By full name: the name without 'model.', and what its file says of it."""
  if (path / _INDEX).is_file():
    weight_map = _json(path / _INDEX).get('weight_map')
    if not isinstance(weight_map, dict) or not weight_map:
      raise ValueError(f'{path / _INDEX} is damaged: it has no weight_map.')
    names = sorted({str(file) for file in weight_map.values()})
    if bad := [n for n in names if not re.fullmatch(r'[\w-][\w.-]*', n)]:
      raise ValueError(f'{path / _INDEX} names {bad[0]!r}, which is no file.')
  elif (path / _ONE).is_file():
    weight_map, names = None, [_ONE]
  else:
    raise FileNotFoundError(
      f'{path} has neither {_ONE} nor {_INDEX}. Weights in another format'
      ' (pytorch_model.bin) are not read, as they can run code; transformers'
      ' converts them: from_pretrained(...).save_pretrained(...).'
    )
  found: dict[str, tuple[str, files.Tensor]] = {}
  for file in names:
    for full, tensor in files.headers(path / file).items():
      if weight_map is not None and weight_map.get(full) != file:
        raise ValueError(
          f'{path / file} holds {full}, which {_INDEX} has in'
          f' {weight_map.get(full, "no file")}.'
        )
      found[full] = (full.removeprefix('model.'), tensor)
  if weight_map is not None and (lost := sorted(weight_map.keys() - found)):
    raise ValueError(
      f'{path / weight_map[lost[0]]} lacks {lost[0]}, which {_INDEX} promises'
      f' ({len(lost)} such tensors).'
    )
  return found


def text_ids(
  tokenizer: tokenizers.Tokenizer, bos: Any, eos: Any, end_of_text: str
) -> tuple[int, int]:
  """The ids that a prompt begins with, and that end a text.

  Args:
    tokenizer: the model's.
    bos: of a config; None where it has none.
    eos: of a config: an id, several (the first is taken), or None.
    end_of_text: a token that takes the place of both; '' for none.

  Raises:
    ValueError: there is no such token.
  """
  if end_of_text:
    found = tokenizer_lib.end_of_text_id(tokenizer, end_of_text)
    return found, found
  eos = next(iter(eos), None) if isinstance(eos, list) else eos
  if eos is None:
    raise ValueError(
      'The model does not say which token ends a text; give it (--end-of-text).'
    )
  bos = eos if bos is None else bos
  size = tokenizer_lib.vocab_size(tokenizer)
  for token in (bos, eos):
    if not isinstance(token, int) or not 0 <= token < size:
      raise ValueError(
        f'The model begins or ends a text with token {token!r}, and its'
        f' tokenizer has {size}; give the right one (--end-of-text).'
      )
  return bos, eos


def export(
  out: pathlib.Path,
  config: ConfigDict,
  params: Any,
  tokenizer: tokenizers.Tokenizer,
  *,
  begin: int,
  end: int,
  dtype: str,
  shard_bytes: int = files.SHARD_BYTES,
) -> None:
  """Writes a folder that transformers loads; quantized weights as floats.

  Args:
    out: the folder; must not exist, or be empty.
    config: ours.
    params: our tree; kernels may be quantized.
    tokenizer: the model's.
    begin: id that a prompt begins with.
    end: id that ends a text.
    dtype: of the tensors, a value of `files.DTYPES` by name: 'float32', ...
    shard_bytes: of a file, at most.

  Raises:
    FileExistsError: `out` holds something.
    ValueError: transformers has no such model.
  """
  hf = families.to_hf(config) | {
    'bos_token_id': begin,
    'eos_token_id': end,
    'pad_token_id': None,
    'dtype': dtype,
  }
  by_name = {str(known): known for known in files.DTYPES.values()}
  if dtype not in by_name:
    raise ValueError(f'dtype={dtype!r}; one of {", ".join(by_name)}.')
  by_path = folder_lib.flat(params)
  _refuse_quantizers(config, by_path)
  places = tensors.table(config)

  def leaf(path: str) -> np.ndarray:
    x = by_path[path]
    x = x.dequantize() if composed.is_quantized(x) else x
    return np.asarray(x).astype(by_name[dtype])

  sizes = {
    name: int(np.prod(place.shape)) * by_name[dtype].itemsize
    for name, place in places.items()
  }
  plan = files.shards(sizes, shard_bytes)
  stream = tensors.tensors(places, leaf)
  with files.new_folder(out) as folder:
    weight_map = {}
    for i, names in enumerate(plan):
      file = _ONE
      if len(plan) > 1:
        file = f'model-{i + 1:05d}-of-{len(plan):05d}.safetensors'
      shard = dict(itertools.islice(stream, len(names)))
      files.write(folder / file, shard)
      weight_map |= dict.fromkeys(shard, file)
    if len(plan) > 1:
      index = {'metadata': {'total_size': sum(sizes.values())}}
      _write_json(folder / _INDEX, index | {'weight_map': weight_map})
    (folder / TOKENIZER).write_text(tokenizer.to_str(), 'utf-8')
    about = {
      'tokenizer_class': 'PreTrainedTokenizerFast',
      'bos_token': tokenizer.id_to_token(begin),
      'eos_token': tokenizer.id_to_token(end),
      'model_max_length': hf['max_position_embeddings'],
    }
    _write_json(folder / 'tokenizer_config.json', about)
    _write_json(folder / CONFIG, hf)


def _refuse_quantizers(config: ConfigDict, leaves: Mapping[str, Any]) -> None:
  """Refuses a model that transformers would run without its quantizers.

  Raises:
    ValueError: names a linear, and what quantizes it or its inputs.
  """
  model_rules = rules_lib.make_rules(config.quant.rules, config.quant.specs)
  for path, leaf in leaves.items():
    if not path.endswith('/kernel'):
      continue
    linear = path.removesuffix('/kernel')
    spec = model_rules.find(linear)
    latent = spec.weight != 'none' and not composed.is_quantized(leaf)
    if latent or spec.activation != 'none':
      raise ValueError(
        f'{linear} has weights of format {spec.weight!r} and inputs of'
        f' {spec.activation!r} (config.quant); transformers would run it'
        ' without these quantizers, which is another model.'
      )
    if spec.output_norm:
      raise ValueError(
        f'{linear} is followed by a norm (output_norm of config.quant), which'
        ' no model of transformers has there.'
      )


def _write_json(file: pathlib.Path, content: dict[str, Any]) -> None:
  file.write_text(json.dumps(content, indent=2) + '\n', 'utf-8')
