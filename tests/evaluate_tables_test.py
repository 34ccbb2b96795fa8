"""The tables show the numbers."""

from qat import evaluate_tables

DATASET = {
  'model': 'models/m',
  'dataset': 'data/d',
  'eval/loss': 1.23456,
  'eval/perplexity': 3.4368,
  'eval/bits_per_byte': 0.98765,
  'baseline/unigram_bits_per_byte': 4.5,
  'baseline/gzip_bits_per_byte': 2.5,
}
TEXT = {
  'text': 'a.txt',
  'windows': 7,
  'window': 16,
  'perplexity': 12.3456,
  'bits_per_byte': 1.23456,
}
CHOOSE = {
  'task': 'boolq',
  'variant': 'rc_0shot',
  'part': 'test',
  'documents': 1000,
  'acc': 0.6543,
  'acc_stderr': 0.0154,
  'acc_norm': 0.5,
  'acc_norm_stderr': 0.0158,
  'loss': 0.69314,
  'cut_contexts': 3,
}
FIND = {
  'task': 'lambada',
  'variant': 'bpb_0shot',
  'documents': 20,
  'acc': 0.25,
  'acc_stderr': 0.1,
  'perplexity': 42.094,
  'loss': 2.5,
  'cut_contexts': 0,
}


def test_tables_show_the_numbers(capsys, monkeypatch):
  monkeypatch.setenv('COLUMNS', '200')
  evaluate_tables.show({**DATASET, 'texts': [TEXT], 'tasks': [CHOOSE, FIND]})
  shown = capsys.readouterr().out
  for part in (
    'models/m, on data/d',
    *('1.2346', '3.44', '0.9877', '4.5000', '2.5000'),
    *('a.txt', '7 of 16', '12.346'),
    'boolq, rc_0shot, test │      1000 │ 0.654 ± 0.015 │ 0.500 ± 0.016',
    *('0.693', '42.09', '2.500'),
  ):
    assert part in shown, part


def test_only_what_was_measured_has_a_table(capsys):
  evaluate_tables.show({'workdir': 'runs/r', 'step': 10, 'texts': [TEXT]})
  shown = capsys.readouterr().out
  assert 'runs/r, step 10' in shown and 'unigram' not in shown
  assert 'documents' not in shown
  assert evaluate_tables.share(FIND, 'acc') == '0.250 ± 0.100'
  assert evaluate_tables.share(FIND, 'acc_norm') == ''


def test_brackets_in_names_are_no_markup(capsys):
  text = {**TEXT, 'text': 'a[/wiki].txt'}
  evaluate_tables.show({'workdir': 'runs/[lr=1]', 'step': 1, 'texts': [text]})
  shown = capsys.readouterr().out
  assert 'runs/[lr=1]' in shown and 'a[/wiki].txt' in shown
