"""What progress prints."""

import time

from qat.data import progress


def test_plain_lines_where_there_is_no_terminal(capfd, monkeypatch) -> None:
  now = [100.0]
  monkeypatch.setattr(time, 'monotonic', lambda: now[0])
  with progress.bar('Reading', 8) as report:
    report(1, 'one [file]')
    now[0] += progress.LINE_EVERY_S
    report(2, 'two [files]')
    report(8, 'eight')
  out, err = capfd.readouterr()
  assert not out
  assert err.splitlines() == [
    'Reading:  25%, two [files]',
    'Reading: 100%, eight, 10 s',
  ]


def test_an_unknown_size_has_no_share(capfd) -> None:
  with progress.bar('Reading', 0) as report:
    report(5, 'five')
  assert capfd.readouterr().err == 'Reading: five, 0 s\n'


def test_a_bar_on_a_terminal(capfd, monkeypatch) -> None:
  monkeypatch.setenv('FORCE_COLOR', '1')
  monkeypatch.setenv('COLUMNS', '120')
  with progress.bar('Reading', 4) as report:
    report(4, 'four')
  err = capfd.readouterr().err
  assert 'Reading' in err and 'four' in err and '━' in err
