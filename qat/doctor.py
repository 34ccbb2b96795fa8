"""What is installed here, and what is missing and why: `python -m qat.doctor`.

Prints one line for each of: versions, the devices jax sees, the C++ extension,
and the packages of extras. Changes nothing; ends with 0 wherever it can print.
"""

from importlib import metadata
import importlib.util
import platform
import sys

import jax

from pallas_kernels import native

# Versions that a report of a fault should name.
PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain')

# What an extra of setup.py brings: the module to look for, and what needs it.
EXTRAS = {
  'hf': ('datasets', 'corpora of the hub'),
  'interop': ('gguf', 'models of other programs'),
  'compare': ('torch', 'tests against other implementations'),
  'llama': ('llama_cpp', 'measuring decoding beside llama.cpp'),
  'tpu': ('libtpu', 'training on TPUs, and compiling for them without one'),
  'gpu': ('jax_cuda13_plugin', 'training on GPUs, and compiling for them'),
}


def version(package: str) -> str:
  """The installed version of a distribution, or 'not installed'."""
  try:
    return metadata.version(package)
  except metadata.PackageNotFoundError:
    return 'not installed'


def devices() -> str:
  """What jax computes on, or why it cannot."""
  try:
    found = jax.devices()
  except RuntimeError as error:
    return f'none: {error}'
  kinds = sorted({device.device_kind for device in found})
  return f'{len(found)} x {found[0].platform} ({", ".join(kinds)})'


def extra(name: str) -> str:
  """Whether the packages of an extra are there, and what for."""
  module, purpose = EXTRAS[name]
  if importlib.util.find_spec(module):
    return f'present: {purpose}'
  return f"absent, for {purpose}: pip install -e '.[{name}]'"


def lines() -> list[tuple[str, str]]:
  """All findings, as (what, finding)."""
  return [
    ('python', f'{platform.python_version()} on {platform.platform()}'),
    *((package, version(package)) for package in PACKAGES),
    ('devices', devices()),
    ('C++ extension', native.status()),
    *((f'extra {name}', extra(name)) for name in EXTRAS),
  ]


def main() -> int:
  """Prints the findings."""
  for what, finding in lines():
    print(f'{what:17} {finding}')
  return 0


if __name__ == '__main__':
  sys.exit(main())
