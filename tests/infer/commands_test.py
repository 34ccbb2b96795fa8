"""scripts/generate.py and evaluate.py: what is printed, and what refused."""

import io
import json
import os
import pathlib
import shutil
import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st
import pytest

from qat import evaluate as evaluate_lib
from qat.data import dataset as dataset_lib
from qat.data import prepare
from qat.infer import generate as generate_lib
from qat.infer import load
from scripts import evaluate
from scripts import export_model
from scripts import generate
from tests import tiny

both = pytest.mark.parametrize(
  'main', [generate.main, evaluate.main], ids=['generate', 'evaluate']
)
ROOT = pathlib.Path(generate.__file__).parents[1]


@pytest.fixture(autouse=True, scope='module')
def quickly():
  with tiny.compiled_quickly():
    yield


@pytest.fixture(scope='module')
def run(saved):
  return load.load_run(saved.workdir)


def call(main, workdir, *arguments):
  return main(['--workdir', str(workdir), *arguments])


def refused(capsys, code):
  """The one line that an error is told in."""
  printed = capsys.readouterr()
  assert code == 2
  assert not printed.out
  (line,) = printed.err.splitlines()
  assert line.startswith('Error: ')
  return line


# ------------------------------------------------------------------- generate


def continued(run, prompt, **changes):
  """The prompt and what the library makes of it."""
  ids = run.dataset.tokenizer.encode(prompt, add_special_tokens=False).ids
  options = dict(
    tokens=6, temperature=0.8, top_k=40, top_p=0.95, seed=0, stop=0
  )
  new = generate_lib.generate(
    run.model, run.params, [0, *ids], **{**options, **changes}
  )
  return run.dataset.tokenizer.decode([*ids, *new])


def test_the_prompt_is_continued(saved, run, capsys):
  assert call(generate.main, saved.workdir, '--prompt', 'the sea was') == 0
  printed = capsys.readouterr()
  assert printed.out == continued(run, 'the sea was') + '\n'
  assert printed.out.startswith('the sea was')
  assert not printed.err


def test_options_go_over_those_of_the_run(saved, run, capsys):
  given = '--prompt x --tokens 9 --temperature 2 --top_k 0 --top_p 1 --seed 3'
  assert call(generate.main, saved.workdir, *given.split()) == 0
  expected = continued(
    run, 'x', tokens=9, temperature=2.0, top_k=0, top_p=1.0, seed=3
  )
  assert capsys.readouterr().out == expected + '\n'
  assert call(generate.main, saved.workdir, *given.split()) == 0
  assert capsys.readouterr().out == expected + '\n'


def test_without_a_prompt_those_of_the_run_are_continued(saved, run, capsys):
  assert call(generate.main, saved.workdir, '--num', '2') == 0
  expected = [
    continued(run, prompt, seed=seed)
    for prompt in ('the sea', 'a ship')
    for seed in (0, 1)
  ]
  assert capsys.readouterr().out == f'\n{"-" * 20}\n'.join(expected) + '\n'


def test_a_prompt_can_come_from_the_standard_input(
  saved, run, capsys, monkeypatch
):
  monkeypatch.setattr(sys, 'stdin', io.StringIO('under “grey” skies\nand'))
  assert call(generate.main, saved.workdir, '--prompt', '-') == 0
  expected = continued(run, 'under “grey” skies\nand')
  assert capsys.readouterr().out == expected + '\n'


def test_an_empty_prompt_begins_a_document(saved, run, capsys):
  assert call(generate.main, saved.workdir, '--prompt', '') == 0
  assert capsys.readouterr().out == continued(run, '') + '\n'


def test_packed_weights_write_the_same_text(saved, tmp_path, capsys):
  options = ['--prompt', 'the sea was', '--temperature', '0', '--tokens', '12']
  assert call(generate.main, saved.workdir, *options) == 0
  expected = capsys.readouterr().out
  assert call(generate.main, saved.workdir, '--packed', *options) == 0
  assert capsys.readouterr().out == expected
  # A folder is packed once and read again.
  out = tmp_path / 'packed'
  arguments = [str(saved.workdir), '--out', str(out), '--format', 'packed']
  assert export_model.main(arguments) == 0
  printed = capsys.readouterr().out
  assert printed.startswith(f'{out}: a packed model: ')
  assert '1bit' in printed
  for more in ([], ['--packed', '--cache', 'float32']):
    assert call(generate.main, out, *more, *options) == 0
    assert capsys.readouterr().out == expected
  arguments[2] += '-2'
  assert export_model.main([*arguments, '--dtype', 'float16']) == 2
  assert '--dtype float16' in capsys.readouterr().err


