"""A C++ extension for CPUs: built with the package where that is possible.

Its functions are handlers of XLA's foreign function interface and run on XLA's
threads. Nothing needs it: whoever calls it asks `status` or `variants` first.
"""

import ctypes
import functools
import pathlib
import platform
import sysconfig

import jax

HERE = pathlib.Path(__file__).parent
LIBRARY = HERE / f'_native{sysconfig.get_config_var("EXT_SUFFIX")}'
FAILURE = HERE / '_native_failure.txt'  # Written by setup.py.

# Of a handler, by what the instructions are called; fastest first. The numbers
# are those of variants.h.
_VARIANTS = {'avx512_vnni': 2, 'avx2': 1, 'portable': 0}

_HANDLERS = (
  'qat_packed_matmul_1',
  'qat_packed_matmul_2',
  'qat_packed_matmul_4',
  'qat_packed_matmul_8',
  'qat_int8_matmul',
  'qat_bfloat16_matmul',
  'qat_bfloat16_rows',
  'qat_cached_attention_bfloat16',
  'qat_cached_attention_float32',
  'qat_act_quant',
  'qat_read_memory',
)


@functools.cache
def _load() -> ctypes.CDLL | str:
  """The library with its handlers registered, or why there is none."""
  if not LIBRARY.exists():
    if FAILURE.exists():
      return f'absent: {FAILURE.read_text("utf-8").strip()}'
    return (
      f'absent: {LIBRARY.name} was never built; `pip install` builds it where'
      ' there are a C++ compiler and jaxlib.'
    )
  try:
    library = ctypes.CDLL(str(LIBRARY))
    for name in _HANDLERS:
      jax.ffi.register_ffi_target(
        name, jax.ffi.pycapsule(getattr(library, name)), platform='cpu'
      )
  except Exception as error:  # Of another machine, jaxlib or version.
    return (
      f'absent: {LIBRARY.name} cannot be used: {error}; install the package'
      ' again to build it for this machine and this jaxlib.'
    )
  return library


@functools.cache
def variants() -> tuple[str, ...]:
  """What handlers can be asked for here, fastest first; () without a library.

  'portable' always runs; the others need their instructions.
  """
  library = _load()
  if isinstance(library, str):
    return ()
  return tuple(
    name for name, i in _VARIANTS.items() if library.qat_supported(i)
  )


def status() -> str:
  """One line: what this machine runs, or why there is no extension."""
  library = _load()
  if isinstance(library, str):
    return library
  return f'present, for {", ".join(variants())} ({platform.machine()})'


def number(variant: str | None) -> int:
  """How handlers know a variant; None is the fastest.

  Raises:
    ValueError: where the extension or the processor does not have it.
  """
  if not variants():
    raise ValueError(f'The C++ extension is {status()}')
  if variant is None:
    variant = variants()[0]
  if variant not in variants():
    raise ValueError(
      f'variant={variant!r}; this machine runs {", ".join(variants())}.'
    )
  return _VARIANTS[variant]
