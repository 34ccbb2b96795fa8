"""The C++ extension: what it says of itself, and that it can be missing."""

import os
import pathlib
import platform
import subprocess
import sys
import threading

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from pallas_kernels import native
from pallas_kernels.quantized_train_matmul import cpu as scaled_matmul

ROOT = pathlib.Path(native.__file__).parents[2]
present = pytest.mark.skipif(
  not native.variants(), reason=f'the C++ extension is {native.status()}'
)
vnni = pytest.mark.skipif(
  not scaled_matmul.runs_here(), reason='no extension, or no AVX512-VNNI'
)


@pytest.fixture
def fresh():
  """Looks for the library anew, before and after."""

  def clear():
    native._load.cache_clear()
    native.variants.cache_clear()

  clear()
  yield
  clear()


def test_the_status_agrees_with_what_can_be_asked_for():
  assert native.status().startswith('present' if native.variants() else 'abs')
  for name in native.variants():
    assert name in native.status()


@present
def test_variants_are_those_of_the_processor():
  assert native.variants()[-1] == 'portable'
  cpuinfo = pathlib.Path('/proc/cpuinfo')
  if platform.machine() == 'x86_64' and cpuinfo.exists():
    flags = cpuinfo.read_text().split()
    for name in ('avx512_vnni', 'avx2'):
      assert (name in native.variants()) == (name in flags)
  assert native.number(None) == native.number(native.variants()[0])
  with pytest.raises(ValueError, match="variant='sse9'.*portable"):
    native.number('sse9')


def test_a_library_that_was_never_built_says_so(fresh, monkeypatch, tmp_path):
  monkeypatch.setattr(native, 'LIBRARY', tmp_path / 'none.so')
  monkeypatch.setattr(native, 'FAILURE', tmp_path / 'none.txt')
  assert 'never built' in native.status()
  assert native.variants() == ()
  with pytest.raises(ValueError, match='absent.*never built'):
    native.number(None)


def test_a_failed_build_says_why(fresh, monkeypatch, tmp_path):
  monkeypatch.setattr(native, 'LIBRARY', tmp_path / 'none.so')
  monkeypatch.setattr(native, 'FAILURE', tmp_path / 'failure.txt')
  native.FAILURE.write_text('the build failed: no compiler\n')
  assert native.status() == 'absent: the build failed: no compiler'


def test_a_file_that_is_no_library_is_no_error(fresh, monkeypatch, tmp_path):
  monkeypatch.setattr(native, 'LIBRARY', tmp_path / 'broken.so')
  native.LIBRARY.write_bytes(b'not a library')
  assert 'cannot be used' in native.status()
  assert native.variants() == ()


def test_without_a_compiler_the_build_goes_on_and_notes_why(tmp_path):
  lib = tmp_path / 'lib'
  subprocess.run(
    [sys.executable, 'setup.py', '-q', 'build_ext', '--build-lib', lib]
    + ['--build-temp', tmp_path / 'temp'],
    cwd=ROOT,
    env=os.environ | {'CC': '/no/compiler', 'CXX': '/no/compiler'},
    check=True,
    capture_output=True,
  )
  files = [path.name for path in lib.rglob('*') if path.is_file()]
  assert files == [native.FAILURE.name]
  note = next(lib.rglob('*.txt')).read_text()
  assert 'the build failed' in note and '/no/compiler' in note


def draw(rows, inputs, outputs, seed=0):
  rng = np.random.default_rng(seed)
  x, w = (
    rng.integers(-128, 128, shape).astype(np.int8)
    for shape in ((rows, inputs), (inputs, outputs))
  )
  x[:1], w[:, :1] = -128, -128  # The largest sums there are.
  return x, w