@pytest.mark.parametrize(
  'size',
  [
    pytest.param(2, marks=pytest.mark.slow),
    3,
    pytest.param(9, marks=pytest.mark.slow),
  ],
)
def test_texts_that_are_computed_at_once_are_the_same(saved, run, capsys, size):
  options = ['--num', '2', '--batch', str(size)]
  assert call(generate.main, saved.workdir, *options) == 0
  expected = [
    continued(run, prompt, seed=seed)
    for prompt in ('the sea', 'a ship')
    for seed in (0, 1)
  ]
  assert capsys.readouterr().out == f'\n{"-" * 20}\n'.join(expected) + '\n'


@pytest.mark.parametrize(
  ('arguments', 'expected'),
  [
    (['--prompt', 'a', '--temperature', '-1'], 'temperature=-1.0'),
    (['--prompt', 'a', '--top_p', '0'], 'top_p=0.0'),
    (['--prompt', 'a', '--num', '0'], '--num 0'),
    (['--prompt', 'a', '--batch', '0'], '--batch 0'),
    (['--prompt', 'a\udcff'], 'not UTF-8'),
  ],
)
def test_generate_tells_what_is_wrong_in_a_line(
  saved, capsys, arguments, expected
):
  code = call(generate.main, saved.workdir, *arguments)
  assert expected in refused(capsys, code)


@both
def test_a_folder_without_a_run_is_told_in_a_line(tmp_path, capsys, main):
  assert 'holds no run' in refused(capsys, call(main, tmp_path / 'x'))


@both
def test_a_run_without_its_data_is_told_in_a_line(copied, capsys, main):
  shutil.rmtree(copied.config.data.dataset)
  assert 'No finished data set' in refused(capsys, call(main, copied.workdir))


@both
def test_a_run_of_damaged_checkpoints_is_an_error(copied, capsys, main):
  for step in ('2', '10'):
    (copied.workdir / 'checkpoints' / step / 'manifest.json').write_text('{')
  assert call(main, copied.workdir) == 2
  printed = capsys.readouterr()
  assert not printed.out
  assert printed.err.splitlines()[-1].startswith('Error: No checkpoint in')
  assert 'Traceback' not in printed.err


# Text: whole characters, and bytes that are none, as untrained models make.
IDS = st.lists(st.integers(1, 279), max_size=40)


@given(prompt=st.text(max_size=8), new=IDS)
def test_the_pieces_of_a_text_are_the_text(run, prompt, new):
  tokenizer = run.dataset.tokenizer
  ids = tokenizer.encode(prompt, add_special_tokens=False).ids
  found = list(generate.pieces(tokenizer, ids, new))
  assert all(found)
  assert ''.join(found) == tokenizer.decode([*ids, *new])


@given(st.text(min_size=1, max_size=20))
def test_a_character_appears_once_it_is_whole(run, text):
  tokenizer = run.dataset.tokenizer
  ids = tokenizer.encode(text, add_special_tokens=False).ids
  given, shown = [], ''

  def feed():
    for token in ids:
      # All that could be decoded is on the screen before the next token is.
      whole = tokenizer.decode(given)
      assert shown == whole.rstrip('\ufffd') or '\ufffd' in text
      given.append(token)
      yield token

  for piece in generate.pieces(tokenizer, [], feed()):
    shown += piece
  assert shown == text


def command(script, *arguments, **options):
  return subprocess.Popen(
    [sys.executable, ROOT / 'scripts' / f'{script}.py', *arguments],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    env=os.environ | {'PYTHONPATH': str(ROOT)},
    **options,
  )


