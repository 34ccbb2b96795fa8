"""scripts/evaluate.py on texts and tasks, with runs and with model folders."""

import json

import pytest

from qat import config as config_lib
from qat import evaluate as evaluate_lib
from qat import scores
from qat import task_run
from qat import tasks
from qat import windows
from qat.infer import load
from qat.interop import folder as folder_lib
from qat.quant import composed
from qat.quant import weights
from scripts import evaluate
from tests import made_up_tasks
from tests import tiny

TEXT = 'the sea was calm and a ship said under grey skies ' * 12
CHOICES = [(' a ship', ' the sea', ' skies'), (' calm', ' grey')]


@pytest.fixture(autouse=True, scope='module')
def quickly():
  with tiny.compiled_quickly():
    yield


@pytest.fixture(scope='module')
def loaded(saved):
  return load.load_model(saved.workdir, None)


def save(folder, loaded, params, source):
  folder_lib.save(
    folder,
    loaded.config,
    folder_lib.flat(params).items(),
    loaded.tokenizer,
    begin=loaded.begin,
    end=loaded.end,
    source=source,
  )
  return folder


@pytest.fixture(scope='module')
def model(loaded, tmp_path_factory):
  """The run's model as a folder of its own."""
  folder = tmp_path_factory.mktemp('models') / 'model'
  return save(folder, loaded, loaded.params, loaded.source)


@pytest.fixture(scope='module')
def text(tmp_path_factory):
  path = tmp_path_factory.mktemp('texts') / 'sea.txt'
  path.write_text(TEXT)
  return str(path)


@pytest.fixture(scope='module')
def task(tmp_path_factory):
  """Questions, and words to find, each in a folder."""
  folder = tmp_path_factory.mktemp('tasks')
  rows = {
    'choose': [
      (d, i, d % 2, continuation)
      for d, choices in enumerate(CHOICES)
      for i, continuation in enumerate(choices)
    ],
    'find': [(d, 0, ['x'], c) for d, (c, *_) in enumerate(CHOICES)],
  }
  for name, lines in rows.items():
    (folder / name).mkdir()
    (folder / name / 'requests.jsonl').write_text(
      ''.join(
        json.dumps(
          {
            'doc_id': document,
            'idx': idx,
            'label': label,
            'task_name': f'{name} words',
            'request': {'context': TEXT[:70], 'continuation': continuation},
          }
        )
        + '\n'
        for document, idx, label, continuation in lines
      )
    )
  return folder


def found(capsys, *arguments):
  capsys.readouterr()
  assert evaluate.main([*map(str, arguments), '--json']) == 0
  return json.loads(capsys.readouterr().out)


SHORT = ('--window', 16, '--batch-tokens', 64)


def test_a_text_is_measured_in_windows(saved, loaded, model, text, capsys):
  ids = windows.encode(loaded.tokenizer, TEXT, [loaded.begin])
  expected = windows.measure(
    evaluate_lib.make_eval_step(loaded.config, loaded.model, loaded.mesh),
    loaded.params,
    ids,
    loaded.dataset.token_bytes,
    loaded.mesh,
    window=16,
    windows=3,
    rows=4,
    label='text',
  )
  arguments = ['--text', text, *SHORT, '--windows', 3]
  run = found(capsys, '--workdir', saved.workdir, *arguments)
  assert run == {
    'workdir': str(saved.workdir),
    'step': 10,
    'texts': [{'text': text, 'window': 16, **expected}],
  }
  folder = found(capsys, '--model', model, *arguments)
  assert folder == {'model': str(model), 'texts': run['texts']}


def test_tasks_are_scored(loaded, model, task, capsys):
  expected = []
  step = scores.make_step(loaded.config, loaded.model)
  for name in ('choose', 'find'):
    one = tasks.read(task / name)
    encoded = scores.encode(
      loaded.tokenizer, one.requests, start=[loaded.begin], longest=30
    )
    assert any(request.cut for request in encoded)
    measured = task_run.measure(
      step,
      loaded.params,
      loaded.mesh,
      task_run.Part(one, encoded),
      batch_tokens=64,
      longest=30,
      label=name,
    )
    expected.append(
      {
        'task': f'{name} words',
        'variant': name,
        'path': str(task / name),
        **measured,
        'cut_contexts': len(encoded),
      }
    )
  both = ['--tasks', task / 'choose', task / 'find', '--batch-tokens', 64]
  arguments = ['--model', model, *both, '--max-length', 30]
  assert found(capsys, *arguments)['tasks'] == expected


