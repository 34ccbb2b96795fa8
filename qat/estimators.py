"""Where the gradient of a step comes from, and which parameters it is of.

  backprop  from a backward pass, of all parameters that are floats
  spsa      from two losses a direction (`zo.spsa`; MeZO, ZeroQAT)
  forward   from a slope a direction (`zo.forward_gradient`), for comparison: of
            the model's textbook form (`nn.reference`), since forward mode does
            not pass the gradient rules of the fast one

The last two train what `zo.perturbed` covers; with `zo.quantizer_eps`, 'spsa'
also trains what quantizers learn, with slopes of its own. Matrices that were
quantized after training (`composed.Quantized`) are never trained. An optimizer
sees what is trained and nothing else, so that nothing else has a state.
"""

from collections.abc import Callable
import dataclasses
import re
from typing import Any

import jax
from jax import lax
from jax import numpy as jnp
from ml_collections import ConfigDict
import optax

from qat import optim
from qat.nn import stacked
from qat.quant import composed
from qat.zo import forward_gradient
from qat.zo import perturb
from qat.zo import rounding
from qat.zo import spsa

_ALL = '.*'
# Folded into a step's key, whose directions fold in 0, 1, ...
_OF_QUANTIZERS = 2**32 - 2
_MATRICES = re.compile(r'(.*/)?(kernel|embedding|head|positions)')

# (parameters, batch, mix) -> (what is minimized, (loss, routers)).
Objective = Callable[..., tuple[jax.Array, tuple[jax.Array, dict]]]


def in_place(config: ConfigDict) -> bool:
  """Whether parameters are moved without a gradient and an optimizer state."""
  return config.optim.estimator == 'spsa' and config.optim.optimizer == 'sgd'


def is_trained(config: ConfigDict, path: str) -> bool:
  """Whether the float parameter at a path is trained."""
  if config.optim.estimator == 'backprop' or _is_apart(config, path):
    return True
  return bool(re.fullmatch(config.zo.perturbed, stacked.one_layer(path)))


def _is_apart(config: ConfigDict, path: str) -> bool:
  """Whether a quantizer's parameter is trained with slopes of its own."""
  return bool(config.zo.quantizer_eps) and optim.is_scale(config.optim, path)


def split(config: ConfigDict, params: Any) -> tuple[Any, Any]:
  """What is trained and what is not: two trees with None for the other's."""

  def one(keys, leaf):
    quantized = composed.is_quantized(leaf)
    return not quantized and is_trained(config, perturb.path_name(keys))

  mask = jax.tree_util.tree_map_with_path(
    one, params, is_leaf=composed.is_quantized
  )
  if not any(jax.tree.leaves(mask)):
    raise ValueError(
      f'config.zo.perturbed={config.zo.perturbed!r} covers no parameter that is'
      ' not quantized, so nothing would be trained.'
    )
  return _by_mask(mask, params)


def _apart(config: ConfigDict, trained: Any) -> tuple[Any, Any]:
  """What is trained with slopes of its own, and what is trained beside."""

  def one(keys, _):
    return _is_apart(config, perturb.path_name(keys))

  return _by_mask(jax.tree_util.tree_map_with_path(one, trained), trained)


def _by_mask(mask: Any, tree: Any) -> tuple[Any, Any]:
  return tuple(
    jax.tree.map(lambda m, leaf, k=k: leaf if m == k else None, mask, tree)
    for k in (True, False)
  )


def merge(trained: Any, frozen: Any) -> Any:
  """The inverse of `split`."""
  return jax.tree.map(
    lambda a, b: b if a is None else a,
    trained,
    frozen,
    is_leaf=lambda leaf: leaf is None or isinstance(leaf, perturb.Perturbed),
  )


def stored(config: ConfigDict, params: Any) -> Any:
  """Parameters in the dtypes they are trained in; for use inside jit.

  What is trained is as `zo.master` says, and so are matrices that are not; all
  other floats, of which there are few, are float32.
  """

  def cast(keys, leaf):
    path = perturb.path_name(keys)
    if composed.is_quantized(leaf):
      return leaf
    small = not (is_trained(config, path) or _MATRICES.fullmatch(path))
    return leaf.astype(jnp.float32 if small else config.zo.master)

  return jax.tree_util.tree_map_with_path(
    cast, params, is_leaf=composed.is_quantized
  )