def test_a_reader_that_has_enough_is_no_error(saved):
  process = command(
    'generate', '--workdir', saved.workdir, '--prompt', 'the', '--tokens', '400'
  )
  assert process.stdout.read(3) == b'the'
  process.stdout.close()
  assert process.stderr.read() == b''
  assert process.wait(60) == 0
  process.stderr.close()


@pytest.mark.parametrize('script', [generate, evaluate])
def test_help_has_examples(script, capsys):
  with pytest.raises(SystemExit) as end:
    script.main(['--help'])
  assert end.value.code == 0
  name = script.__name__.rpartition('.')[-1]
  assert f'python scripts/{name}.py --workdir' in capsys.readouterr().out


# ------------------------------------------------------------------- evaluate


@pytest.mark.parametrize('batches', [None, 2])
def test_evaluate_prints_what_the_library_finds(saved, run, capsys, batches):
  arguments = ['--json'] + ([] if batches is None else ['--batches', '2'])
  assert call(evaluate.main, saved.workdir, *arguments) == 0
  found = json.loads(capsys.readouterr().out)
  config = run.config.copy_and_resolve_references()
  config.eval.batches = batches or 0
  expected = evaluate_lib.evaluate(
    evaluate_lib.make_eval_step(config, run.model, run.mesh),
    run.params,
    config,
    run.dataset,
    run.mesh,
  )
  valid = run.dataset.manifest['splits']['valid']
  assert found == {
    'workdir': str(saved.workdir),
    'step': 10,
    'dataset': str(run.dataset.path),
    **expected,
    'baseline/gzip_bits_per_byte': valid['gzip_bits_per_byte'],
    'baseline/unigram_bits_per_byte': valid['unigram_bits_per_byte'],
  }


def test_evaluate_shows_a_table(saved, run, capsys, monkeypatch):
  monkeypatch.setenv('COLUMNS', '120')
  assert call(evaluate.main, saved.workdir, '--json') == 0
  found = json.loads(capsys.readouterr().out)
  assert call(evaluate.main, saved.workdir) == 0
  table = capsys.readouterr().out
  for key in (
    'eval/loss',
    'eval/bits_per_byte',
    'baseline/gzip_bits_per_byte',
    'baseline/unigram_bits_per_byte',
  ):
    assert f'{found[key]:.4f}' in table
  assert f'{found["eval/perplexity"]:.2f}' in table
  assert 'step 10' in table


def other_text(folder, options, name):
  source = folder / f'{name}.jsonl'
  texts = [f'{i} the ship under grey skies {i * i}' for i in range(40)]
  source.write_text(''.join(json.dumps({'text': t}) + '\n' for t in texts))
  return prepare.prepare([str(source)], folder / name, options)


def test_another_data_set_must_have_the_same_tokenizer(
  saved, run, dataset, tmp_path, capsys
):
  options = tiny.options(
    vocab_size=None,
    tokenizer=str(dataset / dataset_lib.TOKENIZER),
    tokenizer_bytes=1,
    valid_fraction=0.3,
    shard_tokens=10_000,
  )
  other = other_text(tmp_path, options, 'same')
  capsys.readouterr()
  arguments = ['--dataset', str(other), '--json']
  assert call(evaluate.main, saved.workdir, *arguments) == 0
  found = json.loads(capsys.readouterr().out)
  valid = dataset_lib.open_dataset(other).manifest['splits']['valid']
  assert found['dataset'] == str(other)
  assert found['baseline/gzip_bits_per_byte'] == valid['gzip_bits_per_byte']

  # The validation texts of a run that has another tokenizer.
  (tmp_path / 'more').mkdir()
  different = tiny.dataset(tmp_path / 'more', seed=5)
  capsys.readouterr()
  code = call(evaluate.main, saved.workdir, '--dataset', str(different))
  line = refused(capsys, code)
  assert 'another tokenizer' in line and '--tokenizer' in line


@pytest.mark.parametrize(
  ('arguments', 'expected'),
  [
    (['--batches', '-1'], 'batches -1'),
    (['--dataset', 'no/where'], "No finished data set in 'no/where'"),
  ],
)
def test_evaluate_tells_what_is_wrong_in_a_line(
  saved, capsys, arguments, expected
):
  code = call(evaluate.main, saved.workdir, *arguments)
  assert expected in refused(capsys, code)
