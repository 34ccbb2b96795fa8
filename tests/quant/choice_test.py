"""The choice of a way to multiply codes."""

import pytest

from pallas_kernels.quantized_train_matmul import cpu as scaled_matmul
from qat.quant import choice


@pytest.mark.parametrize('platform', ['cpu', 'gpu', 'tpu'])
@pytest.mark.parametrize('tiles', [False, True])
@pytest.mark.parametrize('extension', [False, True])
def test_auto_is_resolved(monkeypatch, platform, tiles, extension):
  monkeypatch.setattr(choice, '_cpu_has_tiles', lambda: tiles)
  monkeypatch.setattr(scaled_matmul, 'runs_here', lambda: extension)
  method = choice.choose_method('auto', 'bfloat16', platform)
  on_cpu = platform == 'cpu'
  assert method.int8 == (not on_cpu or tiles)
  assert method.native == (on_cpu and extension and not tiles)
  assert method.transpose_in_loop == on_cpu
  # XLA does not split the extension's products.
  split = choice.choose_method('auto', 'bfloat16', platform, devices=2)
  assert not split.native
  for name in ('int8', 'float'):
    named = choice.choose_method(name, 'float32', platform, True)
    assert named.int8 == (name == 'int8')
    assert named.gather_codes and not named.native


def test_native_is_the_extension_or_an_error_that_says_why(monkeypatch):
  monkeypatch.setattr(scaled_matmul, 'runs_here', lambda: True)
  method = choice.choose_method('native', 'bfloat16', 'cpu')
  assert method.native and not method.int8
  with pytest.raises(ValueError, match="'native': the C.. extension is for CP"):
    choice.choose_method('native', 'bfloat16', 'tpu')
  with pytest.raises(ValueError, match="'native': 2 devices.*'auto'"):
    choice.choose_method('native', 'bfloat16', 'cpu', devices=2)
  monkeypatch.setattr(scaled_matmul, 'runs_here', lambda: False)
  with pytest.raises(ValueError, match='AVX512-VNNI is missing'):
    choice.choose_method('native', 'bfloat16', 'cpu')


def test_what_it_does_not_know_is_refused():
  with pytest.raises(ValueError, match="quantized_dot='int4'.*auto"):
    choice.choose_method('int4', 'bfloat16', 'cpu')
  with pytest.raises(ValueError, match="dot_dtype='float16'.*bfloat16"):
    choice.choose_method('auto', 'float16', 'cpu')
