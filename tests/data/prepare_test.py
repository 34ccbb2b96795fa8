"""Options, sources and the result; how it is sorted: shards_test.py."""

from collections.abc import Callable
import gzip
import json
import lzma
import os
import pathlib
import subprocess
import sys
import threading

import numpy as np
import pyarrow as pa
from pyarrow import parquet
import pytest
from tokenizers import normalizers

from qat.data import dataset as dataset_lib
from qat.data import files as files_lib
from qat.data import prepare
from qat.data import shards
from qat.data import tokenizer as tokenizer_lib

ROOT = pathlib.Path(__file__).parents[2]

Make = Callable[..., prepare.Options]


def files(folder: pathlib.Path) -> dict[str, bytes]:
  return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


def splits(folder: pathlib.Path) -> dict[str, object]:
  return dataset_lib.open_dataset(folder).manifest['splits']


def test_every_format_gives_the_same_data(
  tmp_path, prepared: pathlib.Path, texts: list[str], options: Make
) -> None:
  lines = ''.join(json.dumps({'text': t}) + '\n' for t in texts).encode()
  (tmp_path / 'a.jsonl.gz').write_bytes(gzip.compress(lines))
  (tmp_path / 'b.json.xz').write_bytes(lzma.compress(lines))
  (tmp_path / 'c.jsonl.zst').write_bytes(
    pa.compress(lines, 'zstd', asbytes=True)
  )
  parquet.write_table(pa.table({'text': texts}), tmp_path / 'd.parquet')
  (tmp_path / 'e').mkdir()
  for i, text in enumerate(texts):
    (tmp_path / 'e' / f'{i:03d}.txt').write_text(text)
  for source in sorted(tmp_path.iterdir()):
    out = tmp_path / f'out-{source.name}'
    prepare.prepare([str(source)], out, options())
    # Names, counts, sizes and sha256 of all shards, and the tokenizer's.
    assert splits(out) == splits(prepared)
    found, expected = map(dataset_lib.open_dataset, (out, prepared))
    assert found.digest == expected.digest


def test_the_manifest_counts_what_there_is(
  prepared: pathlib.Path, texts: list[str]
) -> None:
  found = splits(prepared)
  assert sum(s['documents'] for s in found.values()) == len(texts)
  assert sum(s['bytes'] for s in found.values()) == sum(
    len(t.encode()) for t in texts
  )
  assert not (prepared / '.partial').exists()
  for split in found.values():
    for shard in split['shards']:
      path = prepared / shard['name']
      assert path.stat().st_size == shard['size']
      assert dataset_lib.file_digest(path) == shard['sha256']


def test_validation_is_chosen_by_text_alone(
  tmp_path, jsonl: pathlib.Path, options: Make
) -> None:
  lines = jsonl.read_text().splitlines(keepends=True)
  (tmp_path / 'a.jsonl').write_text(''.join(reversed(lines)))
  # Others come, some go, and a copy goes where its original went.
  (tmp_path / 'b.jsonl').write_text(
    ''.join(lines[40:] + lines + ['{"text":"z"}'])
  )

  def valid(source: pathlib.Path, seed: int) -> set[str]:
    out = tmp_path / f'out-{source.stem}'
    prepare.prepare([str(source)], out, options(seed=seed))
    opened = dataset_lib.open_dataset(out)
    stream = dataset_lib.Stream(opened, 'valid')
    text = opened.tokenizer.decode(
      stream.read(1, len(stream)).tolist(), skip_special_tokens=False
    )
    return set(text.split('<|endoftext|>')[:-1])

  expected = valid(jsonl, 0)
  assert 4 < len(expected) < 30
  assert valid(tmp_path / 'a.jsonl', 1) == expected
  assert valid(tmp_path / 'b.jsonl', 2) - {'z'} == expected


def test_validation_can_be_given(
  tmp_path, jsonl: pathlib.Path, options: Make
) -> None:
  (tmp_path / 'v.txt').write_text('Validation.')
  out = prepare.prepare(
    [str(jsonl)],
    tmp_path / 'out',
    options(valid_fraction=0.0),
    valid=[str(tmp_path / 'v.txt')],
  )
  found = splits(out)
  assert found['train']['documents'] == 120
  assert (found['valid']['documents'], found['valid']['bytes']) == (1, 11)


def test_the_seed_changes_the_order_only(
  tmp_path, prepared: pathlib.Path, jsonl: pathlib.Path, options: Make
) -> None:
  out = prepare.prepare([str(jsonl)], tmp_path / 'out', options(seed=1))
  a, b = splits(prepared)['train'], splits(out)['train']
  assert a['tokens'] == b['tokens']
  assert a['shards'] != b['shards']


