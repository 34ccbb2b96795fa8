"""Tests of qat.metrics; TensorBoard's files are read without its code."""

import errno
import io
import json
import math
from pathlib import Path
import struct

import hypothesis
from hypothesis import strategies as st
import jax.numpy as jnp
import pytest
from rich import console as rich_console
from tensorboardX.proto import event_pb2

from qat import metrics


def logger(workdir, first_step=0, primary=True):
  return metrics.Logger(
    workdir, total_steps=100, first_step=first_step, primary=primary
  )


def on_terminal(log):
  log.console = rich_console.Console(
    file=io.StringIO(), force_terminal=True, width=100, color_system=None
  )
  return log


def in_a_file(log):
  log.console = rich_console.Console(file=io.StringIO(), width=40)
  return log


def write(workdir, steps, first_step=0):
  with logger(workdir, first_step) as log:
    for step in steps:
      log.scalars(step, {'train/loss': 1.0 / (step + 1)})


def steps_of(workdir):
  return [row['step'] for row in metrics.read(workdir)]


def events(workdir):
  """The events of every TensorBoard file, read without tensorboardX."""
  found = []
  for path in sorted((workdir / 'tensorboard').iterdir()):
    data = path.read_bytes()
    while data:  # Length (8), its checksum (4), the event, its checksum (4).
      (length,) = struct.unpack('<Q', data[:8])
      event = event_pb2.Event.FromString(data[12 : 12 + length])
      found.append(event)
      data = data[16 + length :]
  return found


def test_a_row_comes_back_as_it_was_written(tmp_path):
  with logger(tmp_path) as log:
    log.scalars(3, {'train/loss': 2.5, 'health/zeros/block_0/attn/q': 1})
    log.scalars(3, {'eval/loss': jnp.float32(0.1)})
  first, second = metrics.read(tmp_path)
  assert first.pop('time') > 1e9
  assert first == {
    'step': 3,
    'train/loss': 2.5,
    'health/zeros/block_0/attn/q': 1.0,
  }
  assert second['eval/loss'] == float(jnp.float32(0.1))


@hypothesis.given(
  st.dictionaries(
    st.text(max_size=8).filter(lambda key: key not in ('step', 'time')),
    st.floats(),
    max_size=4,
  )
)
def test_every_number_and_key_survives_as_valid_json(tmp_path_factory, values):
  workdir = tmp_path_factory.mktemp('run')
  with logger(workdir) as log:
    log.scalars(1, values)
  line = (workdir / 'metrics.jsonl').read_text()

  def refuse(constant):
    raise AssertionError(f'{constant} is not JSON')

  json.loads(line, parse_constant=refuse)
  (row,) = metrics.read(workdir)
  del row['step'], row['time']
  assert row.keys() == values.keys()
  for key, value in values.items():
    assert row[key] == value or math.isnan(row[key]) and math.isnan(value)


def test_rows_are_on_disk_before_the_run_ends(tmp_path):
  with logger(tmp_path) as log:
    log.scalars(1, {'train/loss': 1.0})
    assert steps_of(tmp_path) == [1]


@pytest.mark.parametrize('resume', range(1, 7))
def test_a_resumed_run_has_no_row_twice(tmp_path, resume):
  write(tmp_path, range(1, 7))
  write(tmp_path, range(resume + 1, 9), first_step=resume)
  assert steps_of(tmp_path) == list(range(1, 9))


def test_a_run_that_starts_over_keeps_no_row(tmp_path):
  write(tmp_path, range(5))
  write(tmp_path, [0, 1])
  assert steps_of(tmp_path) == [0, 1]


def test_a_half_written_last_line_is_dropped(tmp_path):
  write(tmp_path, [1, 2])
  path = tmp_path / 'metrics.jsonl'
  whole = path.read_bytes()
  start = whole.index(b'\n') + 1
  for end in range(start, len(whole) - 1):
    path.write_bytes(whole[:end])
    assert steps_of(tmp_path) == [1]
  write(tmp_path, [2, 3], first_step=1)
  assert steps_of(tmp_path) == [1, 2, 3]
  path.write_bytes(whole + bytes(64))  # What a power cut can leave behind.
  assert steps_of(tmp_path) == [1, 2]


def test_a_last_line_that_lacks_only_its_end_is_kept(tmp_path):
  write(tmp_path, [1, 2])
  path = tmp_path / 'metrics.jsonl'
  path.write_bytes(path.read_bytes()[:-1])
  write(tmp_path, [3], first_step=2)
  assert steps_of(tmp_path) == [1, 2, 3]