@vnni
@pytest.mark.parametrize(
  'shape',
  [(1, 1, 1), (7, 6, 70), (100, 512, 48), (33, 101, 200), (13, 7, 16)]
  + [(205, 64, 65), (12, 4096, 17), (0, 8, 8)],
)
def test_scaled_products_are_those_of_xla_bit_for_bit(shape):
  x, w = draw(*shape)
  rng = np.random.default_rng(1)
  rows, columns = (shape[0], 1), (1, shape[2])
  for of_rows, of_columns in ((rows, (1, 1)), ((1, 1), columns)):
    scale_M1, scale_1N = (
      rng.uniform(0.001, 1, size).astype(np.float32)
      for size in (of_rows, of_columns)
    )
    found = scaled_matmul.matmul(*map(jnp.asarray, (x, w, scale_M1, scale_1N)))
    exact = (np.int32(x) @ np.int32(w)).astype(np.float32)
    np.testing.assert_array_equal(found, exact * scale_1N * scale_M1)


@vnni
def test_scaled_products_of_a_stack():
  x, w = draw(6, 40, 3 * 20)
  w_EKN = jnp.asarray(w.reshape(40, 3, 20).swapaxes(0, 1))
  one = jnp.ones((1, 1))
  found = jax.vmap(scaled_matmul.matmul, (None, 0, None, None))(
    jnp.asarray(x), w_EKN, one, one
  )
  np.testing.assert_array_equal(found, np.int32(x) @ np.int32(w_EKN))


@vnni
@pytest.mark.parametrize(
  'shape', [(5, 64, 40, 70), (1, 7, 33, 16), (9, 1, 8, 1)]
)
@pytest.mark.parametrize('fine', [False, True])
def test_groups_meet_their_own_matrices_bit_for_bit(shape, fine):
  groups, rows, inputs, outputs = shape
  experts = 3
  x, w = draw(groups * rows, inputs, experts * outputs)
  x = x.reshape(groups, rows, inputs)
  w = np.ascontiguousarray(w.reshape(inputs, experts, outputs).swapaxes(0, 1))
  rng = np.random.default_rng(1)
  expert = rng.integers(0, experts, groups).astype(np.int32)
  of_rows = (groups, rows, 1) if fine else (1, 1, 1)
  of_columns = (experts, 1, outputs if fine else 1)
  scale_x, scale_w = (
    rng.uniform(0.001, 1, size).astype(np.float32)
    for size in (of_rows, of_columns)
  )
  found = scaled_matmul.grouped_matmul(
    *map(jnp.asarray, (x, w, expert, scale_x, scale_w))
  )
  exact = (np.int32(x) @ np.int32(w)[expert]).astype(np.float32)
  np.testing.assert_array_equal(found, exact * scale_w[expert] * scale_x)


@vnni
def test_calls_from_many_threads_end():
  # Each call wants threads that the others hold.
  x, w = draw(64, 512, 640)
  expected = np.int32(x) @ np.int32(w)
  multiply = jax.jit(scaled_matmul.matmul)
  one, wrong = jnp.ones((1, 1)), []

  def work():
    for _ in range(5):
      if not np.array_equal(multiply(x, w, one, one), expected):
        wrong.append(1)

  threads = [threading.Thread(target=work) for _ in range(8)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(60)
  assert not wrong and not any(thread.is_alive() for thread in threads)


@vnni
def test_shapes_that_do_not_fit_are_an_error():
  one = jnp.ones((1, 1))
  with pytest.raises(jax.errors.JaxRuntimeError, match='do not fit'):
    scaled_matmul.matmul(
      jnp.ones((2, 3), jnp.int8), jnp.ones((4, 2), jnp.int8), one, one
    ).block_until_ready()
  x, w = jnp.ones((2, 1, 3), jnp.int8), jnp.ones((2, 3, 4), jnp.int8)
  scales = jnp.ones((1, 1, 1)), jnp.ones((2, 1, 1))
  with pytest.raises(jax.errors.JaxRuntimeError, match='no such matrix'):
    scaled_matmul.grouped_matmul(
      x, w, jnp.array([0, 2], jnp.int32), *scales
    ).block_until_ready()
