"""The table of implementations, and what a choice says."""

import importlib

import pytest

from pallas_kernels import dispatch

CPU = dispatch.Target('cpu')
V5E = dispatch.Target('tpu', 'v5e')
TABLE = (
  dispatch.Row('k', 'few', 'tpu', rows=(1, 8)),
  dispatch.Row('k', 'tpu', 'tpu', ('v5e',), ('int8',), ('1bit',), -2, 128),
  dispatch.Row('k', 'reference'),
)


def call(target=V5E, dtype='int8', rows=9, format='1bit', axis=-2, block=128):
  return dispatch.Call(target, dtype, rows, format, axis, block)


def test_the_first_row_that_fits_is_taken():
  assert dispatch.choose('k', call(), None, TABLE) == 'tpu'
  assert dispatch.choose('k', call(rows=8), None, TABLE) == 'few'
  for other in (
    call(CPU),
    call(dispatch.Target('tpu', 'v4')),
    call(dtype='bfloat16'),
    call(format='2bit'),
    call(axis=-1),
    call(block=64),
  ):
    assert dispatch.choose('k', other, None, TABLE) == 'reference'


def test_a_name_is_taken_or_the_error_says_why_not():
  assert dispatch.choose('k', call(rows=99), 'few', TABLE) == 'few'
  for other, reason in (
    (call(CPU), 'it runs on tpu, not on cpu'),
    (call(dispatch.Target('tpu', 'v4')), 'not on tpu v4'),
    (call(dtype='float32'), 'activations are float32'),
    (call(format='base3'), "weights are 'base3'"),
    (call(axis=-1), 'axis -1, not -2'),
    (call(block=64), 'blocks of 64 bytes'),
  ):
    with pytest.raises(ValueError, match=f"'tpu' cannot do this: .*{reason}"):
      dispatch.choose('k', other, 'tpu', TABLE)
  with pytest.raises(ValueError, match="no 'fast'; one of"):
    dispatch.choose('k', call(), 'fast', TABLE)
  with pytest.raises(ValueError, match='no implementation can do'):
    dispatch.choose('k', call(CPU), None, TABLE[:2])


def test_every_row_has_its_file_and_its_entry():
  for row in dispatch.TABLE:
    api = importlib.import_module(f'pallas_kernels.{row.kernel}.api')
    assert row.name in api.IMPLEMENTATIONS
    importlib.import_module(f'pallas_kernels.{row.kernel}.{row.name}')


def test_the_specification_of_a_kernel_is_its_last_row_and_takes_all():
  for kernel in {row.kernel for row in dispatch.TABLE}:
    last = [row for row in dispatch.TABLE if row.kernel == kernel][-1]
    assert last == dispatch.Row(kernel, 'reference')


def test_every_generation_of_tpus_has_operands():
  assert set(dispatch.TPU_KINDS.values()) == set(dispatch.TPU_OPERANDS)
  assert dispatch.here().platform == 'cpu'
