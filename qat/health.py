"""The health of low-bit training: flips, zeros, scales, branches, experts."""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
import functools
from typing import Any

import jax
from jax import numpy as jnp

from qat.nn import stacked
from qat.quant import composed
from qat.quant import rules as rules_lib

Codes = dict[str, jax.Array]


@functools.partial(jax.jit, static_argnums=1)
def codes(params: Any, rules: rules_lib.Rules) -> Codes:
  """The weight codes of every quantized layer: layer path -> int8.

  Without those of frozen matrices (`qat.carried`), whose codes cannot change.
  """
  params = stacked.unstacked(params)
  quantized = rules_lib.quantize_kernels(params, rules)
  return {path: q.codes for path, q in quantized.items()}


@functools.partial(jax.jit, static_argnums=2)
def _measure(params: Any, before: Codes, rules: rules_lib.Rules):
  values = {}
  params = stacked.unstacked(params)
  for path, q in rules_lib.quantize_kernels(params, rules).items():
    flips = jnp.mean(q.codes != before[path], dtype=jnp.float32)
    values[f'health/flips/{path}'] = flips
    values[f'health/scale/{path}'] = jnp.mean(q.scale)
    if q.alphabet == 'ternary':
      zeros = jnp.mean(q.codes == 0, dtype=jnp.float32)
      values[f'health/zeros/{path}'] = zeros
  for keys, leaf in jax.tree_util.tree_leaves_with_path(
    params, is_leaf=composed.is_quantized
  ):
    if keys[-1].key in ('alpha', 'beta'):
      values[f'health/{keys[-1].key}/{keys[0].key}'] = leaf
  return values


def measure(
  params: Any, before: Codes, rules: rules_lib.Rules
) -> dict[str, jax.Array]:
  """What changed in one step, and where the parameters stand.

  Args:
    params: the parameters after the step.
    before: `codes` of the parameters before it.
    rules: the model's rules.

  Returns:
    health/flips/<layer>: share of weights whose code changed;
    health/scale/<layer>: mean scale; health/zeros/<layer>: share of zero codes
    of a ternary layer; health/alpha/<block> and health/beta/<block>.
  """
  return _measure(params, before, rules)


def routers(sown: Any) -> dict[str, jax.Array]:
  """What the routers of a step sowed, by log key.

  Returns:
    health/expert_load/<block>/<expert>: share of the tokens' choices;
    health/load_entropy/<block>: nats, of these shares; the logarithm of the
    number of experts where they are even, 0 where one gets everything;
    health/idle_experts/<block>: share of the experts that get less than a tenth
    of an even share; health/router_entropy/<block>: nats, of a mean token;
    health/dropped/<block>: share of the choices beyond the capacity, if there
    is one.
  """
  sown = stacked.unstacked(sown)
  values = {}
  for keys, leaf in jax.tree_util.tree_leaves_with_path(sown):
    block, kind = keys[0].key, keys[-2].key
    if kind == 'entropy':
      values[f'health/router_entropy/{block}'] = leaf
    elif kind == 'dropped':
      values[f'health/dropped/{block}'] = leaf
    elif kind == 'load':
      for i, share in enumerate(leaf):
        values[f'health/expert_load/{block}/{i}'] = share
      entropy = -jnp.sum(jax.scipy.special.xlogy(leaf, leaf))
      values[f'health/load_entropy/{block}'] = entropy
      idle = jnp.mean(leaf * len(leaf) < 0.1, dtype=jnp.float32)
      values[f'health/idle_experts/{block}'] = idle
  return values


def first_non_finite(
  forward: Callable[[Any, Any], Any],
  gradient: Callable[[Any, Any], Any],
  params: Any,
  batch: Any,
) -> str:
  """Names the first place where a step stops being finite.

  Args:
    forward: (params, batch) -> nested dicts of each module's output, in the
      order of their calls. Not jitted: jax.jit sorts what it returns.
    gradient: (params, batch) -> tree of gradients.
    params: the parameters before the step.
    batch: the step's batch.

  Returns:
    A sentence about a parameter, a module's output or a gradient.
  """
  for what, compute in (
    ('parameter', lambda params, _: params),
    ('output of', forward),
    ('gradient of', gradient),
  ):
    paths = []

    @jax.jit
    def finite(params, batch, compute=compute, paths=paths):
      found = list(_in_order(compute(params, batch), ()))
      paths.extend(path for path, _ in found)
      return [jnp.all(jnp.isfinite(leaf)) for _, leaf in found]

    flags = finite(params, batch)
    for path, ok in zip(paths, flags, strict=True):
      if not ok:
        name = '/'.join(n for n in path if n != '__call__') or 'the model'
        return f'The first that is not finite: {what} {name}.'
  return 'Computed again, every output and gradient of it is finite.'


def _in_order(
  tree: Any, path: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], jax.Array]]:
  """Leaves of nested dicts as they were put in; jax.tree sorts by key."""
  if isinstance(tree, Mapping):
    for name, value in tree.items():
      yield from _in_order(value, (*path, name))
  else:
    for leaf in jax.tree.leaves(tree):
      yield path, leaf