@pytest.mark.parametrize(
  'line',
  [
    b'{"step": 2',
    b'[1]',
    b'{"loss": 1}',
    b'{"step": 2.5}',
    b'{"step": true}',
    b'',
    b'\xff',
    b'[' * 100_000,
    b'{"step": 2, "x": 1' + b'0' * 400 + b'}',
  ],
)
def test_damage_in_the_middle_is_named_and_nothing_is_lost(tmp_path, line):
  write(tmp_path, [1, 3])
  path = tmp_path / 'metrics.jsonl'
  first, last = path.read_bytes().splitlines()
  damaged = b'\n'.join([first, line, last, b''])
  path.write_bytes(damaged)
  with pytest.raises(ValueError, match=r'metrics\.jsonl:2 is damaged.*Delete'):
    metrics.read(tmp_path)
  with pytest.raises(ValueError, match='metrics.jsonl:2'):
    write(tmp_path, [4], first_step=3)
  assert path.read_bytes() == damaged


def test_a_missing_file_is_named(tmp_path):
  with pytest.raises(
    FileNotFoundError, match='No metrics.jsonl in .*folder of'
  ):
    metrics.read(tmp_path)


def test_cut_leaves_the_file_whole_when_it_is_interrupted(
  tmp_path, monkeypatch
):
  write(tmp_path, [1, 2])
  before = (tmp_path / 'metrics.jsonl').read_bytes()

  def die(*unused):
    raise KeyboardInterrupt

  monkeypatch.setattr(metrics.os, 'replace', die)
  with pytest.raises(KeyboardInterrupt):
    metrics.cut(tmp_path / 'metrics.jsonl', 1)
  assert (tmp_path / 'metrics.jsonl').read_bytes() == before


def test_cut_serves_samples_too_and_leaves_their_text_alone(tmp_path):
  path = tmp_path / 'samples.jsonl'
  lines = [json.dumps({'step': s, 'text': 'nan'}) + '\n' for s in (1, 2)]
  path.write_text(''.join(lines))
  assert metrics.read_rows(path)[0] == {'step': 1, 'text': 'nan'}
  metrics.cut(path, 1)
  assert path.read_text() == lines[0]


@pytest.mark.parametrize('key', ['step', 'time'])
def test_a_key_that_rows_have_already_is_refused(tmp_path, key):
  with logger(tmp_path) as log:
    with pytest.raises(ValueError, match=f'{key!r}; rename'):
      log.scalars(1, {key: 1.0})
  assert metrics.read(tmp_path) == []


def test_tensorboard_gets_the_same_scalars(tmp_path):
  with logger(tmp_path) as log:
    log.scalars(7, {'train/loss': 2.5, 'eval/loss': math.nan})
    found = events(tmp_path)  # Flushed: the run has not ended yet.
  values = {
    v.tag: (e.step, v.simple_value) for e in found for v in e.summary.value
  }
  assert values['train/loss'] == (7, 2.5)
  assert math.isnan(values['eval/loss'][1])


def test_tensorboard_is_told_what_a_resumed_run_writes_again(tmp_path):
  write(tmp_path, [1, 2, 3])
  write(tmp_path, [3, 4], first_step=2)
  starts = [e.step for e in events(tmp_path) if e.HasField('session_log')]
  # TensorBoard forgets the events of an earlier file from this step on.
  assert starts == [0, 3]


def test_a_full_disk_reaches_the_training_loop(tmp_path, monkeypatch):
  with logger(tmp_path) as log:

    def full():
      raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr(log._events, 'flush', full)
    with pytest.raises(OSError, match='No space left'):
      log.scalars(1, {'train/loss': 1.0})
    monkeypatch.undo()


def test_only_the_primary_process_writes_and_prints(tmp_path, capsys):
  with logger(tmp_path, primary=False) as log:
    log.scalars(1, {'train/loss': 1.0})
    log.progress(1, loss=1.0, tokens_per_s=1.0, eta_s=1.0)
    log.say('hello')
  assert not list(tmp_path.iterdir())
  assert capsys.readouterr().out == ''


def test_a_terminal_gets_a_bar_and_lines_above_it(tmp_path):
  with on_terminal(logger(tmp_path, first_step=10)) as log:
    log.say('saved [bold]12[/bold] :smile:')
    log.progress(40, loss=3.21456, tokens_per_s=51_234, eta_s=3725)
  out = log.console.file.getvalue()
  assert '40/100' in out and '40%' in out
  assert 'loss 3.2146' in out
  assert '51.2k tok/s' in out
  assert '1h 02m left' in out
  assert 'saved [bold]12[/bold] :smile:' in out


def test_a_log_file_gets_one_whole_plain_line_at_each_call(tmp_path):
  with in_a_file(logger(tmp_path)) as log:
    for step in (10, 20):
      log.progress(step, loss=math.nan, tokens_per_s=999.6, eta_s=math.inf)
  assert log.console.file.getvalue().splitlines() == [
    'step  10/100  loss nan  1.00k tok/s  ? left',
    'step  20/100  loss nan  1.00k tok/s  ? left',
  ]


def test_control_characters_reach_no_terminal(tmp_path):
  with on_terminal(logger(tmp_path)) as log:
    log.say('a\x1b]0;pwned\x07b')
  assert r'a\x1b]0;pwned\x07b' in log.console.file.getvalue()


def test_the_logger_takes_the_folder_as_text(tmp_path):
  write(str(tmp_path), [1])
  assert steps_of(Path(tmp_path)) == [1]
