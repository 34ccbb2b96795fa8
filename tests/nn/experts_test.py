"""Grouped experts against a loop over tokens, and what they cost."""

import dataclasses
import functools
import math

import hypothesis
from hypothesis import strategies as st
import jax
from jax import numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from qat import step as step_lib
from qat.nn import experts
from qat.quant import dot
from qat.quant import operand as operand_lib
from qat.quant import rules
from tests import jaxprs
from tests import tiny

FLOAT32 = dot.Method(int8=False, dtype='float32')
place = functools.partial(jax.jit, static_argnums=(1, 2, 3))(experts.place)
METHODS = {
  'float32': FLOAT32,
  'int8': dataclasses.replace(FLOAT32, int8=True),
  'in_loop': dataclasses.replace(FLOAT32, transpose_in_loop=True),
}
N_EXPERTS = 4


def normal(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def choose(load, groups, k, tokens, n_experts=N_EXPERTS, seed=0):
  """Different experts for each token, int32 `[G, k, M]`."""
  rng = np.random.default_rng(seed)
  draw = lambda: rng.permutation(n_experts)[:k]  # noqa: E731
  if load == 'one':
    draw = lambda: (np.arange(k) + n_experts - 1) % n_experts  # noqa: E731
  elif load == 'empty':  # Nobody goes to the first and to the last.
    draw = lambda: 1 + rng.permutation(n_experts - 2)[:k]  # noqa: E731
  chosen = [[draw() for _ in range(tokens)] for _ in range(groups)]
  return np.int32(chosen).swapaxes(1, 2)


def slow_places(expert_GkM, n_experts, tile, capacity):
  """The choices (index into k * M) that each expert takes, in their order."""
  taken = []
  for expert_n in expert_GkM.reshape(len(expert_GkM), -1):
    mine = [np.flatnonzero(expert_n == e) for e in range(n_experts)]
    taken.append([m[:capacity].tolist() for m in mine])
  return taken


@hypothesis.given(
  st.integers(1, 3),
  st.integers(1, 2),
  st.integers(1, 40),
  st.integers(2, 6),
  st.integers(1, 16),
  st.none() | st.integers(1, 12),
  st.sampled_from(['even', 'one']),
  st.integers(0, 99),
)
@hypothesis.settings(max_examples=15)
def test_every_choice_has_its_place(
  groups, k, tokens, n_experts, tile, capacity, load, seed
):
  expert_GkM = choose(load, groups, k, tokens, n_experts, seed)
  layout = place(expert_GkM, n_experts, tile, capacity)
  layout = jax.tree.map(np.asarray, layout)
  slots, rows = layout.slots, min(tile, tokens)
  assert slots == rows * layout.expert_GC.shape[1]
  # Never more than a tile of padding an expert.
  assert slots <= k * tokens + n_experts * (rows - 1)
  taken = slow_places(expert_GkM, n_experts, tile, capacity)
  for g, lists in enumerate(taken):
    flat = layout.slot_GkM[g].ravel()
    for expert, mine in enumerate(lists):
      here = flat[mine]
      assert (here < slots).all()
      np.testing.assert_array_equal(layout.expert_GS[g][here], expert)
      # In order, without gaps, from the start of a tile.
      np.testing.assert_array_equal(np.diff(here), 1)
      assert not mine or here[0] % rows == 0
      np.testing.assert_array_equal(layout.choice_GS[g][here], mine)
      np.testing.assert_array_equal(
        layout.token_GS[g][here], np.array(mine, int) % tokens
      )
    kept = sum(map(len, lists))
    assert layout.kept_GkM[g].sum() == layout.filled_GS[g].sum() == kept
    assert kept == k * tokens or capacity is not None
    assert (flat[~layout.kept_GkM[g].ravel()] == slots).all()
    np.testing.assert_array_equal(
      layout.token_GS[g][~layout.filled_GS[g]], tokens
    )


@functools.partial(jax.jit, static_argnums=(4, 5, 6))
def grouped(x_BTK, w_EKN, expert_GkM, dy_GkMN, spec, method, tile=4):
  """Output and gradients of one projection by the chosen experts."""
  layout = experts.place(expert_GkM, len(w_EKN), tile)

  def forward(x_BTK, w_EKN):
    pair = (
      operand_lib.make_input(x_BTK, spec),
      operand_lib.make_weight({'kernel': w_EKN}, spec),
    )
    (y_GSN,) = experts.project([pair], layout, method)
    return experts.spread(y_GSN, layout)

  y_GkMN, backward = jax.vjp(forward, x_BTK, w_EKN)
  return y_GkMN, *backward(dy_GkMN)


def slow(x_BTK, w_EKN, expert_GkM, dy_GkMN, spec):
  """The same token by token, in float64."""
  x_BTK, w_EKN = jnp.asarray(x_BTK), jnp.asarray(w_EKN)
  source, weight = spec.quantize_input(x_BTK), spec.quantize({'kernel': w_EKN})
  if source is not None:
    x_BTK = source.dequantize()
  if weight is not None:
    w_EKN = weight.dequantize()
  groups, k, tokens = expert_GkM.shape
  x_GMK = np.float64(x_BTK).reshape(groups, tokens, -1)
  w_EKN, y_GkMN = np.float64(w_EKN), np.zeros(dy_GkMN.shape)
  dx_GMK, dw_EKN = np.zeros_like(x_GMK), np.zeros_like(w_EKN)
  for g, j, m in np.ndindex(groups, k, tokens):
    e = expert_GkM[g, j, m]
    y_GkMN[g, j, m] = x_GMK[g, m] @ w_EKN[e]
    dx_GMK[g, m] += w_EKN[e] @ dy_GkMN[g, j, m]
    dw_EKN[e] += np.outer(x_GMK[g, m], dy_GkMN[g, j, m])
  return y_GkMN, dx_GMK.reshape(x_BTK.shape), dw_EKN


SPECS = {
  'int8': rules.Spec('int8', 'int8', 'tensor'),
  'channel': rules.Spec('int8', 'int8', 'channel'),
  'binary': rules.Spec('binary', 'int8', 'tensor'),
  'weights': rules.Spec('ternary', 'none', 'tensor'),
  'full': rules.Spec('none', 'none', 'tensor'),
}


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('name', SPECS)
def test_the_numerics_are_those_of_a_loop_over_tokens(name, method):
  x_BTK, w_EKN = normal(2, 7, 6), normal(N_EXPERTS, 6, 5, seed=1)
  expert_GkM = choose('even', 2, 2, 7)
  dy_GkMN = normal(2, 2, 7, 5, seed=2)
  arguments = x_BTK, w_EKN, expert_GkM, dy_GkMN, SPECS[name]
  found = grouped(*arguments, METHODS[method])
  for a, b in zip(found, slow(*arguments), strict=True):
    np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize('load', ['even', 'one', 'empty'])
@pytest.mark.parametrize('k', [1, 2])
@pytest.mark.parametrize('tile', [3, 8, 64])
def test_no_load_loses_a_token(load, k, tile):
  x_BTK, w_EKN = normal(2, 11, 6), normal(N_EXPERTS, 6, 9, seed=1)
  expert_GkM = choose(load, 1, k, 22)
  dy_GkMN = normal(1, k, 22, 9, seed=2)
  arguments = x_BTK, w_EKN, expert_GkM, dy_GkMN, SPECS['int8']
  found = grouped(*arguments, METHODS['in_loop'], tile)
  for a, b in zip(found, slow(*arguments), strict=True):
    np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)
  untouched = set(range(N_EXPERTS)) - set(expert_GkM.ravel())
  for expert in untouched:
    np.testing.assert_array_equal(found[2][expert], 0)


