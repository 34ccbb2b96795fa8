"""What a quantization has finished, on disk, to go on from after an end.

A folder holds `settings.json`, what the results depend on, and a .npz file for
each finished part, there in full or not at all. A quantized matrix comes back
the same in every bit (`packing`), and so does all that goes on from it.
"""

from collections.abc import Mapping
import json
import pathlib
import shutil
from typing import Any

import numpy as np

from qat.data import files
from qat.quant import composed
from qat.quant import packing

SETTINGS = 'settings.json'
_NOTES = 'notes'
_PREFIX = 'array:'  # Without it, no array could be named 'file' or 'notes'.


class Store:
  """The finished parts of one quantization.

  Attributes:
    begun: whether another process began it.
  """

  def __init__(self, folder: pathlib.Path, settings: Mapping[str, Any]):
    """Opens a folder, or makes it.

    Args:
      folder: of the parts; what killed processes were writing is removed.
      settings: what the parts depend on: name -> what JSON can hold.

    Raises:
      ValueError: the folder holds parts that depend on something else.
    """
    self._folder = folder
    file = folder / SETTINGS
    settings = json.loads(json.dumps(dict(settings)))
    self.begun = file.is_file()
    if not self.begun:
      folder.mkdir(parents=True, exist_ok=True)
      files.write(file, json.dumps(settings, indent=2).encode())
      return
    saved = json.loads(file.read_text('utf-8'))
    changed = [
      f'  {name}: {saved.get(name)!r} there, {settings.get(name)!r} now'
      for name in sorted({*saved, *settings})
      if saved.get(name) != settings.get(name)
    ]
    if changed:
      raise ValueError(
        f'{folder} holds parts of another quantization:\n'
        + '\n'.join(changed)
        + '\nRepeat the command that began it, remove the folder, or give'
        ' another --out.'
      )
    files.remove_unfinished(folder)

  def has(self, name: str) -> bool:
    """Whether the part `name` is finished."""
    return self._file(name).is_file()

  def save(
    self, name: str, arrays: Mapping[str, np.ndarray], notes: Any
  ) -> None:
    """Writes a part; one of that name is replaced.

    Args:
      name: of the part.
      arrays: by name.
      notes: what JSON can hold.
    """
    path = self._file(name)
    temporary = files.unfinished(path)
    text = np.frombuffer(json.dumps(notes).encode(), np.uint8)
    content = {_PREFIX + key: array for key, array in arrays.items()}
    with temporary.open('wb') as file:
      np.savez(file, **content, **{_NOTES: text})
      files.sync(file)
    files.rename(temporary, path)

  def load(self, name: str) -> tuple[dict[str, np.ndarray], Any]:
    """The arrays and the notes of a part.

    Raises:
      ValueError: the file is damaged.
    """
    file = self._file(name)
    try:
      with (
        file.open('rb') as stream,
        np.load(stream, allow_pickle=False) as found,
      ):
        notes = json.loads(found[_NOTES].tobytes())
        arrays = {
          key.removeprefix(_PREFIX): found[key]
          for key in found.files
          if key != _NOTES
        }
    except Exception as error:  # zipfile, zlib and numpy each have their own.
      raise ValueError(
        f'{file} is damaged ({type(error).__name__}: {error}); remove it and'
        ' repeat the command.'
      ) from error
    return arrays, notes

  def save_packed(
    self,
    name: str,
    packed: Mapping[str, tuple[packing.Arrays, packing.Meta]],
    notes: Any,
  ) -> None:
    """Writes a part of quantized matrices.

    Args:
      name: of the part.
      packed: path -> what `packing.pack` made of the matrix.
      notes: what JSON can hold.
    """
    arrays = {
      f'{path}:{key}': array
      for path, (parts, _) in packed.items()
      for key, array in parts.items()
    }
    metas = {path: meta for path, (_, meta) in packed.items()}
    self.save(name, arrays, {'metas': metas, 'notes': notes})

  def load_packed(self, name: str) -> tuple[dict[str, composed.Quantized], Any]:
    """The quantized matrices of a part by path, and its notes.

    Raises:
      ValueError: the file is damaged.
    """
    arrays, about = self.load(name)
    leaves = {}
    for path, meta in about['metas'].items():
      start = f'{path}:'
      parts = {
        key.removeprefix(start): array
        for key, array in arrays.items()
        if key.startswith(start)
      }
      leaves[path] = packing.unpack(parts, meta)
    return leaves, about['notes']

  def remove(self) -> None:
    """Removes the folder."""
    shutil.rmtree(self._folder)

  def _file(self, name: str) -> pathlib.Path:
    return self._folder / f'{name}.npz'