def test_a_given_tokenizer_is_copied(
  tmp_path, prepared: pathlib.Path, jsonl: pathlib.Path, options: Make
) -> None:
  given = prepared / dataset_lib.TOKENIZER
  out = prepare.prepare(
    [str(jsonl)],
    tmp_path / 'out',
    options(vocab_size=None, tokenizer=str(given)),
  )
  assert (out / dataset_lib.TOKENIZER).read_bytes() == given.read_bytes()
  assert splits(out) == splits(prepared)


def test_a_large_vocabulary_takes_four_bytes(
  tmp_path, prepared: pathlib.Path, jsonl: pathlib.Path, options: Make
) -> None:
  tokenizer = tokenizer_lib.load(prepared / dataset_lib.TOKENIZER)
  tokenizer.add_special_tokens([f'<{i}>' for i in range(1 << 16)])
  tokenizer.save(str(tmp_path / 'tokenizer.json'))
  out = prepare.prepare(
    [str(jsonl)],
    tmp_path / 'out',
    options(vocab_size=None, tokenizer=str(tmp_path / 'tokenizer.json')),
  )
  opened, expected = map(dataset_lib.open_dataset, (out, prepared))
  assert opened.manifest['dtype'] == 'uint32'
  streams = [dataset_lib.Stream(d, 'train') for d in (opened, expected)]
  np.testing.assert_array_equal(*(s.read(0, len(s)) for s in streams))


def test_a_tokenizer_that_changes_text_is_told_of(
  tmp_path, prepared: pathlib.Path, jsonl: pathlib.Path, options: Make, capfd
) -> None:
  tokenizer = tokenizer_lib.load(prepared / dataset_lib.TOKENIZER)
  tokenizer.normalizer = normalizers.Prepend('>')
  tokenizer.save(str(tmp_path / 'tokenizer.json'))
  out = prepare.prepare(
    [str(jsonl)],
    tmp_path / 'out',
    options(vocab_size=None, tokenizer=str(tmp_path / 'tokenizer.json')),
  )
  assert 'bits per byte are only about right' in capfd.readouterr().err
  for split in splits(out).values():
    assert split['token_bytes'] == split['bytes'] + split['documents']


def test_a_finished_folder_is_left_as_it_is(
  tmp_path, jsonl: pathlib.Path, options: Make
) -> None:
  out = prepare.prepare([str(jsonl)], tmp_path / 'out', options())
  before = {p: p.stat().st_mtime_ns for p in out.glob('*.*')}
  prepare.prepare([str(jsonl)], out, options())
  assert before == {p: p.stat().st_mtime_ns for p in out.glob('*.*')}
  with pytest.raises(ValueError, match='other sources or options'):
    prepare.prepare([str(jsonl)], out, options(seed=1))


def test_a_begun_folder_is_not_mixed_with_other_options(
  tmp_path, jsonl: pathlib.Path, options: Make, monkeypatch
) -> None:
  out = tmp_path / 'out'
  with monkeypatch.context() as patch:
    patch.setattr(shards, '_write_shard', lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
      prepare.prepare([str(jsonl)], out, options())
  with pytest.raises(ValueError, match='begun with other sources or options'):
    prepare.prepare([str(jsonl)], out, options(seed=1))


def test_after_a_mistake_in_the_options_one_can_correct_it(
  tmp_path, prepared: pathlib.Path, jsonl: pathlib.Path, options: Make
) -> None:
  out = tmp_path / 'out'
  with pytest.raises(ValueError, match="no field 'body'"):
    prepare.prepare([str(jsonl)], out, options(field='body'))
  with pytest.raises(ValueError, match='valid split is empty'):
    prepare.prepare([str(jsonl)], out, options(valid_fraction=1e-9))
  prepare.prepare([str(jsonl)], out, options())
  assert files(out) == files(prepared)


def test_a_folder_with_other_files_is_refused(
  tmp_path, jsonl: pathlib.Path, options: Make
) -> None:
  (tmp_path / 'thesis.tex').write_text('do not touch')
  with pytest.raises(ValueError, match=r"not empty.*'thesis\.tex'"):
    prepare.prepare([str(jsonl)], tmp_path, options())
  assert (tmp_path / 'thesis.tex').read_text() == 'do not touch'


def test_a_folder_in_a_source_is_refused(
  tmp_path, jsonl: pathlib.Path, options: Make
) -> None:
  (tmp_path / 'texts').mkdir()
  os.link(jsonl, tmp_path / 'texts' / 'a.jsonl')
  with pytest.raises(ValueError, match='lies in the source'):
    prepare.prepare(
      [str(tmp_path / 'texts')], tmp_path / 'texts' / 'out', options()
    )
  assert [p.name for p in (tmp_path / 'texts').iterdir()] == ['a.jsonl']


def test_two_at_once(tmp_path, jsonl: pathlib.Path, options: Make) -> None:
  out = tmp_path / 'out'
  out.mkdir()
  with files_lib.lock(out, wait=False):
    with pytest.raises(BlockingIOError, match='Another process is writing'):
      prepare.prepare([str(jsonl)], out, options())
    waiting = threading.Thread(
      target=prepare.prepare,
      args=([str(jsonl)], out, options()),
      kwargs=dict(wait=True),
    )
    waiting.start()
    waiting.join(0.3)
    assert waiting.is_alive()
  waiting.join(60)
  dataset_lib.open_dataset(out)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (dict(vocab_size=None), 'either the vocabulary size'),
    (dict(tokenizer='x.json'), 'either the vocabulary size'),
    (dict(valid_fraction=0.0), 'not between 0 and 1'),
    (dict(valid_fraction=float('nan')), 'not between 0 and 1'),
    (dict(valid_fraction=1e-9), r'valid split is empty.*--valid-fraction'),
    (dict(valid_fraction=1 - 1e-9), 'no text to train on'),
    (dict(shard_tokens=0), 'shard_tokens 0'),
    (dict(split='('), 'not a regular expression'),
    (dict(vocab_size=100_000), 'is enough for'),
  ],
)
def test_options_that_cannot_work(
  tmp_path, jsonl: pathlib.Path, options: Make, changes: dict, message: str
) -> None:
  with pytest.raises(ValueError, match=message):
    prepare.prepare([str(jsonl)], tmp_path / 'out', options(**changes))
  with pytest.raises(FileNotFoundError):
    dataset_lib.open_dataset(tmp_path / 'out')


