"""Small states, and folders of checkpoints of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qat import checkpoint
from qat import restore


def make(step: int, size: int = 64) -> dict[str, Any]:
  """The state of a step; its random bits cannot be compressed."""
  rng = np.random.default_rng(step)
  bits = rng.integers(0, 2**32, (size, 64), np.uint32)
  return {
    'params': {
      'kernel': jnp.asarray(bits.view(np.float32)),
      'scale': jnp.asarray(rng.standard_normal(8), jnp.bfloat16),
    },
    'codes': (jnp.asarray(rng.integers(-1, 2, 48), jnp.int8),),
    'mask': jnp.asarray(rng.integers(0, 2, 5), bool),
    'step': jnp.int32(step),
  }


def abstract(state: Any) -> Any:
  """What `restore.newest` takes in the place of `state`."""
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
  )


def target(size: int = 64) -> Any:
  """As `abstract`, for the states of every step."""
  return abstract(make(0, size))


def same(a: Any, b: Any) -> bool:
  """Whether two trees are equal bit for bit."""
  a, b = jax.device_get((a, b))
  return jax.tree.structure(a) == jax.tree.structure(b) and all(
    x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  )


def opened(
  path: Path,
  *,
  keep_last: int = 3,
  keep_every: int = 0,
  timeout_s: float = 30.0,
  say: Callable[[str], None] = print,
) -> checkpoint.Checkpointer:
  """A Checkpointer with bounds that a test need not name."""
  return checkpoint.Checkpointer(
    path,
    keep_last=keep_last,
    keep_every=keep_every,
    timeout_s=timeout_s,
    say=say,
  )


def save_steps(path: Path, *steps: int) -> None:
  """Saves the states of these steps."""
  with opened(path) as saver:
    for step in steps:
      saver.save(step, make(step), {'at': step})


def look(
  path: Path, say: Callable[[str], None] = print
) -> restore.Restored | None:
  """Restores without touching anything."""
  return restore.newest(
    path, target(), partial=False, quarantine=False, say=say
  )


def damage(step_path: Path) -> None:
  """Flips one bit of the kernel's data."""
  stored = np.asarray(make(int(step_path.name))['params']['kernel'])
  for file in files_of(step_path):
    whole = bytearray(file.read_bytes())
    at = whole.find(stored.tobytes()[:64])
    if at >= 0:
      whole[at + 1000] ^= 4
      file.write_bytes(whole)
      return
  raise AssertionError(f'no data in {step_path}')


def files_of(path: Path) -> list[Path]:
  """Every file under `path`."""
  return sorted(each for each in path.rglob('*') if each.is_file())
