"""The model folder: a model of ours as files, quantized or not.

  manifest.json                  digests of the others, and what they hold
  config.json                    the resolved config
  tokenizer.json                 a Hugging Face tokenizer
  params-00001.safetensors ...   the parameters

A float leaf is stored under its path, 'block_0/attn/q/kernel', as it is; of a
quantized one `qat.quant.packing` stores arrays, 'block_0/attn/q/kernel/codes'.
The folder appears when all of it is written. What is read is checked against
its digest first.
"""

from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
import dataclasses
import hashlib
import json
import pathlib
import re
from typing import Any

import jax
from ml_collections import ConfigDict
import numpy as np
import tokenizers

from qat import config as config_lib
from qat import manifest as manifest_lib
from qat.data import tokenizer as tokenizer_lib
from qat.interop import files
from qat.quant import composed
from qat.quant import packing

FORMAT = 1  # A reader refuses a newer one.
CONFIG = 'config.json'
TOKENIZER = 'tokenizer.json'
_PARAMS = re.compile(r'params-\d{5,}\.safetensors')


@dataclasses.dataclass(frozen=True)
class Folder:
  """An open model folder; nothing of its parameters is read yet.

  Attributes:
    path: the folder.
    config: of the model.
    tokenizer: of the model.
    begin: the token id that an empty prompt begins with.
    end: the token id that ends a text.
    source: where the model comes from, and how it was made.
    leaves: by path {'file', 'shape'} and either 'dtype' or 'packed'.
    digests: sha256 by file name.
  """

  path: pathlib.Path
  config: ConfigDict
  tokenizer: tokenizers.Tokenizer
  begin: int
  end: int
  source: dict[str, Any]
  leaves: dict[str, dict[str, Any]]
  digests: dict[str, str]


def flat(params: Any) -> dict[str, Any]:
  """The leaves of a tree by path; a quantized matrix is one leaf."""
  pairs = jax.tree_util.tree_flatten_with_path(
    params, is_leaf=composed.is_quantized
  )[0]
  return {'/'.join(key.key for key in keys): leaf for keys, leaf in pairs}


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
  """Inverts `flat`."""
  tree: dict[str, Any] = {}
  for path, leaf in leaves.items():
    *parents, last = path.split('/')
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[last] = leaf
  return tree


def save(
  out: pathlib.Path,
  config: ConfigDict,
  leaves: Iterable[tuple[str, Any]],
  tokenizer: tokenizers.Tokenizer,
  *,
  begin: int,
  end: int,
  source: Mapping[str, Any],
  shard_bytes: int = files.SHARD_BYTES,
) -> None:
  """Writes a model folder; takes no more memory than a file of it.

  Args:
    out: the folder; must not exist, or be empty.
    config: of the model.
    leaves: path and leaf, `flat(params).items()`; taken one by one.
    tokenizer: of the model.
    begin: token id that an empty prompt begins with.
    end: token id that ends a text.
    source: where the model comes from; JSON.
    shard_bytes: of a file, at most, unless one leaf is larger.

  Raises:
    FileExistsError: `out` holds something.
    ValueError: a path comes twice.
  """
  with files.new_folder(out) as folder:
    (folder / CONFIG).write_text(config_lib.to_json(config), 'utf-8')
    (folder / TOKENIZER).write_text(tokenizer.to_str(), 'utf-8')
    about: dict[str, dict[str, Any]] = {}
    shard: dict[str, np.ndarray] = {}
    size = number = 0
    for path, leaf in leaves:
      if path in about:
        raise ValueError(f'Two leaves have the path {path!r}.')
      if composed.is_quantized(leaf):
        packed, meta = packing.pack(leaf)
        arrays = {f'{path}/{name}': x for name, x in packed.items()}
        kind: dict[str, Any] = {'packed': meta}
      else:
        leaf = np.asarray(leaf)
        arrays, kind = {path: leaf}, {'dtype': leaf.dtype.name}
      more = sum(x.nbytes for x in arrays.values())
      if not number or (shard and size + more > shard_bytes):
        if shard:
          files.write(folder / _params_file(number), shard)
        shard, size, number = {}, 0, number + 1
      shard |= arrays
      size += more
      about[path] = {
        'file': _params_file(number),
        'shape': list(leaf.shape),
        **kind,
      }
    if not about:
      raise ValueError('A model without a single parameter cannot be saved.')
    files.write(folder / _params_file(number), shard)
    del shard
    content = {
      'format': FORMAT,
      'begin': begin,
      'end': end,
      'source': dict(source),
      'leaves': about,
      'files': {
        file.name: {'bytes': file.stat().st_size, 'sha256': _sha256(file)}
        for file in sorted(folder.iterdir())
      },
    }
    manifest_lib.write(folder, content)


