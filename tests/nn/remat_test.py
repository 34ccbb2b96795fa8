"""What blocks keep for the backward pass, and that it changes nothing else."""

import functools

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from qat.nn import remat
from qat.nn import transformer
from qat.quant import rules as rules_lib
from tests import jaxprs
from tests import tiny

LAYERS = 2
POLICIES = ('none', *remat.POLICIES)
TOKENS_BT = np.arange(32).reshape(2, 16)


@pytest.fixture(autouse=True, scope='module')
def quickly():
  with tiny.compiled_quickly():
    yield


def build(method, policy, **fields):
  fields = {
    **tiny.EXACT,
    'model.n_layers': LAYERS,
    'model.attention': 'xla',
    'model.remat': policy,
    **fields,
  }
  return transformer.build(tiny.config(method, fields), 'cpu', 1)


def output(model, params, mix=None):
  return model.apply({'params': params}, TOKENS_BT, mix=mix)[0]


def kept(model, mix=None):
  """Shapes and dtypes of all that the backward pass is handed."""
  params = transformer.abstract_params(model)
  back = jax.eval_shape(
    lambda p: jax.vjp(lambda p: output(model, p, mix), p)[1], params
  )
  return jax.tree.leaves(back)


def size(leaves):
  return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


@pytest.mark.parametrize(
  ('method', 'scan'),
  [
    ('fp', False),
    pytest.param('bitnet', True, marks=pytest.mark.slow),
    pytest.param('pquant4', True, marks=pytest.mark.slow),
  ],
)
def test_no_policy_changes_values(method, scan):
  @functools.partial(jax.jit, static_argnums=0)
  def gradient(model, params):
    return jax.value_and_grad(lambda p: jnp.sum(jnp.sin(output(model, p))))(
      params
    )

  found = {}
  for policy in POLICIES:
    fields = {'model.scan_layers': scan, 'model.n_layers': 1 + scan}
    model = build(method, policy, **fields)
    shapes = transformer.abstract_params(model)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
      lambda p, rng=rng: jnp.float32(rng.normal(size=p.shape) * 0.2), shapes
    )
    found[policy] = gradient(model, params)
  for policy in remat.POLICIES:
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(
        a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max()
      ),
      found[policy],
      found['none'],
    )


@pytest.mark.parametrize('scan', [False, True])
@pytest.mark.parametrize(
  'method',
  ['fp', 'bitnet', pytest.param('pquant', marks=pytest.mark.slow), 'pquant4'],
)
def test_each_policy_keeps_less_than_the_one_before(method, scan):
  sizes = {
    policy: size(kept(build(method, policy, **{'model.scan_layers': scan})))
    for policy in POLICIES
  }
  assert sizes['block'] < sizes['dots'] < sizes['none']


def test_int8_products_are_done_again_and_float_products_are_not():
  least = size(kept(build('fp', 'block')))
  sizes = {
    method: size(kept(build(method, 'dots'))) - least
    for method in ('fp', 'bitnet')
  }
  # Beside the blocks' input: attention's output, and of floats q, k, v, o and
  # gate and up; of float32, for B * T tokens.
  tokens, d, f = TOKENS_BT.size, 32, 48
  assert sizes['bitnet'] == pytest.approx(LAYERS * 4 * tokens * d, rel=0.1)
  expected = LAYERS * 4 * tokens * (5 * d + 2 * f)
  assert sizes['fp'] == pytest.approx(expected, rel=0.1)


def test_annealed_products_are_of_floats():
  mix = jnp.float32(0.5)
  model = build('bitnet', 'dots')
  assert size(kept(model, mix)) > 1.5 * size(kept(model))


def products(method, policy):
  """How many products a training step has, those of attention too."""
  model = build(method, policy, **{'model.n_layers': 1})
  params = transformer.abstract_params(model)
  return jaxprs.count(
    'dot_general',
    jax.grad(lambda p: jnp.sum(output(model, p))),
    params,
  )


def test_what_is_kept_is_not_multiplied_again():
  assert products('fp', 'none') < products('fp', 'block')
  # Scores alone: attention does them again from q and k.
  assert products('fp', 'dots') <= products('fp', 'none') + 1
  assert products('bitnet', 'dots') < products('bitnet', 'block')


def test_the_name_of_a_product():
  y = jnp.ones(3)
  spec = rules_lib.make_rules(
    (('.*', 'binary'),), tiny.config('bitnet').quant.specs
  ).find('a')

  def names(spec, mix=None):
    return jaxprs.count('name', lambda y: remat.product(y, spec, mix), y)

  full = rules_lib.make_rules(
    (('.*', 'full'),), tiny.config('fp').quant.specs
  ).find('a')
  assert names(full) == 1 and names(spec) == 0
  assert names(spec, mix=jnp.float32(1)) == 1
