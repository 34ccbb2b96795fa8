"""Absolute gradients of every weight, summed over examples, block by block.

TaCQ (2504.07389) weighs each weight by how much the loss of the clean model
depends on it: for each example the gradient of the mean next-token loss over
all its tokens, in float32, its absolute value, summed. Taken block by block,
from the last to the first, with the hidden states before each block kept on the
host from the way up, it needs one block's weights and gradients at a time, and
before them the head.
"""

from collections.abc import Callable
from collections.abc import Mapping
import functools
import time
from typing import Any

import jax
from jax import lax
from jax import numpy as jnp
from ml_collections import ConfigDict
from ml_collections import FrozenConfigDict
import numpy as np

from qat.nn import layers
from qat.nn import loss as loss_lib
from qat.nn import transformer
from qat.ptq import calibrate
from qat.ptq import examples as examples_lib
from qat.ptq import partial

SAVE_SECONDS = 120.0  # At least, between two saves of the sums.


def clean_model(config: ConfigDict, platform: str) -> transformer.Transformer:
  """The model of a config with a float32 stream and float32 products.

  Args:
    config: a whole config, of a model that is not quantized.
    platform: 'cpu', 'gpu' or 'tpu'.
  """
  config = config.copy_and_resolve_references().unlock()
  config.model.dtype = config.model.dot_dtype = 'float32'
  # Few scores at once: those of a whole example are as large as a block.
  config.model.attention = 'auto' if platform == 'cpu' else 'looped'
  config.model.remat = 'none'
  config.model.scan_layers = False
  return transformer.build(config, platform, 1)


def precise() -> Any:
  """A context in which float32 products are traced as such, not as TF32."""
  return jax.default_matmul_precision('highest')


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def back(
  block: calibrate.OneBlock,
  names: tuple[str, ...],
  params: Mapping,
  sums: dict[str, jax.Array],
  x_BTD: jax.Array,
  dy_BTD: jax.Array,
) -> tuple[dict[str, jax.Array], jax.Array]:
  """A block's part of the backward pass of some examples, one after another.

  Args:
    block: of `clean_model`.
    names: the linear layers whose gradients are wanted, such as 'attn/q'.
    params: the block's.
    sums: name -> sum of absolute gradients `[K, N]` as yet; donated.
    x_BTD: what the block read, an example a row.
    dy_BTD: gradient of the examples' losses with respect to its output.

  Returns:
    The sums with these examples, and the gradient with respect to `x_BTD`.
  """
  kernels = {name: calibrate.kernel(params, name) for name in names}

  def apply(kernels, x_TD):
    changed = params
    for name, kernel in kernels.items():
      changed = calibrate.with_kernel(changed, name, kernel)
    return block.apply({'params': {'block_0': changed}}, x_TD[None])[0]

  def one(sums, x_dy):
    _, vjp = jax.vjp(apply, kernels, x_dy[0])
    found, dx_TD = vjp(x_dy[1])
    return {n: sums[n] + jnp.abs(g) for n, g in found.items()}, dx_TD

  return lax.scan(one, sums, (x_BTD, dy_BTD))