def test_beyond_the_capacity_a_choice_gives_and_learns_nothing():
  x_GMK, expert_GkM = normal(1, 10, 3), choose('one', 1, 1, 10)
  layout = place(expert_GkM, N_EXPERTS, 4, 6)

  @jax.jit
  def there_and_back(x_GMK):
    x = experts.gather(operand_lib.Operand(x_GMK, None), layout)
    return experts.spread(x.value, layout)

  y_GkMK, backward = jax.vjp(there_and_back, x_GMK)
  np.testing.assert_array_equal(y_GkMK[0, 0, :6], x_GMK[0, :6])
  np.testing.assert_array_equal(y_GkMK[0, 0, 6:], 0)
  (dx_GMK,) = backward(jnp.ones_like(y_GkMK))
  np.testing.assert_array_equal(dx_GMK[0, :, 0], np.arange(10) < 6)


def test_first_choices_come_before_second_ones():
  expert_GkM = np.array([[[0, 1, 1], [1, 0, 0]]])
  layout = place(expert_GkM, 2, 2, 2)
  np.testing.assert_array_equal(
    layout.kept_GkM, [[[True, True, True], [False, True, False]]]
  )


def test_padding_is_zero_in_every_part():
  layout = place(choose('even', 2, 2, 7), N_EXPERTS, 4)
  padded_GS = ~np.asarray(layout.filled_GS)
  assert padded_GS.any()

  @jax.jit
  def parts(x_BTK):
    x = experts.gather(operand_lib.make_input(x_BTK, SPECS['int8']), layout)
    return x.value, x.quantized

  for leaf in jax.tree.leaves(parts(normal(2, 7, 6) + 5)):
    np.testing.assert_array_equal(np.asarray(leaf)[padded_GS], 0)
  y_GkMN, backward = jax.vjp(
    jax.jit(lambda y: experts.spread(y, layout)),
    jnp.ones((2, layout.slots, 3)),
  )
  np.testing.assert_array_equal(y_GkMN, 1)
  (dy_GSN,) = backward(jnp.ones_like(y_GkMN))
  np.testing.assert_array_equal(dy_GSN[..., 0], ~padded_GS)


