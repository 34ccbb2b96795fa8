"""Feed-forward layers against the paper's equations in float64."""

import functools

import jax
from jax import numpy as jnp
from ml_collections import FrozenConfigDict
import numpy as np
import pytest

from qat.nn import ffn
from qat.quant import dot
from qat.quant import rules as rules_lib
from tests import tiny

METHOD = dot.Method(int8=False, dtype='float32')


def normal(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def layer(method='pquant', **fields):
  """A feed-forward layer of a small config, its parameters and an input."""
  fields = {f'model.{key}': value for key, value in fields.items()}
  config = tiny.config(method, {**tiny.EXACT, **fields})
  # A layer alone has the path 'wide/up' rather than 'block_0/ffn/wide/up'.
  pairs = [
    (pattern.removeprefix('.*/ffn/'), name)
    for pattern, name in config.quant.rules
  ]
  rules = rules_lib.make_rules(pairs, config.quant.specs)
  model = FrozenConfigDict(config.model)
  if model.ffn == 'decoupled':
    module = ffn.DecoupledFFN(model, rules, METHOD)
  else:
    module = ffn.GatedFFN(model, rules, METHOD, width=model.d_ff)
  x_BTD = normal(2, 6, model.d_model)
  shapes = jax.eval_shape(module.init, jax.random.key(0), x_BTD)['params']
  leaves, tree = jax.tree.flatten(shapes)
  params = [  # Kernels around 0; gains, alpha and beta around 1.
    jnp.asarray(0.2 * normal(*p.shape, seed=i) + (p.ndim < 2))
    for i, p in enumerate(leaves)
  ]
  return module, jax.tree.unflatten(tree, params), x_BTD


@functools.partial(jax.jit, static_argnums=0)
def run(module, params, x_BTD):
  return module.apply({'params': params}, x_BTD)


@functools.partial(jax.jit, static_argnums=0)
def sown(module, params, x_BTD):
  kinds = ['router', 'inputs']
  return module.apply({'params': params}, x_BTD, mutable=kinds)[1]


@functools.partial(jax.jit, static_argnums=0)
@functools.partial(jax.grad, argnums=1)
def gradients(module, params, x_BTD, dy_BTD):
  """Of the parameters, for a gradient of the output."""
  y_BTD = module.apply({'params': params}, x_BTD).astype(jnp.float32)
  return jnp.sum(y_BTD * dy_BTD)


# The forward pass of the paper, sections 3.1 to 3.3, in float64.


def slow_norm(x, params):
  x = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)
  return x * params['norm']['scale']


def slow_int8_input(x):
  scale = np.abs(x).max(-1, keepdims=True) / 127
  return np.round(x / scale) * scale


def slow_binary(w):
  return np.where(w - w.mean() > 0, 1, -1) * np.abs(w).mean()


def slow_int8(w):
  scale = np.abs(w).max() / 127
  return np.round(w / scale) * scale


def slow_linear(x, params, quantize):
  if 'norm' in params:
    x = slow_norm(x, params)
  return slow_int8_input(x) @ quantize(params['kernel'])


def slow_branch(x, params, quantize):
  gate = slow_linear(x, params['gate'], quantize)
  up = slow_linear(x, params['up'], quantize)
  silu = gate / (1 + np.exp(-gate))
  return slow_linear(silu * up, params['down'], quantize)


def slow_decoupled(x, params, gate_probability, norm_shared):
  params = jax.tree.map(np.float64, params)
  x = np.float64(x)
  normed = slow_norm(x, params) if 'norm' in params else x
  source = normed if norm_shared else x
  wide = slow_branch(source, params['wide'], slow_binary)
  if 'router' not in params:
    narrow = slow_branch(source, params['narrow'], slow_int8)
  else:
    narrow = np.zeros_like(wide)
    for token in np.ndindex(x.shape[:2]):
      logits = normed[token] @ params['router']
      p = np.exp(logits) / np.exp(logits).sum()
      branch = one_expert(params['narrow'], p.argmax())
      y = slow_branch(source[token], branch, slow_int8)
      narrow[token] = y * (p.max() if gate_probability else 1)
  return params['alpha'] * narrow + params['beta'] * wide


def one_expert(narrow, i):
  """The parameters of one of the stacked branches; norms are common."""
  return {
    name: {**narrow[name], 'kernel': narrow[name]['kernel'][i]}
    for name in ('gate', 'up', 'down')
  }