def _params_file(number: int) -> str:
  return f'params-{number:05d}.safetensors'


def _sha256(file: pathlib.Path) -> str:
  with open(file, 'rb') as opened:
    return hashlib.file_digest(opened, 'sha256').hexdigest()


def open_folder(path: pathlib.Path) -> Folder:
  """Opens a model folder and checks what is cheap to check.

  Raises:
    FileNotFoundError: there is no model, or a file of it is missing.
    CorruptError: a file is not what was written.
    ValueError: a newer version of this code wrote it.
  """
  content = _manifest(path)
  for name, file in content['files'].items():
    if not (path / name).is_file():
      raise FileNotFoundError(f'{path / name} is missing. Copy it again.')
    if (found := (path / name).stat().st_size) != file['bytes']:
      raise manifest_lib.CorruptError(
        f'{path / name} has {found} bytes and was written with'
        f' {file["bytes"]}. Copy it again.'
      )
  digests = {name: file['sha256'] for name, file in content['files'].items()}
  for name in (CONFIG, TOKENIZER):
    _check(path / name, digests[name])
  return Folder(
    path=path,
    config=config_lib.load(path),
    tokenizer=tokenizer_lib.load(path / TOKENIZER),
    digests=digests,
    **{key: content[key] for key in ('begin', 'end', 'source', 'leaves')},
  )


def _manifest(path: pathlib.Path) -> dict[str, Any]:
  """The content of manifest.json; names no file outside the folder."""
  file = path / manifest_lib.FILE
  if not file.is_file():
    raise FileNotFoundError(
      f'{path} is no model folder: {file} is missing. scripts/import_model.py'
      ' and scripts/quantize.py write such folders.'
    )
  try:
    outer = json.loads(file.read_bytes())
    content = outer['manifest']
    text = json.dumps(content, sort_keys=True)
    if hashlib.sha256(text.encode()).hexdigest() != outer['sha256']:
      raise manifest_lib.CorruptError(f'{file} does not match its own hash.')
    if content['format'] > FORMAT:
      raise ValueError(
        f'{path} has format {content["format"]} and this version reads up to'
        f' {FORMAT}; install the version that wrote it.'
      )
    if lost := {'begin', 'end', 'source', 'leaves'} - content.keys():
      raise KeyError(min(lost))
    names = set(content['files'])
    params = {leaf['file'] for leaf in content['leaves'].values()}
    if bad := names - {CONFIG, TOKENIZER} - params | params - names:
      raise KeyError(f'file {min(bad)!r}')
    if not all(map(_PARAMS.fullmatch, params)):
      raise KeyError(f'files {params}')
  except (
    json.JSONDecodeError,
    UnicodeDecodeError,
    KeyError,
    TypeError,
    AttributeError,
  ) as error:
    raise manifest_lib.CorruptError(
      f'{file} is damaged: {error!r}. Copy it again.'
    ) from error
  return content


def _check(file: pathlib.Path, digest: str) -> None:
  if _sha256(file) != digest:
    raise manifest_lib.CorruptError(
      f'{file} is damaged: its bytes are not those that were written. Copy it'
      ' again.'
    )


def leaves(folder: Folder) -> Iterator[tuple[str, Any]]:
  """Path and leaf, one by one: NumPy arrays as stored, or quantized matrices.

  Raises:
    CorruptError: a file is not what was written; before anything of it is used.
  """
  checked = set()
  for path, about in folder.leaves.items():
    file = folder.path / about['file']
    if file not in checked:
      _check(file, folder.digests[file.name])
      there = files.headers(file)
      checked.add(file)
    if 'packed' not in about:
      yield path, files.read(file, path)
      continue
    names = [name for name in there if name.startswith(path + '/')]
    arrays = {
      name.removeprefix(path + '/'): files.read(file, name) for name in names
    }
    yield path, packing.unpack(arrays, about['packed'])