def test_weighing_has_the_gradients_of_its_formula():
  rng = np.random.default_rng(0)
  y, weight, dy = (
    jnp.asarray(rng.normal(size=shape), jnp.float32)
    for shape in ((2, 3, 7, 5), (2, 3, 7), (2, 7, 5))
  )
  found, pull = jax.vjp(experts.weigh, y, weight)
  expected, pull_expected = jax.vjp(
    lambda y, weight: jnp.sum(y * weight[..., None], 1), y, weight
  )
  np.testing.assert_array_equal(found, expected)
  for a, b in zip(pull(dy), pull_expected(dy), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_several_weights_share_all_gathers():
  layout = place(choose('even', 1, 1, 8), N_EXPERTS, 4)
  x_BTK, w_EKN = normal(1, 8, 6), normal(N_EXPERTS, 6, 5)

  def gathers(weights):
    def forward(x_BTK, w_EKN):
      x = operand_lib.make_input(x_BTK, SPECS['int8'])
      w = operand_lib.make_weight({'kernel': w_EKN}, SPECS['int8'])
      return experts.project([(x, w)] * weights, layout, FLOAT32)

    return jaxprs.count('gather', forward, x_BTK, w_EKN)

  # The weights' codes and scales by tile; the tokens' value, codes and scale.
  assert gathers(1) == gathers(2) == 2 + 3


def multiplications(f, *args):
  total = 0
  for e in jaxprs.equations(f, *args):
    if e.primitive.name == 'dot_general':
      (contracted, _), _ = e.params['dimension_numbers']
      shape = e.invars[0].aval.shape
      total += e.outvars[0].aval.size * math.prod(shape[i] for i in contracted)
  return total


@pytest.mark.parametrize('k', [1, 2])
def test_the_cost_is_that_of_the_chosen_experts(k):
  x_BTK, spec = normal(2, 128, 32), SPECS['int8']
  for n_experts in (2, 8, 16):
    w_EKN = normal(n_experts, 32, 16)
    args = x_BTK, w_EKN, choose('even', 1, k, 256, n_experts)
    args += (normal(1, k, 256, 16),)
    found = multiplications(
      lambda *args: grouped(*args, spec, FLOAT32, 16), *args
    )
    # Forward, and both gradients; a tile of padding an expert, and the sums
    # over tiles.
    tiles = min((k * 256 + n_experts * 15) // 16, n_experts * 256 // 16)
    assert found == 3 * tiles * 16 * 32 * 16 + n_experts * tiles * 32 * 16


@pytest.mark.parametrize('fields', [{}, {'model.experts_per_token': 2}])
def test_a_training_step_exchanges_no_tokens(fields):
  config = tiny.config('pquant4', {**tiny.EXACT, **fields})
  with tiny.compiled_quickly():
    program = step_lib.compile_program(config, tiny.mesh(config, 8))
  text = program.train_step.as_text()
  for exchange in ('all-gather', 'all-to-all', 'collective-permute'):
    assert exchange not in text, exchange
  assert 'all-reduce' in text


def test_groups_follow_the_mesh():
  mesh = tiny.mesh(tiny.config('pquant'), 8)
  assert experts.groups(16) == 1
  with jax.set_mesh(mesh):
    assert experts.groups(16) == 8
    assert experts.groups(1) == experts.groups(12) == 1


@pytest.mark.parametrize('method', ['float32', 'in_loop'])
def test_devices_exchange_gradients_of_weights_alone(method):
  mesh = tiny.mesh(tiny.config('pquant'), 8)
  spec, w_EKN = SPECS['int8'], normal(N_EXPERTS, 6, 5)
  x_BTK, expert_GkM = normal(8, 7, 6), choose('even', 8, 1, 7)
  dy_GkMN = normal(8, 1, 7, 5, seed=2)
  split = NamedSharding(mesh, P(('data', 'fsdp')))
  whole = NamedSharding(mesh, P())
  arguments = [
    jax.device_put(x_BTK, split),
    jax.device_put(w_EKN, whole),
    jax.device_put(expert_GkM, split),
    jax.device_put(dy_GkMN, split),
  ]
  f = functools.partial(grouped, spec=spec, method=METHODS[method])
  compiled = (
    jax.jit(f, out_shardings=(split, split, whole)).lower(*arguments).compile()
  )
  text = compiled.as_text()
  for exchange in ('all-gather', 'all-to-all', 'collective-permute'):
    assert exchange not in text, exchange
  assert text.count(' all-reduce(') == 1
  for a, b in zip(
    compiled(*arguments),
    slow(x_BTK, w_EKN, expert_GkM, dy_GkMN, spec),
    strict=True,
  ):
    np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)
