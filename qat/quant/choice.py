"""Which way to multiply codes is the fastest on a platform."""

import functools
import pathlib
import re

from pallas_kernels import native
from pallas_kernels.quantized_train_matmul import cpu as scaled_matmul
from qat.quant import dot


def choose_method(
  name: str,
  dtype: str,
  platform: str,
  split_parameters: bool = False,
  devices: int = 1,
) -> dot.Method:
  """Resolves a config's 'auto', 'int8', 'native' or 'float' for a platform.

  Int8 products are faster on accelerators, and on CPUs with AMX tiles. Other
  CPUs multiply bfloat16 at least as fast as int8 in XLA, and int8 twice as fast
  as that in the C++ extension, where that is and they have AVX512-VNNI. XLA
  does not split the extension's products over devices.

  Args:
    name: 'auto', 'int8', 'native' or 'float'.
    dtype: of float products: 'bfloat16' or 'float32'.
    platform: 'cpu', 'gpu' or 'tpu'.
    split_parameters: whether parameters are split over devices.
    devices: size of the mesh.

  Raises:
    ValueError: for another name or dtype, or where 'native' cannot be.
  """
  choices = ('auto', 'int8', 'native', 'float')
  if name not in choices:
    raise ValueError(
      f'model.quantized_dot={name!r}; one of {", ".join(choices)}.'
    )
  if dtype not in ('bfloat16', 'float32'):
    raise ValueError(f'model.dot_dtype={dtype!r}; one of bfloat16, float32.')
  on_cpu = platform == 'cpu'
  int8 = name == 'int8' or name == 'auto' and (not on_cpu or _cpu_has_tiles())
  lacks = _lacks_for_native(on_cpu, devices) if name != 'float' else ''
  if name == 'native' and lacks:
    raise ValueError(f"model.quantized_dot='native': {lacks}; use 'auto'.")
  return dot.Method(
    int8,
    dtype,
    transpose_in_loop=on_cpu,
    gather_codes=split_parameters,
    row_major=not on_cpu,
    native=name == 'native' or name == 'auto' and not int8 and not lacks,
    few_rows=name != 'float' and not lacks,
  )


def _lacks_for_native(on_cpu: bool, devices: int) -> str:
  """Why the C++ extension cannot multiply codes; '' if it can."""
  if not on_cpu:
    return 'the C++ extension is for CPUs'
  if devices > 1:
    return f'{devices} devices, and the C++ extension multiplies on one'
  if not scaled_matmul.runs_here():
    return f'AVX512-VNNI is missing, or the extension ({native.status()})'
  return ''


@functools.cache
def _cpu_has_tiles() -> bool:
  cpuinfo = pathlib.Path('/proc/cpuinfo')
  return cpuinfo.exists() and bool(
    re.search(r'\bamx_int8\b', cpuinfo.read_text())
  )
