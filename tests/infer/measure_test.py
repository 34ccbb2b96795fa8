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
  configs = {name: tiny.config(name, tiny.EXACT) for name in ('fp', 'pquant')}
  rows = list(
    measure.speeds(configs, batch=2, prompt=4, tokens=3, rounds=1, cache='int8')
  )
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
  configs = {'fp': tiny.config('fp', tiny.EXACT)}
  (row,) = measure.speeds(configs, batch=1, prompt=4, tokens=1, rounds=1)
  assert row['decode/s'] is row['of memory'] is None


def test_random_parameters_have_the_shapes_of_packed_ones():
  config = tiny.config('pquant8')
  params = measure.random_params(config)
  program = decode.decode_program(config, dispatch.here(), 1, 1)
  assert jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), params
  ) == jax.tree.map(lambda s: s, program.arguments[0])
