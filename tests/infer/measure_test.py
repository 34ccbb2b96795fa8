"""What is measured of generation: every figure is there, and adds up."""

import jax
import pytest

from pallas_kernels import dispatch
from qat.infer import decode
from qat.infer import measure
from tests import tiny


@pytest.fixture(autouse=True, scope='module')
def quickly():
  with tiny.compiled_quickly():
    yield


def test_models_are_measured_side_by_side():
  models = {
    name: measure.random_model(tiny.config(name, tiny.EXACT), 'int8')
    for name in ('fp', 'pquant')
  }
  rows = list(measure.speeds(models, batch=2, prompt=4, tokens=3, rounds=1))
  assert [row['model'] for row in rows] == ['fp', 'pquant']
  for row in rows:
    assert row['prefill/s'] > 0 and row['decode/s'] > 0
    if row['memory/s'] is not None:
      share = row['bytes'] * row['decode/s'] / 2 / row['memory/s']
      assert row['of memory'] == pytest.approx(share)
  (fp, pquant) = rows
  floats = 64 * 32 + 3 * 32  # Embedding and norms.
  assert fp['bytes'] == 4 * (floats + 4 * 32**2 + 3 * 32 * 48)


def test_a_prompt_alone_has_no_decoding():
  models = {'fp': measure.random_model(tiny.config('fp', tiny.EXACT))}
  (row,) = measure.speeds(models, batch=1, prompt=4, tokens=1, rounds=1)
  assert row['decode/s'] is row['of memory'] is None


def test_ratios_are_those_of_the_rounds(monkeypatch):
  # Seconds of a prompt and of the step after it; the first round warms up.
  slow, fast = iter([9, 9, 1, 8, 1, 2]), iter([9, 9, 1, 2, 1, 4])
  clock = 0.0

  def write(seconds):
    def rows(prompts, tokens):
      nonlocal clock
      assert all(0 <= i < 5 for ids in prompts for i in ids)
      for _ in range(tokens):
        clock += next(seconds)
        yield [0]

    return rows

  monkeypatch.setattr(measure.time, 'perf_counter', lambda: clock)
  monkeypatch.setattr(measure.native, 'variants', lambda: ())
  models = {
    'slow': measure.Model(write(slow), 7, 5),
    'fast': measure.Model(write(fast), 7, 5),
  }
  found = measure.speeds(
    models, batch=1, prompt=2, tokens=2, rounds=2, base='slow'
  )
  assert [row['speedup'] for row in found] == [1, (8 / 2 + 2 / 4) / 2]


def test_random_parameters_have_the_shapes_of_packed_ones():
  config = tiny.config('pquant8')
  params = measure.random_params(config)
  program = decode.decode_program(config, dispatch.here(), 1, 1)
  assert jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), params
  ) == jax.tree.map(lambda s: s, program.arguments[0])
