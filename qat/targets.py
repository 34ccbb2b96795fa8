"""Accelerators to compile for on a machine that has none."""

from collections.abc import Mapping
import dataclasses
import importlib.util
import re
from typing import Any

import jax
from jax.experimental import topologies

from pallas_kernels import dispatch

# Bytes of memory that a program may use on a device of jax, from the makers'
# pages. A chip of TPU7x is two devices, of the others one.
MEMORY = {
  'v4': 32 << 30,
  'v5e': 16 << 30,
  'v5p': 95 << 30,
  'v6e': 32 << 30,
  'tpu7x': 96 << 30,
  'h200': 141 * 10**9,
}

# The H200 as XLA wants it described, from NVIDIA's data sheet and the tuning
# guide of the Hopper architecture.
_H200 = {
  'threads_per_block_limit': 1024,
  'threads_per_warp': 32,
  'shared_memory_per_block': 48 << 10,  # Without opting in.
  'shared_memory_per_block_optin': 227 << 10,
  'shared_memory_per_core': 228 << 10,  # Of a streaming multiprocessor.
  'threads_per_core_limit': 2048,
  'core_count': 132,
  'fpus_per_core': 128,
  'block_dim_limit_x': 2**31 - 1,
  'block_dim_limit_y': 2**16 - 1,
  'block_dim_limit_z': 2**16 - 1,
  'memory_bandwidth': 4_800_000_000_000,  # Bytes a second.
  'l2_cache_size': 50 << 20,
  'clock_rate_ghz': 1.98,
  'device_memory_size': 141 * 10**9,
  'registers_per_core_limit': 1 << 16,
  'registers_per_block_limit': 1 << 16,
}


@dataclasses.dataclass(frozen=True)
class Target:
  """Some devices of one kind.

  Attributes:
    kind: a key of `MEMORY`.
    shape: of a TPU's slice, as its maker writes it: '2x2x1'; of GPUs their
      number.
  """

  kind: str
  shape: str

  @property
  def name(self) -> str:
    """As `parse` takes it."""
    return f'{self.kind}:{self.shape}'

  @property
  def is_gpu(self) -> bool:
    """Whether it is a GPU; else it is a TPU."""
    return self.kind == 'h200'

  @property
  def kernels(self) -> dispatch.Target:
    """One of its devices, as the table of kernels has it."""
    if self.is_gpu:
      return dispatch.Target('gpu', '9.0')
    return dispatch.Target('tpu', self.kind)


def parse(name: str) -> Target:
  """'v5p:2x2x1', 'v5e:4x4', 'h200' (one GPU) or 'h200:8' as a Target.

  Raises:
    ValueError: for another name.
  """
  kind, _, shape = name.partition(':')
  form = r'[1-9]\d*' if kind == 'h200' else r'[1-9]\d*(x[1-9]\d*){1,2}'
  if kind == 'h200' and not shape:
    shape = '1'
  if kind not in MEMORY or not re.fullmatch(form, shape):
    raise ValueError(
      f'No target {name!r}; name a slice of TPUs, such as v5p:2x2x1, v5e:4x4 or'
      f' v6e:4x4 ({", ".join(k for k in MEMORY if k != "h200")}), or h200, or'
      ' h200:8 for eight of them on one host.'
    )
  return Target(kind, shape)


def environment(target: Target, inherited: Mapping[str, str]) -> dict[str, str]:
  """The environment of a process that compiles for `target`.

  The process itself runs on its CPU. To be set before jax is imported.
  """
  made = dict(inherited, JAX_PLATFORMS='cpu')
  if target.is_gpu:
    made['JAX_SKIP_CUDA_CONSTRAINTS_CHECK'] = '1'
    # Nothing can be tried out, so the first algorithm is taken.
    flags = inherited.get('XLA_FLAGS', '')
    made['XLA_FLAGS'] = f'{flags} --xla_gpu_autotune_level=0'.strip()
    return made
  return made | {
    'TPU_SKIP_MDS_QUERY': '1',  # There is no metadata server to ask.
    'TPU_WORKER_HOSTNAMES': 'localhost',
    'TPU_ACCELERATOR_TYPE': 'v5litepod-8',  # Any; the topology decides.
    'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',  # Other processes may compile too.
  }


def missing(target: Target) -> str | None:
  """How to install the compiler that is not there; None where it is."""
  jax_version = jax.__version__
  if not target.is_gpu:
    if importlib.util.find_spec('libtpu'):
      return None
    return (
      f'{target.name}: the compiler for TPUs is not installed. Needs no TPU:'
      f' pip install "jax[tpu]=={jax_version}"'
    )
  plugins = ('jax_cuda13_plugin', 'jax_cuda12_plugin')
  if any(map(importlib.util.find_spec, plugins)):
    return None
  return (
    f'{target.name}: the compiler for GPUs is not installed. Needs no GPU:'
    f' pip install "jax-cuda13-plugin=={jax_version}"'
    ' nvidia-cuda-nvcc nvidia-cudnn-cu13'
  )


def devices(target: Target) -> list[jax.Device]:
  """Devices to make a mesh of; programs can be compiled for them, not run.

  The process must have been started with `environment`.

  Raises:
    ValueError: the compiler does not know such a slice.
  """
  arguments: dict[str, Any] = {
    'platform': 'tpu',
    'topology_name': target.name,
  }
  if target.is_gpu:
    arguments = {
      'platform': 'cuda',
      'topology_name': target.kind,
      'topology': f'1x1x{target.shape}',  # Partitions, hosts, GPUs.
      'target_config': _gpu_text(),
    }
  try:
    return list(topologies.get_topology_desc(**arguments).devices)
  except jax.errors.JaxRuntimeError as error:
    raise ValueError(f'{target.name}: {error}') from error


def _gpu_text() -> str:
  facts = '\n'.join(f'  {key}: {value}' for key, value in _H200.items())
  return f"""gpu_device_info {{
{facts}
  cuda_compute_capability {{ major: 9 feature_extension: ACCELERATED_FEATURES }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "NVIDIA H200"
"""