def snapped(config: ConfigDict, params: Any) -> Any:
  """Parameters on the grid of `zo.resolution`, if there is one; not in jit.

  Raises:
    ValueError: see `rounding.snap`.
  """
  if not config.zo.resolution:
    return params
  trained, frozen = split(config, params)
  return merge(rounding.snap(trained, _ALL, config.zo.resolution), frozen)


def optimizer_state(config: ConfigDict, params: Any) -> Any:
  """The state before the first step, of what is trained."""
  if in_place(config):
    return ()
  optimizer = optim.make(config.optim, config.train.steps)
  return optimizer.init(split(config, params)[0])


def spsa_options(config: ConfigDict) -> spsa.Options:
  """What `zo` asks for, of a tree that holds what is trained alone.

  Raises:
    ValueError: see `spsa.Options`.
  """
  zo = config.zo
  return spsa.Options(zo.eps, zo.directions, zo.clip, _ALL, zo.resolution)


def moving(config: ConfigDict, objective: Objective) -> Callable:
  """'spsa' with 'sgd': the step that moves parameters where they are.

  Args:
    config: a run's config.
    objective: of a tree with `perturb.Perturbed` leaves.

  Returns:
    (trained, frozen, batch, mix, key, step, healthy) -> the new trained tree,
    and what the log is told, with 'healthy'; without it, nothing moves.
  """
  c, options = config.optim, spsa_options(config)
  rate_of = optim.learning_rate(c, config.train.steps)
  decay_of = optim.weight_decay(c, config.train.steps)

  def move(trained, frozen, batch, mix, key, step, healthy):
    rate, decay = rate_of(step), decay_of(step)
    apart, trained = _apart(config, trained)
    move_apart = None
    if config.zo.quantizer_eps:
      slopes_q, measured, move_apart = _of_quantizers(
        config, objective, apart, merge(trained, frozen), batch, mix, key
      )
      logged = {f'quantizer_{name}': v for name, v in measured.items()}
      healthy &= jnp.isfinite(slopes_q).all()
      # One after the other.
      trained, slopes_q = lax.optimization_barrier((trained, slopes_q))
    rates, decays = {}, {}
    for path, _ in perturb.chosen(trained, _ALL):
      scale = optim.is_scale(c, path)
      rates[path] = rate * (c.scale_lr_ratio if scale else 1.0)
      decays[path] = decay if optim.is_decayed(c, path) else 0.0
    moved, measured = spsa.step(
      _loss(config, objective, merge(apart, frozen), batch, mix),
      trained,
      key,
      rates,
      options,
      lazy=True,
      decay=decays,
      healthy=healthy,
    )
    healthy = measured.pop('healthy')
    measured |= {'lr': rate, 'weight_decay': decay}
    if move_apart is not None:
      slopes_q = jnp.where(healthy, slopes_q, jnp.nan)
      apart = move_apart(slopes_q, rate * config.zo.quantizer_lr / c.peak_lr)
      measured |= logged
    return merge(moved, apart), _logged(measured) | {'healthy': healthy}

  return move


def _of_quantizers(
  config: ConfigDict,
  objective: Objective,
  apart: Any,
  others: Any,
  batch: Any,
  mix: jax.Array | None,
  key: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array], Callable]:
  """Slopes along directions of quantizers' parameters alone.

  Args:
    config: a run's config, with `zo.quantizer_eps`.
    objective: see `moving`.
    apart: these parameters, None elsewhere.
    others: all others.
    batch: of the step.
    mix: of the step.
    key: of the step; these directions have another.

  Returns:
    The slopes `[q]`, 'slope' and 'clipped' of `spsa.measure`, and (slopes,
    rate) -> the parameters, moved.
  """
  options = dataclasses.replace(
    spsa_options(config), eps=config.zo.quantizer_eps
  )
  key = jax.random.fold_in(key, _OF_QUANTIZERS)
  loss_fn = _loss(config, objective, others, batch, mix)
  losses_q2 = spsa.losses(loss_fn, apart, key, options, lazy=True)
  slopes_q, measured = spsa.measure(losses_q2, options)
  del measured['loss']

  def move(slopes_q, rate):
    return spsa.move(apart, key, slopes_q, rate, options)

  return slopes_q, measured, move


