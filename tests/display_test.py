"""Tests of qat.display."""

import io
import math

import hypothesis
from hypothesis import strategies as st
import pytest
from rich import console as rich_console

from qat import display


@hypothesis.given(st.text())
def test_printable_text_stays_as_it_is(text):
  plain = ''.join(c for c in text if c.isprintable() or c in '\n\t')
  assert display.printable(plain) == plain
  safe = display.printable(text)
  assert all(c.isprintable() or c in '\n\t' for c in safe)


SUMMARY = {
  'parameters': 12_600_000,
  'tokens': 1_640_000,
  'steps': 400,
  'seconds': 3725.2,
  'eval/loss': 3.2,
  'eval/perplexity': 24.5,
  'eval/bits_per_byte': 1.5,
  'baseline/unigram_bits_per_byte': 4.5,
  'baseline/gzip_bits_per_byte': 3.0,
  'bits_per_weight': 1.28,
  'tokens_per_s': 51_234.0,
  'flips': 12.0,
}


def table(summary, name='pquant-tiny'):
  console = rich_console.Console(file=io.StringIO(), width=80)
  display.summary_table(console, name, summary)
  return console.file.getvalue()


def test_hostile_names_are_shown_and_not_obeyed():
  hostile = 'a\x1b]0;pwned\x07b\x1b[2Jc\x9b31md\r\b\u202ee\ud800f\x00'
  out = table({hostile: 1.0}, hostile)
  assert out.count(r'\x1b]0;pwned\x07') == 2
  assert {c for c in out if not c.isprintable()} <= {'\n'}
  out.encode('utf-8')


def test_the_summary_shows_every_number_for_people():
  lines = {
    line.split('  ')[0].strip(): line.split('  ', 1)[1].split()
    for line in table(SUMMARY).splitlines()
    if '  ' in line.strip()
  }
  assert lines['parameters'] == ['12.6M']
  assert lines['time'] == ['1h', '02m']
  assert lines['flips'] == ['12']
  bars = [len(lines[k][1]) for k in ('bits per byte', 'gzip', 'unigram')]
  assert bars == [8, 16, 24]


def test_a_summary_without_some_numbers_still_prints():
  assert '24.50' in table({'eval/perplexity': 24.5})
  assert 'pquant-tiny' in table({})
  assert 'nan' in table({'eval/bits_per_byte': math.nan})


@pytest.mark.parametrize(
  'number, text',
  [
    (0, '0'),
    (7, '7'),
    (1.5, '1.50'),
    (99.96, '100'),
    (999, '999'),
    (999.6, '1.00k'),
    (51_234, '51.2k'),
    (999_999, '1.00M'),
    (2.6e9, '2.60B'),
    (-1500, '-1.50k'),
    (math.inf, 'inf'),
    (math.nan, 'nan'),
  ],
)
def test_counts_have_three_digits(number, text):
  assert display.count(number) == text


@pytest.mark.parametrize(
  'seconds, text',
  [
    (-1, '0s'),
    (59.4, '59s'),
    (59.6, '1m 00s'),
    (3725, '1h 02m'),
    (90_000, '1d 01h'),
    (math.nan, '?'),
  ],
)
def test_durations_have_two_units(seconds, text):
  assert display.duration(seconds) == text


def test_time_left_follows_from_the_speed(monkeypatch):
  monkeypatch.setattr(display.time, 'monotonic', lambda: 130.0)
  assert display.left(100.0, 3, 12) == '1m 30s left'


def test_a_log_is_as_wide_as_tables_need_and_columns_are_obeyed(monkeypatch):
  monkeypatch.delenv('COLUMNS', raising=False)
  assert display.console().width == 110
  assert display.console(stderr=True).stderr
  monkeypatch.setenv('COLUMNS', '70')
  assert display.console().width == 70
