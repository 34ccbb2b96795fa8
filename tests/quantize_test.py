"""scripts/quantize.py: what it writes, refuses, and goes on with."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from qat import evaluate
from qat.data import dataset as dataset_lib
from qat.infer import load
from qat.interop import folder
from qat.ptq import apply
from qat.quant import composed
from qat.quant import rules as rules_lib
from scripts import quantize
from tests import clean
from tests import tiny

# ml_collections loads a config file in a way that Python 3.12 has given up.
pytestmark = pytest.mark.filterwarnings('ignore:the load_module')

ROOT = pathlib.Path(quantize.__file__).parents[1]
SMALL = (
  '--config.calibration.length=16',
  '--config.calibration.sequences=6',
  '--config.eval.length=16',
  '--config.eval.batches=2',
)


@pytest.fixture(scope='module', autouse=True)
def quickly():
  with tiny.compiled_quickly():
    yield


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  return tiny.dataset(tmp_path_factory.mktemp('data'))


@pytest.fixture(scope='module')
def model(tmp_path_factory, data):
  """A model folder with the tokenizer of the data."""
  config = clean.config(model__vocab_size=288, model__n_layers=1)
  path = tmp_path_factory.mktemp('models') / 'fp'
  folder.save(
    path,
    config,
    folder.flat(clean.params(config)).items(),
    dataset_lib.open_dataset(data).tokenizer,
    begin=0,
    end=0,
    source={'format': 'test'},
  )
  return path


def call(model, out, stem, *more):
  config = f'--config={ROOT}/configs/ptq/{stem}.py'
  names = ('--model', str(model), '--out', str(out))
  return quantize.main([config, *names, *SMALL, *more])


def refused(capsys, code):
  printed = capsys.readouterr()
  assert code == 2 and not printed.out and 'Traceback' not in printed.err
  (line,) = [x for x in printed.err.splitlines() if x.startswith('Error: ')]
  return printed.err[printed.err.index(line) :]


@pytest.fixture(scope='module')
def quantized(model, data, tmp_path_factory):
  """A model by GPTQ, inputs of 8 bits."""
  out = tmp_path_factory.mktemp('out') / 'gptq'
  more = ('--dataset', str(data), '--config.activation=int8')
  assert call(model, out, 'gptq', '--config.true_sequential=False', *more) == 0
  return out


def test_the_result_is_a_model_folder_with_a_report(model, quantized):
  assert {p.name for p in quantized.iterdir()} == {
    'manifest.json',
    'config.json',
    'tokenizer.json',
    'params-00001.safetensors',
    'report.json',
    'report.html',
  }
  assert [p.name for p in quantized.parent.iterdir()] == ['gptq']
  opened = folder.open_folder(quantized)
  assert opened.source['algorithm'] == 'gptq'
  assert opened.source['settings']['method']['bits'] == 4
  assert opened.source['model'] == {'format': 'test'}
  # It says how its inputs are quantized.
  assert opened.config.quant.specs.inputs_int8.activation == 'int8'
  loaded = load.load_model(quantized, None)
  kernel = loaded.params['block_0']['attn']['q']['kernel']
  assert composed.is_quantized(kernel)
  before = load.load_model(model, None).params
  np.testing.assert_array_equal(
    loaded.params['embed']['embedding'], before['embed']['embedding']
  )


def test_the_report_says_what_the_saved_model_measures(quantized, data):
  made = json.loads((quantized / 'report.json').read_text())
  before, after = (made['evaluation'][k] for k in ('before', 'after'))
  assert after['eval/loss'] != before['eval/loss']
  assert made['totals']['bits_per_weight'] == pytest.approx(4.6, abs=0.1)
  size = sum(
    (quantized / name).stat().st_size
    for name in folder.open_folder(quantized).digests
  )
  assert made['totals']['model_bytes'] > size
  loaded = load.load_model(quantized, None)
  config = loaded.config.copy_and_resolve_references().unlock()
  config.data.seq_len, config.eval.batch_size, config.eval.batches = 16, 4, 2
  found = evaluate.evaluate(
    evaluate.make_eval_step(config, loaded.model, loaded.mesh),
    loaded.params,
    config,
    dataset_lib.open_dataset(data),
    loaded.mesh,
  )
  assert found['eval/loss'] == pytest.approx(after['eval/loss'], rel=1e-5)
  assert 'gptq' in (quantized / 'report.html').read_text()


def test_a_method_without_data_needs_none(model, tmp_path, capsys):
  assert call(model, tmp_path / 'out', 'splitquant', '--no-eval') == 0
  printed = capsys.readouterr()
  assert 'bits per weight' in printed.out and 'perplexity' not in printed.out
  assert 'report.html' in printed.err
  made = json.loads((tmp_path / 'out' / 'report.json').read_text())
  assert made['calibration'] is None and not made['evaluation']


@pytest.mark.slow
def test_a_latent_model_is_the_same_one(model, data, tmp_path):
  more = [
    *('--dataset', str(data), '--no-eval', '--config.method.epochs=1'),
    *('--config.method.let=True', '--config.activation=int4_asym'),
  ]
  latent, final = tmp_path / 'latent', tmp_path / 'final'
  assert call(model, latent, 'omniquant', *more, '--config.latent=True') == 0
  assert call(model, final, 'omniquant', *more) == 0
  loaded, same = (load.load_model(out, None) for out in (latent, final))
  grids = jax.jit(rules_lib.quantize_kernels, static_argnums=1)(
    loaded.params, loaded.model.rules
  )
  kernels = rules_lib.kernels(same.params)
  for path, found in grids.items():
    jax.tree.map(np.testing.assert_array_equal, found, kernels[path])
  tokens = clean.examples().tokens_ST
  np.testing.assert_allclose(
    clean.logits(loaded.config, loaded.params, tokens),
    clean.logits(same.config, same.params, tokens),
    rtol=1e-4,
    atol=1e-5,
  )
  # The report tells what the grids would take in a file.
  bits = [
    json.loads((out / 'report.json').read_text())['totals']['bits_per_weight']
    for out in (latent, final)
  ]
  assert bits[0] == bits[1] < 5


def test_prompts_can_be_calibrated_on(model, tmp_path):
  file = tmp_path / 'task.jsonl'
  file.write_text(json.dumps({'text': 'the sea was calm and a ship'}) + '\n')
  file.write_text(file.read_text() * 30)
  code = call(
    model,
    tmp_path / 'out',
    'rtn',
    '--no-eval',
    '--config.output_errors=True',
    '--config.layers=block_0/attn/q',
    f'--config.calibration.prompts={file}',
  )
  assert code == 0
  made = json.loads((tmp_path / 'out' / 'report.json').read_text())
  assert 'texts of' in made['calibration']
  assert made['layers'][0]['output_error'] > 0


def test_a_stopped_command_goes_on_to_the_same_model(
  model, tmp_path, monkeypatch, capsys
):
  assert call(model, tmp_path / 'whole', 'rtn', '--no-eval') == 0
  real = apply.quantize

  def stopped(*args):
    def show(done, total, words):
      if done == 3:
        raise KeyboardInterrupt

    return real(*args[:-1], show)

  out = tmp_path / 'out'
  monkeypatch.setattr(apply, 'quantize', stopped)
  assert call(model, out, 'rtn', '--no-eval') == 130
  assert 'goes on' in capsys.readouterr().err
  monkeypatch.setattr(apply, 'quantize', real)
  assert not out.exists() and (tmp_path / 'out.parts').is_dir()
  # Other settings do not mix with these parts.
  error = refused(
    capsys, call(model, out, 'rtn', '--no-eval', '--config.method.bits=3')
  )
  assert 'another quantization' in error and 'settings' in error
  assert call(model, out, 'rtn', '--no-eval') == 0
  assert not (tmp_path / 'out.parts').exists()
  for name in ('params-00001.safetensors', 'config.json'):
    whole, here = (p / name for p in (tmp_path / 'whole', out))
    assert whole.read_bytes() == here.read_bytes()


def test_a_stop_in_the_last_evaluation_leaves_no_half_of_a_result(
  model, data, tmp_path, monkeypatch
):
  out, real = tmp_path / 'out', quantize._evaluate
  more = ('--dataset', str(data), '--config.layers=block_0/attn/q')

  def stopped(loaded, ptq, dataset, when):
    if when == 'after':
      raise KeyboardInterrupt
    return real(loaded, ptq, dataset, when)

  with monkeypatch.context() as patch:
    patch.setattr(quantize, '_evaluate', stopped)
    assert call(model, out, 'rtn', *more) == 130
  assert not out.exists()
  # What was measured before, on these data, is not measured again.
  whens = []

  def told(loaded, ptq, dataset, when):
    whens.append(when)
    return real(loaded, ptq, dataset, when)

  monkeypatch.setattr(quantize, '_evaluate', told)
  assert call(model, out, 'rtn', *more) == 0
  assert whens == ['after']
  assert [p.name for p in tmp_path.iterdir()] == ['out']
  made = json.loads((out / 'report.json').read_text())
  assert set(made['evaluation']) == {'before', 'after'}
  assert 'seconds' not in made['totals']


@pytest.mark.parametrize(
  ('stem', 'more', 'expected'),
  [
    ('rtn', ['--no-eval', '--config.method.bit=3'], 'bit'),
    ('rtn', ['--no-eval', '--config.method.bits=7'], 'bits=7'),
    ('rtn', ['--no-eval', '--surprise'], "'surprise'"),
    ('nothing', ['--no-eval'], 'nothing.py'),
    ('rtn', [], 'no data set of its own'),
    ('gptq', ['--no-eval'], 'needs text to calibrate on; give --dataset'),
    ('gptq', ['--dataset', 'nowhere'], 'No finished data set'),
  ],
)
def test_what_is_wrong_is_told_in_a_line(
  model, tmp_path, capsys, stem, more, expected
):
  code = call(model, tmp_path / 'out', stem, *more)
  assert expected in refused(capsys, code)
  assert not list(tmp_path.iterdir())


def test_too_few_tokens_are_told(model, data, tmp_path, capsys):
  more = ('--dataset', str(data), '--config.calibration.sequences=99999')
  error = refused(capsys, call(model, tmp_path / 'out', 'gptq', *more))
  assert 'config.calibration.sequences=99999' in error


def test_data_of_another_tokenizer_are_refused(
  model, data, tmp_path, capsys, monkeypatch
):
  loaded = load.load_model(model, None)
  other = dataset_lib.open_dataset(data).tokenizer
  other.add_tokens(['grey'])
  monkeypatch.setattr(
    load, 'load_model', lambda *_: loaded._replace(tokenizer=other)
  )
  code = call(model, tmp_path / 'out', 'rtn', '--dataset', str(data))
  assert 'another tokenizer' in refused(capsys, code)


def test_windows_longer_than_a_run_was_trained_on_are_refused(
  model, data, tmp_path, capsys, monkeypatch
):
  loaded = load.load_model(model, None)._replace(
    dataset=dataset_lib.open_dataset(data), source={'format': 'run'}
  )
  monkeypatch.setattr(load, 'load_model', lambda *_: loaded)
  code = call(model, tmp_path / 'out', 'gptq', '--config.calibration.length=17')
  error = refused(capsys, code)
  assert 'give --config.calibration.length=16' in error


def test_a_folder_that_is_there_is_not_written_into(model, tmp_path, capsys):
  (tmp_path / 'out').mkdir()
  (tmp_path / 'out' / 'mine').touch()
  error = refused(capsys, call(model, tmp_path / 'out', 'rtn', '--no-eval'))
  assert 'exists already' in error
  shutil.rmtree(tmp_path / 'out')


def test_help(capsys):
  with pytest.raises(SystemExit) as end:
    quantize.main(['--help'])
  assert end.value.code == 0
  text = capsys.readouterr().out
  for part in ('--config', '--model', '--out', '--dataset', 'report.html'):
    assert part in text
