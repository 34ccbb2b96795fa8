"""What the doctor says of this environment, and of what is missing in it."""

import pathlib
import re

import jax

from pallas_kernels import native
from qat import doctor


def test_it_prints_a_line_for_each_finding(capsys):
  assert doctor.main() == 0
  printed = capsys.readouterr().out.splitlines()
  assert [line[:17].rstrip() for line in printed] == [
    what for what, _ in doctor.lines()
  ]
  assert f'jax               {jax.__version__}' in printed
  assert f'C++ extension     {native.status()}' in printed


def test_devices_are_those_of_jax():
  count = len(jax.devices())
  assert doctor.devices().startswith(f'{count} x {jax.default_backend()} (')


def test_a_backend_that_does_not_start_is_a_line(monkeypatch):
  def fails():
    raise RuntimeError('no such platform')

  monkeypatch.setattr(jax, 'devices', fails)
  assert doctor.devices() == 'none: no such platform'


def test_what_is_missing_names_its_remedy(monkeypatch):
  monkeypatch.setitem(doctor.EXTRAS, 'hf', ('no_such_module_here', 'corpora'))
  assert doctor.extra('hf') == ("absent, for corpora: pip install -e '.[hf]'")
  monkeypatch.setitem(doctor.EXTRAS, 'hf', ('json', 'corpora'))
  assert doctor.extra('hf') == 'present: corpora'
  assert doctor.version('no-such-package-here') == 'not installed'


def test_the_extras_are_those_of_setup_py():
  setup = pathlib.Path(doctor.__file__).parents[1] / 'setup.py'
  names = re.findall(r"^  '(\w+)': \[", setup.read_text('utf-8'), re.M)
  assert {*doctor.EXTRAS, 'test'} == {*names}
