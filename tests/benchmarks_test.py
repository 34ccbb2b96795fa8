"""What benchmarks tell beside their figures."""

import os

from qat import benchmarks


def test_rows_become_a_table_and_a_result(capsys):
  rows = [
    {'model': 'a', 'decode/s': 12.3456, 'bytes': 51_234, 'of memory': None},
    {'model': 'b', 'decode/s': 7.0, 'bytes': 12, 'of memory': 0.5},
  ]
  found = benchmarks.show(rows)
  assert found == {
    'machine': benchmarks.machine(),
    'commit': benchmarks.commit(),
    'rows': rows,
  }
  printed = capsys.readouterr().out
  for text in (*rows[0], '12.3', '51.2k', 'None', '0.5', benchmarks.machine()):
    assert text in printed


def test_a_cpu_is_named_with_its_cores():
  assert benchmarks.machine().endswith(f'{len(os.sched_getaffinity(0))} cores')