def gradient(config: ConfigDict, objective: Objective) -> Callable:
  """The estimator of a config, for an optimizer.

  Args:
    config: a run's config.
    objective: for 'spsa' of a tree with `perturb.Perturbed` leaves.

  Returns:
    (trained, frozen, batch, mix, key) -> what the log is told, by name, with
    'router'; and the gradient, a tree like `trained`.
  """
  if config.optim.estimator == 'backprop':
    return _backprop(config, objective)
  options = spsa_options(config)

  def by_spsa(trained, frozen, batch, mix, key):
    loss_fn = _loss(config, objective, frozen, batch, mix)
    found, estimate = spsa.gradient(loss_fn, trained, key, options, lazy=True)
    return _logged(found), estimate

  def by_forward(trained, frozen, batch, mix, key):
    loss_fn = _loss(config, objective, frozen, batch, mix)
    own = forward_gradient.Options(options.directions, _ALL)
    found, estimate = forward_gradient.gradient(loss_fn, trained, key, own)
    return _logged(found), estimate

  return by_spsa if config.optim.estimator == 'spsa' else by_forward


def _logged(found: dict[str, jax.Array]) -> dict[str, Any]:
  """Scalars as the log names them, of a step whose routers tell nothing."""
  return {f'train/{name}': v for name, v in found.items()} | {'router': {}}


def _backprop(config: ConfigDict, objective: Objective) -> Callable:
  micro_batches = config.optim.accumulate

  def one(trained, frozen, batch, mix):
    def minimized(trained):
      return objective(merge(trained, frozen), batch, mix)

    (_, aux), grads = jax.value_and_grad(minimized, has_aux=True)(trained)
    return aux, grads

  def accumulated(trained, frozen, batch, mix):
    if micro_batches == 1:
      return one(trained, frozen, batch, mix)
    parts = jax.tree.map(lambda a: _micro_batches(a, micro_batches), batch)
    first = jax.tree.map(lambda a: a[0], parts)
    shapes = jax.eval_shape(one, trained, frozen, first, mix)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def add(total, part):
      part = one(trained, frozen, part, mix)
      return jax.tree.map(lambda a, b: a + b / micro_batches, total, part), None

    return lax.scan(add, zeros, parts)[0]

  def by_backprop(trained, frozen, batch, mix, key):
    del key
    (loss, routers), grads = accumulated(trained, frozen, batch, mix)
    norm = optax.tree.norm(grads)
    measured = {'train/loss': loss, 'train/grad_norm': norm, 'router': routers}
    return measured, grads

  return by_backprop


def _loss(
  config: ConfigDict,
  objective: Objective,
  frozen: Any,
  batch: Any,
  mix: jax.Array | None,
) -> spsa.LossFn:
  """The mean loss of a batch; of its parts in turn, where it has parts."""
  micro_batches = config.optim.accumulate

  def loss(trained):
    if micro_batches == 1:
      return objective(merge(trained, frozen), batch, mix)[1][0]

    def add(total, part):
      # What is perturbed is the same for all parts. Left so, it would be made
      # before the loop over them, and stored.
      own, part = lax.optimization_barrier((trained, part))
      value = objective(merge(own, frozen), part, mix)[1][0]
      return total + value / micro_batches, None

    parts = jax.tree.map(lambda a: _micro_batches(a, micro_batches), batch)
    return lax.scan(add, jnp.zeros((), jnp.float32), parts)[0]

  return loss


def _micro_batches(a_BT: jax.Array, n: int) -> jax.Array:
  """`[B, ...]` -> `[n, B / n, ...]`, each part spread over all devices."""
  return a_BT.reshape(a_BT.shape[0] // n, n, *a_BT.shape[1:]).swapaxes(0, 1)