def test_sources_without_text(tmp_path, options: Make) -> None:
  (tmp_path / 'a.jsonl').write_text('{"text": ""}\n' * 3)
  with pytest.raises(ValueError, match='no text to train on'):
    prepare.prepare([str(tmp_path / 'a.jsonl')], tmp_path / 'out', options())
  (tmp_path / 'b.jsonl').write_text('')
  tokenizer = tmp_path / 'tokenizer.json'
  tokenizer_lib.train(['the sea ' * 9], 258).save(str(tokenizer))
  given = options(vocab_size=None, tokenizer=str(tokenizer))
  with pytest.raises(ValueError, match='The sources have no text'):
    prepare.prepare([str(tmp_path / 'b.jsonl')], tmp_path / 'b', given)
  with pytest.raises(ValueError, match='No source is given'):
    prepare.prepare([], tmp_path / 'out', options())


def test_empty_documents_are_counted_and_left_out(
  tmp_path, prepared: pathlib.Path, jsonl: pathlib.Path, options: Make
) -> None:
  (tmp_path / 'a.jsonl').write_text(jsonl.read_text() + '{"text": ""}\n' * 3)
  out = prepare.prepare(
    [str(tmp_path / 'a.jsonl')], tmp_path / 'out', options()
  )
  found = splits(out)
  assert found['train']['shards'] == splits(prepared)['train']['shards']
  assert sum(s['empty_documents'] for s in found.values()) == 3


def test_the_embedded_corpus(tmp_path) -> None:
  out = prepare.ensure_embedded(tmp_path, 2048)
  assert out == tmp_path / 'austen-2048'
  opened = dataset_lib.open_dataset(out)
  assert opened.vocab_size == 2048
  found = opened.manifest['splits']
  # 269 chapters and one preface.
  assert sum(s['documents'] for s in found.values()) == 270
  assert sum(s['bytes'] for s in found.values()) == 4_025_033
  assert found['valid']['bytes'] > 100_000
  stream = dataset_lib.Stream(opened, 'train')
  text = opened.tokenizer.decode(
    stream.read(1, len(stream)).tolist(), skip_special_tokens=False
  )
  for document in text.split('<|endoftext|>')[:-1]:
    head = document[:120].lower()
    assert 'chapter' in head or 'jane austen' in head
  assert prepare.ensure_embedded(tmp_path, 2048) == out


def test_the_command_line(tmp_path, jsonl: pathlib.Path) -> None:
  def run(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(
      [sys.executable, 'scripts/prepare_data.py', *map(str, arguments)],
      cwd=ROOT,
      env=os.environ | {'PYTHONPATH': str(ROOT)},
      capture_output=True,
      text=True,
      timeout=60,
    )

  out = tmp_path / 'out'
  done = run(jsonl, '--out', out, '--vocab-size', 280, '--valid-fraction', 0.1)
  assert done.returncode == 0, done.stderr
  assert 'train: ' in done.stdout and 'gzip -9' in done.stdout
  assert 'Tokenizing: 100%, 120 documents' in done.stderr
  assert run('--verify', out).returncode == 0
  shard = next(out.glob('train-00000*'))
  shard.write_bytes(shard.read_bytes()[:-1] + b'x')
  damaged = run('--verify', out)
  assert damaged.returncode == 1
  assert f'Error: {shard}: sha256' in damaged.stderr
  assert run(jsonl).returncode == 2
  assert run(tmp_path / 'none.jsonl', '--out', out).returncode == 2
