"""Every kernel is lowered for TPUs and GPUs, on a machine without one."""

import dataclasses

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


@pytest.mark.parametrize('target', TARGETS, ids=str)
def test_there_is_a_case_for_every_row_format_dtype_and_size(target):
  found = cases.cases(target)
  names = {case.name for case in found}
  assert len(names) == len(found)
  rows = [row for row in dispatch.TABLE if row.platform == target.platform]
  assert {case.row for case in found} == set(rows)
  for row in rows:
    sizes = ['128x2048x512', '2048x2000x600']
    if row.kernel != 'quantized_train_matmul':  # No training on one token.
      sizes = ['1x2000x600', '16x2000x600', *sizes]
    assert {
      f'{row.kernel} {row.name} {format}{dtype} {size}'
      for format in [f'{f} ' for f in row.formats] or ['']
      for dtype in row.dtypes
      for size in sizes
    } <= names
    mine = sum(case.row == row for case in found)
    assert mine == max(1, len(row.formats)) * len(row.dtypes) * len(sizes)


def test_a_case_counts_the_operations_that_its_product_needs():
  flops = {
    case.row.kernel: case.flops
    for case in cases.cases(TARGETS[0])
    if case.shape[0] == 128
  }
  one = 2 * 128 * 2048 * 512
  assert flops == {
    'packed_matmul': one,
    'act_quant': 0,
    'decoupled_ffn_up': one + 2 * 128 * 2048 * 256,
    'grouped_matmul': one,  # Of each token with its one expert.
    'quantized_train_matmul': one,
  }


# All formats at two numbers of tokens: of a ragged prompt and of decoding.
@pytest.mark.parametrize(
  'tokens', [2048, pytest.param(16, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize('kernel, target', KERNELS, ids=str)
def test_a_kernel_is_lowered(kernel, target, tokens):
  found = [
    dataclasses.replace(case, shape=(min(tokens, 300), 2000, 600))
    for case in cases.cases(target)
    if case.row.kernel == kernel and case.shape[0] == tokens
  ]
  # No training on few tokens.
  assert found or (kernel, tokens) == ('quantized_train_matmul', 16)
  platform, name = LOWERED[target.platform]
  for case in found:
    function, arguments = case.call()
    traced = jax.jit(function).trace(*arguments)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert name in text, case.name
