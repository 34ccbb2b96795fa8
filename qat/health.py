"""The health of low-bit training: flips, zeros, scales, branches, experts."""

from collections.abc import Callable
import functools
from typing import Any

import jax
from jax import numpy as jnp

from qat.quant import rules as rules_lib

Codes = dict[str, jax.Array]


@functools.partial(jax.jit, static_argnums=1)
def codes(params: Any, rules: rules_lib.Rules) -> Codes:
  """The weight codes of every quantized layer: layer path -> int8."""
  quantized = rules_lib.quantize_kernels(params, rules)
  return {path: q.codes for path, q in quantized.items()}


@functools.partial(jax.jit, static_argnums=2)
def _measure(params: Any, before: Codes, rules: rules_lib.Rules):
  values = {}
  for path, q in rules_lib.quantize_kernels(params, rules).items():
    flips = jnp.mean(q.codes != before[path], dtype=jnp.float32)
    values[f'health/flips/{path}'] = flips
    values[f'health/scale/{path}'] = jnp.mean(q.scale)
    if q.alphabet == 'ternary':
      zeros = jnp.mean(q.codes == 0, dtype=jnp.float32)
      values[f'health/zeros/{path}'] = zeros
  for keys, leaf in jax.tree_util.tree_leaves_with_path(params):
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
    health/expert_load/<block>/<expert>: share of tokens;
    health/router_entropy/<block>: nats, of a mean token.
  """
  values = {}
  for keys, leaf in jax.tree_util.tree_leaves_with_path(sown):
    block, kind = keys[0].key, keys[-2].key
    if kind == 'entropy':
      values[f'health/router_entropy/{block}'] = leaf
    elif kind == 'load':
      for i, share in enumerate(leaf):
        values[f'health/expert_load/{block}/{i}'] = share
  return values


def first_non_finite(
  forward: Callable[[Any, Any], Any],
  gradient: Callable[[Any, Any], Any],
  params: Any,
  batch: Any,
) -> str:
  """Names the first place where a step stops being finite.

  Args:
    forward: (params, batch) -> tree of each module's output, in call order.
    gradient: (params, batch) -> tree of gradients.
    params: the parameters before the step.
    batch: the step's batch.

  Returns:
    A sentence about a parameter, a module's output or a gradient.
  """
  for what, tree in (
    ('parameter', lambda: params),
    ('output of', lambda: forward(params, batch)),
    ('gradient of', lambda: gradient(params, batch)),
  ):
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree()):
      if not bool(jnp.all(jnp.isfinite(leaf))):
        names = [
          key.key for key in keys if isinstance(key, jax.tree_util.DictKey)
        ]
        path = '/'.join(n for n in names if n != '__call__') or 'the model'
        return f'The first that is not finite: {what} {path}.'
  return 'Computed again, every output and gradient of it is finite.'
