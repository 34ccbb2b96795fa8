"""The process of a program: what has to be right before jax is imported."""

import ctypes
import os
import pathlib
import platform
import sys

# XLA:CPU returns large buffers to the system after every use, and page faults
# then cost more than many products. These keep them, on huge pages.
MALLOC = (
  'glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0'
  ':glibc.malloc.trim_threshold=17179869184'
)

# Files under /dev of GPUs and TPUs.
ACCELERATORS = ('nvidia0', 'accel0', 'vfio/0', 'kfd')


def one_blas_thread() -> None:
  """Makes factorizations on a CPU run in one thread, unless it is set.

  jaxlib's LAPACK is OpenBLAS; its threads and XLA's wait for each other's
  cores, and one thread is then many times as fast as several. To be called
  before numpy is imported.
  """
  os.environ.setdefault('OPENBLAS_NUM_THREADS', '1')


def tune_malloc() -> None:
  """Starts this program anew with `MALLOC`, where it runs on a CPU alone.

  glibc reads its tunables when a process starts, so they cannot be set later.
  Does nothing on other systems, beside an accelerator, or where GLIBC_TUNABLES
  is set already (set it empty to opt out). To be called before anything is
  imported that takes long, or has side effects.
  """
  if 'GLIBC_TUNABLES' in os.environ or platform.libc_ver()[0] != 'glibc':
    return
  if any(pathlib.Path('/dev', name).exists() for name in ACCELERATORS):
    return
  os.environ['GLIBC_TUNABLES'] = MALLOC
  os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def trim() -> None:
  """Gives memory that was freed back to the system, which `MALLOC` keeps.

  For after work that took memory in other pieces than what follows: a start, an
  evaluation. Does nothing without glibc.
  """
  if platform.libc_ver()[0] == 'glibc':
    ctypes.CDLL(None).malloc_trim(0)