@functools.partial(jax.jit, static_argnums=0)
def loss_gradient(
  model: transformer.Transformer,
  params: Mapping,
  x_BTD: jax.Array,
  tokens_BT: jax.Array,
  weights_BT: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Mean next-token losses of examples, and their gradient.

  Args:
    model: from `clean_model`.
    params: the part of its parameters that `last` names.
    x_BTD: what the last block passes on.
    tokens_BT: the examples.
    weights_BT: 1 where a token is, 0 on padding; the first token is predicted
      by nothing, the last predicts nothing.

  Returns:
    float32 `[B]`, nats a token, and the gradient of each with respect to its
    row of `x_BTD`. An example of padding alone has a loss and a gradient of 0.
  """
  c = model.config
  # Rolled, so that T stays what chunks divide; the last position counts not.
  targets_BT = jnp.roll(tokens_BT, -1, axis=1)
  counted_BT = weights_BT * jnp.roll(weights_BT, -1, axis=1).at[:, -1].set(0)
  counted_BT /= jnp.maximum(jnp.sum(counted_BT, 1, keepdims=True), 1)
  (table,) = jax.tree.leaves(params[_head(c)])
  norm = layers.make_norm(c)

  def loss(x_TD, target_T, weight_T):
    x_TD = norm.apply({'params': params['final_norm']}, x_TD)
    return loss_lib.cross_entropy(
      x_TD[None],
      table,
      target_T[None],
      weight_T[None],
      chunk=c.loss_chunk,
      dtype='float32',
    )

  return lax.map(
    lambda row: jax.value_and_grad(loss)(*row), (x_BTD, targets_BT, counted_BT)
  )


def last(config: FrozenConfigDict, params: Mapping) -> dict[str, Any]:
  """What comes after the blocks: the final norm and the head's matrix.

  Args:
    config: the model section of a config.
    params: the model's.
  """
  return {name: params[name] for name in ('final_norm', _head(config))}


def _head(config: FrozenConfigDict) -> str:
  return 'embed' if config.tied_embeddings else 'head'


def absolute_gradients(
  config: ConfigDict,
  params: Mapping,
  examples: examples_lib.Examples,
  names: Mapping[str, tuple[str, ...]],
  *,
  batch_size: int,
  store: partial.Store,
  show: Callable[..., None],
) -> tuple[dict[str, np.ndarray], list[float]]:
  """The sum over examples of |dL/dW| for every weight of the chosen layers.

  Args:
    config: of the model.
    params: its parameters, float, unstacked.
    examples: the examples, a sequence each.
    names: block -> its chosen layers: 'block_0' -> ('attn/q', ...).
    batch_size: examples that a block takes at once; the hidden states before
      every block of so many are on the host.
    store: where the sums stand every few minutes, to go on from.
    show: told (a few words, maybe how many blocks) after each block.

  Returns:
    Path, such as 'block_0/attn/q', -> float32 `[K, N]` on the host, and the
    loss of each example in nats a token.

  Raises:
    ValueError: a loss or a gradient is not finite.
  """
  model = clean_model(config, jax.default_backend())
  block = calibrate.one_block(model, params)
  blocks = [f'block_{i}' for i in range(config.model.n_layers)]
  first, sums, losses, saved = 0, {}, [], time.monotonic()
  if store.has('gradients'):
    sums, (first, losses) = store.load('gradients')
  batches = list(examples.batches(batch_size))
  with precise():
    for n, (tokens_BT, weights_BT) in enumerate(batches):
      if n < first:
        show('gradients', 2 * len(blocks))
        continue
      states = [np.asarray(calibrate.embed(model, params, tokens_BT))]
      for name in blocks:
        states.append(_forward(block, params[name], states[-1]))
        show(f'losses, {name}')
      loss_B, dx_BTD = loss_gradient(
        model,
        jax.tree.map(_float32, last(config.model, params)),
        states.pop(),
        tokens_BT,
        weights_BT,
      )
      new = {}
      real = np.any(weights_BT, axis=1)
      losses += np.asarray(loss_B)[real].tolist()
      for name in reversed(blocks):
        mine = {k: f'{name}/{k}' for k in names.get(name, ())}
        before = {k: sums[path] for k, path in mine.items()} if sums else None
        found, dx_BTD = _backward(
          block, tuple(mine), params[name], before, states.pop(), dx_BTD
        )
        new |= {mine[k]: sum_KN for k, sum_KN in found.items()}
        show(f'gradients, {name}')
      sums = new
      _check(sums, losses)
      # A save is as large as the model in float32.
      due = time.monotonic() > saved + SAVE_SECONDS
      if due or n + 1 == len(batches):
        store.save('gradients', sums, (n + 1, losses))
        saved = time.monotonic()
  return sums, losses


# A function each, so that nothing of a block stays on the device after it.


def _forward(
  block: calibrate.OneBlock, params: Mapping, x_BTD: np.ndarray
) -> np.ndarray:
  weights = jax.tree.map(_float32, params)
  # Copied, because `advance` takes its input away.
  return np.asarray(calibrate.advance(block, weights, jnp.array(x_BTD)))


def _backward(
  block: calibrate.OneBlock,
  names: tuple[str, ...],
  params: Mapping,
  before: Mapping[str, np.ndarray] | None,
  x_BTD: np.ndarray,
  dy_BTD: jax.Array,
) -> tuple[dict[str, np.ndarray], jax.Array]:
  """`back` with sums on the host; None: they are 0."""
  weights = jax.tree.map(_float32, params)
  if before is None:
    kernels = {name: calibrate.kernel(weights, name) for name in names}
    sums = jax.tree.map(jnp.zeros_like, kernels)
  else:
    sums = jax.tree.map(jnp.asarray, dict(before))
  sums, dx_BTD = back(block, names, weights, sums, x_BTD, dy_BTD)
  return jax.device_get(sums), dx_BTD


def _float32(leaf: jax.Array) -> jax.Array:
  return jnp.asarray(leaf, jnp.float32)


def _check(sums: Mapping[str, np.ndarray], losses: list[float]) -> None:
  if not np.all(np.isfinite(losses)):
    at = int(np.flatnonzero(~np.isfinite(losses))[0])
    raise ValueError(
      f'The loss of calibration example {at} is not finite: {losses[at]}.'
    )
  for path, sum_KN in sums.items():
    if not np.all(np.isfinite(sum_KN)):
      raise ValueError(f'The gradients of {path} are not finite.')