def test_the_documents_of_a_run_are_those_of_any_model(
  saved, model, copied, tmp_path, capsys
):
  """A run's task, its part and its length, for another model."""
  folder = made_up_tasks.write(tmp_path / 'words', 40)
  fields = dict(task=str(folder), task_train=20, task_dev=4, task_test=6)
  config = copied.config.copy_and_resolve_references()
  config.data.update(fields, seq_len=10)
  (copied.workdir / 'config.json').write_text(config_lib.to_json(config))
  arguments = ['--model', model, '--batch-tokens', 64]
  of_run = found(capsys, *arguments, '--task-run', copied.workdir)['tasks']
  dev = ['--task-part', 'dev', '--tasks', folder, '--limit', 3]
  both = found(capsys, *arguments, '--task-run', copied.workdir, *dev)['tasks']
  assert [(t['documents'], t.get('part')) for t in (*of_run, *both)] == [
    (6, 'test'),
    (3, None),
    (4, 'dev'),
  ]
  assert of_run[0]['cut_contexts'] == 18 and both[0]['cut_contexts'] == 0
  own = found(capsys, *arguments, '--tasks', folder)['tasks'][0]
  assert own['loss'] != of_run[0]['loss']
  none = ['--model', str(model), '--task-run', str(saved.workdir)]
  assert evaluate.main(none) == 2
  assert 'not on a task' in capsys.readouterr().err


def test_a_quantized_model_is_measured_packed_or_not(
  loaded, text, tmp_path, capsys
):
  params = {**loaded.params, 'block_0': dict(loaded.params['block_0'])}
  ffn = params['block_0']['ffn'] = dict(params['block_0']['ffn'])
  kernel = ffn['up']['kernel']
  ffn['up'] = {**ffn['up'], 'kernel': weights.symmetric(kernel, bits=2)}
  folder = save(tmp_path / 'packed', loaded, params, loaded.source)
  assert composed.is_quantized(
    load.load_model(folder, None).params['block_0']['ffn']['up']['kernel']
  )
  arguments = ['--model', folder, '--text', text, *SHORT, '--windows', 2]
  plain = found(capsys, *arguments)['texts'][0]
  packed = found(capsys, *arguments, '--packed')['texts'][0]
  assert plain['loss'] == pytest.approx(packed['loss'], rel=1e-5)


def test_a_model_of_others_has_their_beginning(loaded, tmp_path):
  folder = save(tmp_path / 'm', loaded, loaded.params, {'format': 'gguf'})
  assert windows.start(load.load_model(folder, None)) == []
  assert windows.start(loaded) == [loaded.begin]


@pytest.mark.parametrize(
  ('arguments', 'expected'),
  [
    (['--text', 'no/where.txt'], 'no/where.txt'),
    (['--tasks', 'no/where'], "No file or folder 'no/where' with a task"),
    (['--batch-tokens', '0'], '--batch-tokens 0'),
    (['--window', '0'], '--window 0'),
    (['--tasks', 'no/where', '--limit', '-1'], 'No file'),
  ],
)
def test_wrong_files_are_told_before_the_model_is_loaded(
  saved, arguments, expected, capsys, monkeypatch
):
  monkeypatch.setattr(load, 'load_model', None)
  assert evaluate.main(['--model', str(saved.workdir), *arguments]) == 2
  assert expected in capsys.readouterr().err


def test_a_model_without_data_needs_something_to_be_evaluated_on(
  model, dataset, capsys
):
  assert evaluate.main(['--model', str(model)]) == 2
  assert '--text, --tasks or --dataset' in capsys.readouterr().err
  on_data = found(
    capsys, '--model', model, '--dataset', dataset, '--batches', 1
  )
  assert on_data['dataset'] == str(dataset)
  assert on_data['eval/bits_per_byte'] > 0