def router_of(params, x_BTD):
  """Probabilities `[B, T, E]` in float64."""
  params = jax.tree.map(np.float64, params)
  e = np.exp(slow_norm(np.float64(x_BTD), params) @ params['router'])
  return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize(
  ('n_experts', 'gate_probability', 'norm_shared'),
  [
    (1, True, True),
    (1, True, False),
    (4, True, True),
    (4, False, True),
    (4, True, False),
  ],
)
def test_the_decoupled_layer_is_the_paper_in_float64(
  n_experts, gate_probability, norm_shared
):
  module, params, x_BTD = layer(
    n_experts=n_experts,
    gate_probability=gate_probability,
    norm_shared=norm_shared,
  )
  # Where each linear has a norm of its own, the router reads the layer's.
  assert ('norm' in params) == (norm_shared or n_experts > 1)
  expected = slow_decoupled(x_BTD, params, gate_probability, norm_shared)
  np.testing.assert_allclose(
    run(module, params, x_BTD), expected, rtol=1e-4, atol=1e-5
  )


def test_the_gated_layer_is_bitnet_in_float64():
  module, params, x_BTD = layer('bitnet')
  double = jax.tree.map(np.float64, params)
  expected = slow_branch(
    slow_norm(np.float64(x_BTD), double), double, slow_binary
  )
  np.testing.assert_allclose(
    run(module, params, x_BTD), expected, rtol=1e-4, atol=1e-5
  )


@pytest.mark.parametrize('activation', ffn.ACTIVATIONS)
@pytest.mark.parametrize('norm', ['pre', 'inside'])
def test_the_gated_layer_is_its_parts(activation, norm):
  module, params, x_BTD = layer('fp', activation=activation, norm=norm)
  p = jax.tree.map(np.float64, params)
  x = slow_norm(np.float64(x_BTD), p)
  gate = x @ p['gate']['kernel']
  act = {
    'silu': lambda a: a / (1 + np.exp(-a)),
    'relu2': lambda a: np.maximum(a, 0) ** 2,
    'gelu': lambda a: (
      0.5 * a * (1 + np.tanh((2 / np.pi) ** 0.5 * (a + 0.044715 * a**3)))
    ),
  }[activation]
  hidden = act(gate) * (x @ p['up']['kernel'])
  if norm == 'inside':
    hidden = slow_norm(hidden, p['down'])
  np.testing.assert_allclose(
    run(module, params, x_BTD),
    hidden @ p['down']['kernel'],
    rtol=1e-4,
    atol=1e-5,
  )


@pytest.mark.parametrize('gate_probability', [False, True])
def test_equal_experts_are_one_branch(gate_probability):
  module, params, x_BTD = layer(n_experts=1)
  many, _, _ = layer(n_experts=8, gate_probability=gate_probability)
  stacked = {
    name: {**linear, 'kernel': jnp.stack([linear['kernel']] * 8)}
    for name, linear in params['narrow'].items()
  }
  router = jnp.asarray(normal(32, 8))
  y_many = run(many, {**params, 'narrow': stacked, 'router': router}, x_BTD)
  if not gate_probability:
    expected = run(module, params, x_BTD)
  else:
    # Scaled by p: the rest of the layer is what alpha = 0 leaves.
    wide = run(module, {**params, 'alpha': jnp.zeros(())}, x_BTD)
    narrow = run(module, {**params, 'beta': jnp.zeros(())}, x_BTD)
    p_BTE = router_of({**params, 'router': router}, x_BTD)
    expected = wide + narrow * p_BTE.max(-1, keepdims=True)
  np.testing.assert_allclose(y_many, expected, rtol=1e-4, atol=1e-5)


def test_a_token_reads_its_expert_and_no_other():
  module, params, x_BTD = layer(n_experts=4)
  expert_BT = router_of(params, x_BTD).argmax(-1)
  y = run(module, params, x_BTD)
  for i in range(4):
    changed = jax.tree.map(lambda p: p, params)
    for linear in changed['narrow'].values():
      linear['kernel'] = linear['kernel'].at[i].multiply(-3)
    moved = np.any(run(module, changed, x_BTD) != y, axis=-1)
    np.testing.assert_array_equal(moved, expert_BT == i)
  assert len(np.unique(expert_BT)) > 1


def test_an_expert_learns_from_its_tokens_alone():
  module, params, x_BTD = layer(n_experts=4)
  expert_BT = router_of(params, x_BTD).argmax(-1)
  used, unused = expert_BT[0, 0], set(range(4)) - set(np.ravel(expert_BT))
  dy = normal(*x_BTD.shape, seed=9)
  whole, mine, others = (
    gradients(module, params, x_BTD, dy * tokens[..., None])['narrow']
    for tokens in (expert_BT >= 0, expert_BT == used, expert_BT != used)
  )
  for name in ('gate', 'up', 'down'):
    kernel = whole[name]['kernel']
    size = np.abs(kernel[used]).max()
    assert size > 0
    np.testing.assert_allclose(
      kernel[used], mine[name]['kernel'][used], atol=1e-6 * size
    )
    np.testing.assert_array_equal(others[name]['kernel'][used], 0)
    for i in unused:
      np.testing.assert_array_equal(kernel[i], 0)


