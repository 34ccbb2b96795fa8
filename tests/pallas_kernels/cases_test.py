"""Every kernel is lowered for TPUs and GPUs, on a machine without one."""

import jax
import pytest

from pallas_kernels import cases
from pallas_kernels import dispatch

# One TPU with an int8 matrix unit, one without, and a GPU.
TARGETS = [
  *(dispatch.Target('tpu', chip) for chip in ('v5e', 'tpu7x')),
  dispatch.Target('gpu', '9.0'),
]
# What jax calls a platform, and a kernel in the program for it.
LOWERED = {'tpu': ('tpu', 'tpu_custom_call'), 'gpu': ('cuda', 'mosaic_gpu')}
KERNELS = [
  (kernel, target)
  for target in TARGETS
  for kernel in sorted({row.kernel for row in dispatch.TABLE})
  if dispatch.rows_for(kernel, target)
]


def test_there_is_a_case_for_every_row_format_and_dtype():
  for target in TARGETS:
    names = [case.name for case in cases.cases(target)]
    assert len(names) == len(set(names))
    for row in dispatch.TABLE:
      if row.platform != target.platform:
        continue
      mine = [n for n in names if n.startswith(f'{row.kernel} {row.name} ')]
      calls = len(row.dtypes) * max(1, len(row.formats)) * len(cases.ROWS)
      assert len(mine) == calls > 0


@pytest.mark.parametrize('kernel, target', KERNELS, ids=str)
def test_a_kernel_is_lowered(kernel, target):
  # All formats at two numbers of tokens: of decoding and of a ragged prompt.
  found = [
    case
    for case in cases.cases(target)
    if case.name.split()[0] == kernel and case.name.endswith(('M=8', 'M=100'))
  ]
  assert found
  platform, call = LOWERED[target.platform]
  for case in found:
    traced = jax.jit(case.function).trace(*case.arguments)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert call in text, case.name
