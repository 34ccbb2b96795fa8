"""Slopes and straight-through gradients, where both are known."""

import functools

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from qat import objective as objective_lib
from qat import zo_study
from qat.infer import load
from qat.nn import transformer
from qat.zo import perturb
from tests import tiny

SIZE = 400


def params():
  rng = np.random.default_rng(0)
  draw = lambda n: jnp.asarray(rng.normal(size=n), jnp.float32)  # noqa: E731
  return {'a': {'kernel': draw((20, 15))}, 'b': {'kernel': draw(100)},
          'norm': {'scale': draw(7)}}  # fmt: skip


def read(tree):
  return jax.tree.leaves(perturb.read(tree))


def run(loss, **changes):
  options = dict(
    pattern='.*kernel',
    eps=[1e-2],
    groups=[1, 8, 32],
    directions=32,
    seed=0,
  )
  return zo_study.study(loss, params(), **options | changes)


def smooth(tree):
  return sum(jnp.sum(jnp.square(x - 1)) for x in read(tree)) / 50


def test_where_the_gradient_is_right_all_agree():
  made = run(smooth, directions=64, groups=[1, 8, 64])
  assert made.parameters == SIZE
  exact = sum(
    float(jnp.sum(jnp.square((p['kernel'] - 1) / 25)))
    for name, p in params().items()
    if name != 'norm'
  )
  assert made.gradient_norm == pytest.approx(exact**0.5, rel=1e-5)
  assert made.loss == pytest.approx(float(smooth(params())), rel=1e-6)
  np.testing.assert_allclose(
    made.slopes[1e-2], made.straight_through, rtol=2e-3, atol=2e-3
  )
  (found,) = made.agreements.values()
  assert found.correlation == pytest.approx(1, abs=1e-5)
  assert found.ratio == pytest.approx(1, abs=1e-3)
  assert found.error < 1e-4
  assert [c.directions for c in made.cosines] == [1, 8, 64]
  assert [c.estimates for c in made.cosines] == [64, 8, 1]
  for c in made.cosines:
    assert c.expected == pytest.approx((c.directions / SIZE) ** 0.5, rel=0.1)
    # Around the expectation; of 1 direction sqrt(2 / pi) of it.
    assert 0.6 < c.mean / c.expected < 1.3
  assert np.isnan(made.cosines[-1].spread) and made.cosines[0].spread > 0


def test_directions_are_those_of_a_step():
  """The estimate of q = 1 is `direction` times its slope."""
  made = run(smooth, directions=2, groups=[1])
  key = jax.random.key(0, impl='threefry2x32')
  gradient = jax.grad(smooth)(params())
  for j in range(2):
    z = perturb.direction(params(), jax.random.fold_in(key, j), '.*kernel')
    dot = sum(
      float(jnp.vdot(gradient[n]['kernel'], z[n]['kernel'])) for n in 'ab'
    )
    assert made.straight_through[j] == pytest.approx(dot, rel=1e-4)


def test_a_gradient_of_something_else_does_not_correlate():
  """A loss whose straight-through gradient is of another function."""

  @jax.custom_vjp
  def loss(tree):
    return smooth(tree)

  def forward(tree):
    return smooth(tree), tree

  def backward(tree, dy):
    rng = np.random.default_rng(1)
    return (
      jax.tree.map(lambda x: dy * rng.normal(size=x.shape).astype('f4'), tree),
    )

  loss.defvjp(forward, backward)
  made = run(loss, directions=64, groups=[64])
  (found,) = made.agreements.values()
  assert abs(found.correlation) < 4 * found.error
  assert abs(made.cosines[0].mean) < made.cosines[0].expected


def test_short_distances_see_single_codes_change():
  """A code that changes is a jump, which a short distance makes steep."""

  def rounded(tree):
    through = [x + jax.lax.stop_gradient(jnp.round(x) - x) for x in read(tree)]
    return sum(jnp.sum(jnp.square(x - 1)) for x in through) / 50

  made = run(rounded, eps=[1e-2, 0.7], directions=64, groups=[64])
  near, far = made.agreements[1e-2], made.agreements[0.7]
  assert near.correlation < 0.6 and near.ratio > 2
  assert far.correlation > 0.85 and 0.8 < far.ratio < 1.2


@pytest.mark.parametrize(
  ('changes', 'expected'),
  [
    (dict(eps=[]), 'eps'),
    (dict(eps=[1e-3, 0.0]), 'eps'),
    (dict(groups=[33]), r'groups \[33\] of 32'),
    (dict(groups=[0]), 'groups'),
    (dict(pattern='x'), "perturbed='x' covers no parameter"),
  ],
)
def test_impossible_studies_are_refused(changes, expected):
  with pytest.raises(ValueError, match=expected):
    run(smooth, **changes)


def test_a_model_is_read_as_a_step_reads_it():
  config = tiny.config('integer', tiny.EXACT)
  model = transformer.build(config, 'cpu', 1)
  mesh = tiny.mesh(config)
  batch = tiny.batch(config)
  with tiny.compiled_quickly(), jax.set_mesh(mesh):
    tree = tiny.params(model)
    loaded = load.Loaded(config, mesh, model, tree, None, 0, 0, None, {})
    loss = zo_study.loss_of(loaded, batch)
    total = jax.jit(
      functools.partial(objective_lib.loss_sum, model, config, mesh)
    )
    found = jax.jit(loss)(tree)
    expected = total(tree, batch)[0] / batch['targets'].size
    key = jax.random.key(1, impl='threefry2x32')
    moved = perturb.perturb(tree, key, 0.1, '.*kernel')
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_allclose(
      jax.jit(loss)(moved),
      total(perturb.read(moved), batch)[0] / batch['targets'].size,
      rtol=1e-6,
    )