def test_the_router_learns_by_its_probability_alone():
  for gate_probability in (True, False):
    module, params, x_BTD = layer(
      n_experts=4, gate_probability=gate_probability
    )
    dy = normal(*x_BTD.shape, seed=9)
    gradient = gradients(module, params, x_BTD, dy)['router']
    assert bool(jnp.any(gradient != 0)) == gate_probability


def test_the_router_gradient_is_that_of_the_chosen_probability():
  module, params, x_BTD = layer(n_experts=4)
  # alpha * p * y is linear in p: y at p = 1 is the layer without the gate.
  ungated, _, _ = layer(n_experts=4, gate_probability=False)
  narrow = run(ungated, {**params, 'beta': jnp.zeros(())}, x_BTD)
  dy = normal(*x_BTD.shape, seed=9)
  dp_BT = np.float64(narrow * dy).sum(-1)
  p_BTE = router_of(params, x_BTD)
  hit_BTE = np.eye(4)[p_BTE.argmax(-1)]
  p_BT1 = p_BTE.max(-1, keepdims=True)
  dlogits = dp_BT[..., None] * p_BT1 * (hit_BTE - p_BTE)
  x = slow_norm(np.float64(x_BTD), jax.tree.map(np.float64, params))
  expected = np.einsum('btd,bte->de', x, dlogits)
  np.testing.assert_allclose(
    gradients(module, params, x_BTD, dy)['router'],
    expected,
    rtol=1e-3,
    atol=1e-4,
  )


def test_what_the_router_sows():
  module, params, x_BTD = layer(n_experts=4)
  found = sown(module, params, x_BTD)
  p_BTE = router_of(params, x_BTD)
  expert_BT = p_BTE.argmax(-1)
  (load,) = found['router']['load']
  share = np.bincount(expert_BT.ravel(), minlength=4) / expert_BT.size
  np.testing.assert_allclose(load, share, rtol=1e-6)
  assert load.sum() == pytest.approx(1)
  (entropy,) = found['router']['entropy']
  slow_entropy = -(p_BTE * np.log(p_BTE)).sum(-1).mean()
  assert float(entropy) == pytest.approx(slow_entropy, rel=1e-5)
  (balance,) = found['router']['balance']
  slow_balance = 4 * (share * p_BTE.mean((0, 1))).sum()
  assert float(balance) == pytest.approx(slow_balance, rel=1e-5)
  (chosen,) = found['inputs']['chosen']
  np.testing.assert_array_equal(chosen, np.eye(4, dtype=bool)[expert_BT])


def test_an_even_router_has_balance_1_and_the_largest_entropy():
  module, params, x_BTD = layer(n_experts=4)
  params = {**params, 'router': jnp.zeros((32, 4))}
  found = sown(module, params, x_BTD)['router']
  assert float(found['balance'][0]) == pytest.approx(1)
  assert float(found['entropy'][0]) == pytest.approx(np.log(4))


def test_scalars_of_the_branches_start_as_the_paper_says():
  module, _, x_BTD = layer()
  params = jax.jit(module.init)(jax.random.key(0), x_BTD)['params']
  assert params['alpha'] == 2 and params['beta'] == np.float32(0.2)
  assert params['wide']['up']['kernel'].shape == (32, 40)
  assert params['narrow']['up']['kernel'].shape == (32, 8)


def test_gradients_of_scalars_and_router_are_summed_in_float32():
  # In bfloat16 a sum over thousands of values stops growing.
  gradient = {}
  for dtype in ('float32', 'bfloat16'):
    module, params, _ = layer(n_experts=2, dtype=dtype, dot_dtype=dtype)
    x_BTD = jnp.asarray(normal(8, 256, 32), dtype)
    # Of one sign, as a gradient of alpha has it when alpha is too large.
    dy = jnp.sign(run(module, params, x_BTD).astype(jnp.float32))
    gradient[dtype] = gradients(module, params, x_BTD, dy)
  for name in ('alpha', 'beta', 'router'):
    exact, found = (np.ravel(g[name]) for g in gradient.values())
    error = np.linalg.norm(found - exact) / np.linalg.norm(exact)
    assert error < 0.05, name
