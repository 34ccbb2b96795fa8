"""The loss on windows of a text, against one window at a time in float64."""

import json
import lzma
import math

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from configs import common
from qat import evaluate
from qat import windows
from qat.data import tokenizer as tokenizer_lib
from qat.infer import load
from qat.nn import transformer
from qat.quant import composed
from qat.quant import weights
from tests import tiny

V = 64
TEXT_IDS = np.random.default_rng(0).integers(0, V, 83).astype(np.int32)
TOKEN_BYTES = np.random.default_rng(1).integers(0, 9, V).astype(np.int32)


@pytest.fixture(autouse=True, scope='module')
def quickly():
  with tiny.compiled_quickly():
    yield


@pytest.fixture(scope='module')
def made():
  """Mesh, model, parameters, eval step."""
  config = tiny.config('fp', tiny.EXACT)
  mesh = tiny.mesh(config)
  model = transformer.build(config, 'cpu', 1)
  params = tiny.params(model)
  return mesh, model, params, evaluate.make_eval_step(config, model, mesh)


@pytest.fixture(scope='module')
def tokenizer():
  return tokenizer_lib.train(['the sea and the ship ' * 9, 'a ship'], 262)


def measure(made, **changes):
  mesh, _, params, eval_step = made
  options = dict(window=16, windows=0, rows=2, label='text')
  changed = {**options, **changes}
  params = changed.pop('params', params)
  ids = changed.pop('ids', TEXT_IDS)
  return windows.measure(eval_step, params, ids, TOKEN_BYTES, mesh, **changed)


@pytest.mark.parametrize(('limit', 'count'), [(0, 5), (3, 3), (99, 5)])
def test_a_window_sees_itself_alone(made, limit, count):
  _, model, params, _ = made
  logits = jax.jit(
    lambda tokens: model.apply({'params': params}, tokens, method='logits')[0]
  )
  nats, size = [], 0
  for w in range(count):
    ids = TEXT_IDS[16 * w : 16 * w + 16]
    logits_TV = np.asarray(logits(ids[None])[0], np.float64)
    log_p_TV = logits_TV - np.log(np.exp(logits_TV).sum(-1, keepdims=True))
    for t in range(15):
      nats.append(-log_p_TV[t, ids[t + 1]])
      size += TOKEN_BYTES[ids[t + 1]]
  found = measure(made, windows=limit)
  assert found.pop('windows') == count
  assert found.pop('tokens') == len(nats) == 15 * count
  assert found.pop('bytes') == size
  np.testing.assert_allclose(found.pop('loss'), np.mean(nats), rtol=1e-5)
  np.testing.assert_allclose(
    found.pop('perplexity'), math.exp(np.mean(nats)), rtol=1e-4
  )
  bits = sum(nats) / math.log(2) / size
  np.testing.assert_allclose(found.pop('bits_per_byte'), bits, rtol=1e-5)
  assert not found


def test_rows_of_a_batch_change_nothing(made):
  found = [measure(made, rows=rows) for rows in (2, 4)]
  for other in found[1:]:
    assert other.keys() == found[0].keys()
    for key, value in other.items():
      np.testing.assert_allclose(value, found[0][key], rtol=1e-6)


def test_the_progress_tells_the_time_left(made, capsys, monkeypatch):
  monkeypatch.setattr(windows.progress, 'LINE_EVERY_S', 0.0)
  measure(made, label='some text')
  lines = capsys.readouterr().err.splitlines()
  assert lines[0].startswith('some text:  40%, 2 of 5 windows, ')
  assert lines[0].endswith(' left')
  assert '5 of 5 windows, 0s left' in lines[2]


@pytest.mark.parametrize(
  ('changes', 'expected'),
  [
    ({'window': 84}, '83 tokens, less than a window of 84'),
    ({'window': 1}, 'window=1'),
    ({'windows': -1}, 'windows=-1'),
    ({'ids': TEXT_IDS + 1}, f'has token {V}, but the vocabulary has {V}'),
  ],
)
def test_what_cannot_be_measured_is_an_error(made, changes, expected):
  with pytest.raises(ValueError, match=expected):
    measure(made, **changes)


def test_a_text_is_tokenized_at_once(tokenizer):
  ids = windows.encode(tokenizer, 'the sea\n\na ship', [])
  assert ids.dtype == np.int32
  assert tokenizer.decode(ids) == 'the sea\n\na ship'
  np.testing.assert_array_equal(
    windows.encode(tokenizer, 'the sea\n\na ship', [0, 7]), [0, 7, *ids]
  )


