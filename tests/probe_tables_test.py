"""Tables of what compilers told."""

import io

import pytest
from rich import console as rich_console

from qat import probe_tables

STEP = {
  'target': 'h200:1',
  'memory_bytes': 141 * 10**9,
  'error': None,
  'mesh': {'data': 1, 'fsdp': 1},
  'compile_seconds': 12.5,
  'tokens_per_device': 8192,
  'argument_bytes': 3.73e9,
  'output_bytes': 3.73e9,
  'reused_bytes': 3.73e9,
  'temporary_bytes': 2e9,
  'peak_bytes': 142e9,
  'forward_peak_bytes': 100e9,
  'needed_flops': 1.5e13,
  'compiler_flops': None,
  'collectives': {'all-reduce': {'count': 3, 'bytes': 5e6, 'unknown': 1}},
}
FAILED = {
  'target': 'v5e:2x2',
  'memory_bytes': 16 << 30,
  'error': 'RESOURCE_EXHAUSTED: [no] room',
}
KERNEL = {
  'target': 'v5e:2x2',
  'error': None,
  'case': 'mm tpu M=1',
  'argument_bytes': 1_234_567,
  'output_bytes': 2000,
  'temporary_bytes': 0,
  'needed_flops': 2_400_000,
  'schedules': {'mm.1': {'total': 633, 'step': 452, 'conditions': [33, 136]}},
}


@pytest.fixture
def shown():
  """A function that shows a table: its text, without spaces at the ends."""

  def show(table, *arguments):
    console = rich_console.Console(file=io.StringIO(), width=160)
    table(console, *arguments)
    return console.file.getvalue()

  return show


def test_a_step_that_does_not_fit(shown):
  text = shown(probe_tables.steps, 'pquant', [STEP, FAILED])
  assert '1.420' in text and 'backpropagation' not in text
  for part in ('3.73 GB', 'NO ROOM', 'not told', '5.0 MB or more in 3'):
    assert part in text
  assert 'v5e:2x2: RESOURCE_EXHAUSTED: [no] room' in text


def test_a_step_that_fits(shown):
  step = STEP | {'peak_bytes': 5e9, 'backprop_peak_bytes': 20e9}
  text = shown(probe_tables.steps, 'pquant', [step])
  assert 'fits' in text and 'NO ROOM' not in text
  assert '0.050' in text and '0.250' in text


def test_where_all_fail_there_is_no_table(shown):
  text = shown(probe_tables.steps, 'pquant', [FAILED])
  assert text.strip() == 'v5e:2x2: RESOURCE_EXHAUSTED: [no] room'


def test_a_walk(shown):
  row = {
    'name': 'a block',
    'peak_bytes': 3e9,
    'temporary_bytes': 1e9,
    'beside_bytes': 2e9,
  }
  walk = {'target': 'h200:1', 'error': None, 'programs': [row]}
  walk |= {'block_bytes': 4e9, 'states_bytes': 5e9}
  walk |= {'limit_bytes': 9e9, 'most_bytes': 5e9}
  text = shown(probe_tables.walks, 'llama', [walk, FAILED])
  for part in ('3.00', '1.00', '2.00', '5.00', '4.00 GB', '[no] room'):
    assert part in text
  text = ' '.join(text.split())
  assert 'limit is 9.00 GB, the most at once 5.00 GB, within it.' in text
  text = shown(probe_tables.walks, 'llama', [walk | {'most_bytes': 10e9}])
  assert '10.00 GB, ABOVE it.' in ' '.join(text.split())


def test_kernels_of_a_tpu(shown):
  failed = FAILED | {'case': 'mm tpu M=16'}
  text = shown(probe_tables.kernels, [KERNEL, failed])
  for part in ('1.24 MB', '2.40M', '452 (33, 136)', 'FAILED'):
    assert part in text
  assert 'v5e:2x2 mm tpu M=16: RESOURCE_EXHAUSTED: [no] room' in text


def test_kernels_of_a_gpu(shown):
  kernel = {k: v for k, v in KERNEL.items() if k != 'schedules'}
  kernel |= {'target': 'h200:1', 'registers': 168, 'spilled_bytes': 16}
  text = shown(probe_tables.kernels, [kernel])
  assert '168, 16 bytes spilled' in text and 'bundles' not in text
