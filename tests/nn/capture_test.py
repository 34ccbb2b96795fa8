"""What the sensitivity study gets is what the layers multiply."""

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from qat.nn import capture
from qat.nn import transformer
from qat.quant import dot
from qat.quant import rules as rules_lib
from tests import tiny

TOKENS_BT = np.array([[3, 60, 0, 17, 31, 5], [9, 8, 7, 6, 5, 4]])


def build(method, **fields):
  config = tiny.config(method, {**tiny.EXACT, **fields})
  model = transformer.build(config, 'cpu', 1)
  shapes = transformer.abstract_params(model)
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda p: jnp.float32(0.2 * rng.normal(size=p.shape) + (p.ndim < 2)), shapes
  )
  return model, params


def observe(monkeypatch, model, params):
  """Every product of a forward pass: the weight and the output, as rows."""
  original, seen = dot.quantized_dot, []

  def quantized_dot(x, weight, method):
    y = original(x, weight, method)
    seen.append((weight.value, y))
    return y

  @jax.jit
  def products(params):
    model.apply({'params': params}, TOKENS_BT)
    return seen

  with monkeypatch.context() as patch:
    patch.setattr(dot, 'quantized_dot', quantized_dot)
    return jax.tree.map(np.asarray, products(params))


def output_of(seen, record):
  """What the layer of a record gave: of a stack, the part of its expert."""
  for weight, y in seen:
    for i, w_KN in enumerate(weight if weight.ndim == 3 else [weight]):
      if np.array_equal(w_KN, record.quantized_KN):
        y = y[..., i, :] if weight.ndim == 3 else y
        return y.reshape(-1, y.shape[-1])
  raise AssertionError(f'No product with the weight of {record.path}.')


@pytest.mark.parametrize('method', ['b158', 'pquant4'])
def test_a_record_reproduces_the_output_of_its_layer(monkeypatch, method):
  # Dense experts are products of a stack, like every other here.
  model, params = build(method, **{'model.expert_form': 'dense'})
  seen = observe(monkeypatch, model, params)
  records = list(capture.linear_records(model, params, TOKENS_BT))
  for record in records:
    x_MK, w_KN = np.float64(record.x_MK), np.float64(record.quantized_KN)
    assert len(x_MK) == TOKENS_BT.size
    y_MN = output_of(seen, record)
    if '/narrow/' in record.path and method == 'pquant4':
      mine_M = np.any(x_MK != 0, axis=-1)
      x_MK, y_MN = x_MK[mine_M], y_MN[mine_M]
    np.testing.assert_allclose(x_MK @ w_KN, y_MN, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('method', ['bitnet', 'pquant4'])
def test_there_is_a_record_of_every_quantized_matrix(method):
  model, params = build(method)
  records = {
    r.path: r for r in capture.linear_records(model, params, TOKENS_BT)
  }
  expected = {}
  for path, kernel in rules_lib.kernels(params).items():
    if kernel.ndim == 2:
      expected[path] = kernel
    else:
      expected |= {f'{path}/{i}': w for i, w in enumerate(kernel)}
  assert list(records) == list(expected)
  for path, w_KN in expected.items():
    np.testing.assert_array_equal(records[path].latent_KN, w_KN)
    spec = model.rules.find(path.rstrip('0123456789').rstrip('/'))
    np.testing.assert_allclose(
      records[path].quantized_KN,
      spec.quantize({'kernel': w_KN}).dequantize(),
      rtol=1e-6,
    )


@pytest.mark.parametrize('k', [1, 2])
def test_grouped_and_dense_experts_read_the_same_rows(k):
  grams = {}
  for form in ('grouped', 'dense'):
    fields = {'model.expert_form': form, 'model.experts_per_token': k}
    model, params = build('pquant4', **fields)
    for r in capture.linear_records(model, params, TOKENS_BT):
      grams.setdefault(r.path, []).append(r.x_MK.T @ r.x_MK)
  assert sum(a.any() for path, (a, _) in grams.items() if 'down/' in path) > 1
  for a, b in grams.values():
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_each_token_is_in_the_records_of_one_expert():
  model, params = build('pquant4', **{'model.expert_form': 'dense'})
  records = {
    r.path: r for r in capture.linear_records(model, params, TOKENS_BT)
  }
  for name in ('gate', 'up', 'down'):
    mine_EM = np.stack(
      [
        np.any(records[f'block_0/ffn/narrow/{name}/{i}'].x_MK != 0, axis=-1)
        for i in range(4)
      ]
    )
    np.testing.assert_array_equal(mine_EM.sum(0), 1)
    if name == 'gate':
      first_EM = mine_EM
    np.testing.assert_array_equal(mine_EM, first_EM)
  assert (first_EM.sum(1) > 0).sum() > 1
  # Together they have every input of the wide branch, which reads the same.
  total = sum(records[f'block_0/ffn/narrow/up/{i}'].x_MK for i in range(4))
  np.testing.assert_array_equal(total, records['block_0/ffn/wide/up'].x_MK)


def test_layers_of_full_precision_have_no_record():
  model, params = build('fp')
  assert not list(capture.linear_records(model, params, TOKENS_BT))


def test_remat_does_not_hide_inputs():
  found = {}
  for remat in ('none', 'block'):
    model, params = build('pquant4', **{'model.remat': remat})
    records = capture.linear_records(model, params, TOKENS_BT)
    found[remat] = {r.path: r.x_MK for r in records}
  assert list(found['none']) == list(found['block'])
  for path, x_MK in found['none'].items():
    np.testing.assert_allclose(found['block'][path], x_MK, rtol=1e-4, atol=1e-4)