def test_documents_are_joined_by_an_empty_line(tmp_path):
  (tmp_path / 'a.txt').write_text('one\ntwo\n')
  assert windows.read(str(tmp_path / 'a.txt')) == 'one\ntwo\n'
  rows = ''.join(json.dumps({'body': t}) + '\n' for t in ('one', 'two'))
  (tmp_path / 'b.jsonl.xz').write_bytes(lzma.compress(rows.encode()))
  name = str(tmp_path / 'b.jsonl.xz')
  assert windows.read(name, field='body') == 'one\n\ntwo'
  with pytest.raises(ValueError, match="no field 'text'"):
    windows.read(name)
  (tmp_path / 'c.txt').write_text('')
  with pytest.raises(ValueError, match='is empty'):
    windows.read(str(tmp_path / 'c.txt'))
  with pytest.raises(FileNotFoundError, match='d.txt'):
    windows.read(str(tmp_path / 'd.txt'))


def test_quantized_parameters_are_measured_as_what_they_stand_for(made):
  _, model, params, _ = made
  params = jax.tree.map(lambda leaf: leaf, params)
  attn = params['block_0']['attn']
  exact = measure(made)['loss']
  attn['q']['kernel'] = weights.asymmetric(
    attn['q']['kernel'], 'group', 16, bits=2
  )
  attn['v']['kernel'] = composed.Sum(
    tuple(
      weights.symmetric(attn['v']['kernel'] * share, 'channel', bits=4)
      for share in (0.3, 0.7)
    )
  )
  plain = windows.materialize(model, params)
  assert not any(
    composed.is_quantized(leaf)
    for leaf in jax.tree.leaves(plain, is_leaf=composed.is_quantized)
  )
  for name in ('q', 'v'):
    np.testing.assert_allclose(
      plain['block_0']['attn'][name]['kernel'],
      attn[name]['kernel'].dequantize(),
      rtol=1e-6,
    )
  assert plain['block_0']['attn']['o']['kernel'] is attn['o']['kernel']
  found = measure(made, params=plain)['loss']
  np.testing.assert_allclose(
    found, measure(made, params=params)['loss'], rtol=1e-5
  )
  assert abs(found - exact) > 1e-4


def test_nothing_is_quantized_twice():
  for dot_dtype in ('float32', 'bfloat16'):
    config = tiny.config('fp', {'model.dot_dtype': dot_dtype}).unlock()
    config.quant.specs.binary = common.spec('binary', 'int8')
    config.quant.rules = (('.*/up', 'full'), ('.*', 'binary'))
    model = transformer.build(config, 'cpu', 1)
    leaf = weights.ternary(jnp.ones((4, 3)))
    block = {'up': {'kernel': leaf}, 'down': {'kernel': leaf}}
    ffn = windows.materialize(model, {'ffn': block})['ffn']
    assert ffn['up']['kernel'].dtype == dot_dtype
    np.testing.assert_array_equal(ffn['up']['kernel'], 1)
    assert ffn['down']['kernel'] is leaf, 'Its rule would quantize it again.'


@pytest.mark.parametrize('change', ['none', 'bits', 'rules'])
def test_layers_that_are_alike_are_compiled_once(change):
  config = tiny.config('fp', {**tiny.EXACT, 'model.n_layers': 2}).unlock()
  if change == 'bits':  # Of a layer that its rule would quantize anew.
    config.quant.specs.binary = common.spec('binary', 'int8')
    config.quant.rules = (('.*/attn/q', 'binary'), ('.*', 'full'))
  if change == 'rules':
    config.quant.specs.inputs = common.spec('none', 'int4')
    config.quant.rules = (('block_1/.*', 'inputs'), ('.*', 'full'))
  config.lock()
  mesh = tiny.mesh(config)
  model = transformer.build(config, 'cpu', 1)
  params = tiny.params(model)
  for i in range(2):
    q = params[f'block_{i}']['attn']['q']
    q['kernel'] = weights.symmetric(q['kernel'], 'channel', bits=4 + i)
  given = load.Loaded(config, mesh, model, params, None, 0, 0, None, {})

  settled = windows.settled(given)
  alike = change == 'none'
  assert ('blocks' in settled.params) == alike
  for part in (settled.config.model, settled.model.config):
    assert part.scan_layers == alike
  assert not given.config.model.scan_layers
  assert composed.is_quantized(params['block_1']['attn']['q']['kernel'])
  losses = [
    measure(
      (
        mesh,
        m.model,
        m.params,
        evaluate.make_eval_step(m.config, m.model, mesh),
      )
    )['loss']
    for m in (given, settled)
  ]
  np.testing.assert_allclose(*losses, rtol=1e-5)


def test_a_quantized_run_begins_a_text_as_the_run_does(tokenizer):
  def begins(source, begin='end'):
    config = tiny.config('fp', {'data.begin': begin})
    loaded = load.Loaded(
      config, None, None, None, tokenizer, 7, 8, None, source=source
    )
    return windows.start(loaded)

  run = {'format': 'run'}
  assert begins(run) == [7]
  assert begins(run, 'tokenizer') == []
  assert begins({'format': 'quantized', 'model': run}) == [7]
  assert begins({'format': 'gguf'}) == []
  assert begins({'format': 'quantized', 'model': {'format': 'gguf'}}) == []
