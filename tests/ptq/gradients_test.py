"""Block by block gradients against those of the whole model."""

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from qat.nn import transformer
from qat.ptq import gradients
from qat.ptq import partial
from tests import clean
from tests import tiny


@pytest.fixture(scope='module', autouse=True)
def quickly():
  with tiny.compiled_quickly():
    yield


NAMES = {
  'block_0': ('attn/v', 'ffn/down'),
  'block_1': ('attn/q', 'attn/o', 'ffn/gate'),
}


@pytest.fixture(scope='module')
def config():
  return clean.config(model__dtype='bfloat16', model__dot_dtype='bfloat16')


@pytest.fixture(scope='module')
def params(config):
  return clean.params(config)


def run(config, params, store, show=lambda *words: None, examples=None):
  return gradients.absolute_gradients(
    config,
    params,
    examples or clean.examples(),
    NAMES,
    batch_size=4,
    store=store,
    show=show,
  )


@pytest.fixture(scope='module')
def found(config, params, tmp_path_factory):
  store = partial.Store(tmp_path_factory.mktemp('parts') / 'a', {})
  return run(config, params, store)


@pytest.fixture(scope='module')
def expected(config, params):
  """The definition: one example at a time, through the whole model."""
  model = gradients.clean_model(config, 'cpu')
  made = clean.examples()

  def loss(params, tokens_T, weights_T):
    logits = model.apply({'params': params}, tokens_T[None], method='logits')
    log_p = jax.nn.log_softmax(logits[0][0, :-1])
    nats = -jnp.take_along_axis(log_p, tokens_T[1:, None], 1)[:, 0]
    return jnp.sum(nats * weights_T[1:]) / jnp.sum(weights_T[1:])

  step = jax.jit(jax.value_and_grad(loss))
  sums, losses = None, []
  for tokens_T, weights_T in zip(made.tokens_ST, made.weights_ST, strict=True):
    value, grads = step(params, tokens_T, weights_T)
    grads = jax.tree.map(jnp.abs, grads)
    sums = grads if sums is None else jax.tree.map(jnp.add, sums, grads)
    losses.append(float(value))
  return sums, losses


def test_the_sum_of_absolute_gradients_of_each_example(found, expected):
  sums, losses = found
  whole, whole_losses = expected
  np.testing.assert_allclose(losses, whole_losses, rtol=1e-5)
  assert set(sums) == {f'{b}/{n}' for b, names in NAMES.items() for n in names}
  for path, sum_KN in sums.items():
    block, part, layer = path.split('/')
    mine = np.asarray(whole[block][part][layer]['kernel'])
    np.testing.assert_allclose(sum_KN, mine, rtol=2e-3, atol=1e-5)


def test_the_clean_model_is_exact_whatever_the_config_says(config):
  model = gradients.clean_model(config, 'cpu')
  assert model.config.dtype == model.config.dot_dtype == 'float32'
  assert isinstance(model, transformer.Transformer)
  assert config.model.dtype == 'bfloat16'
  assert model.config.attention == 'blocked'
  assert gradients.clean_model(config, 'gpu').config.attention == 'looped'


def test_a_stopped_run_goes_on_to_the_same_sums(
  config, params, found, tmp_path, monkeypatch
):
  monkeypatch.setattr(gradients, 'SAVE_SECONDS', 0.0)
  store = partial.Store(tmp_path / 'parts', {})
  shown = []

  def stop(*words):
    shown.append(words)
    if len(shown) == 6:
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    run(config, params, store, stop)
  shown = []
  sums, losses = run(config, params, store, lambda *words: shown.append(words))
  assert len(shown) == 5  # The first batch at once, the second in 2 x 2 steps.
  assert losses == found[1]
  for path, sum_KN in found[0].items():
    np.testing.assert_array_equal(sums[path], sum_KN)


def test_a_loss_that_is_not_finite_names_its_example(config, params, tmp_path):
  made = clean.examples()
  broken = {
    **params,
    'embed': {'embedding': jnp.array(params['embed']['embedding'])},
  }
  only = np.setdiff1d(made.tokens_ST[1], made.tokens_ST[0])[0]
  broken['embed']['embedding'] = (
    broken['embed']['embedding'].at[only].set(jnp.nan)
  )
  store = partial.Store(tmp_path / 'parts', {})
  with pytest.raises(ValueError, match='calibration example . is not finite'):
    run(config, broken, store)
  assert not store.has('gradients')
