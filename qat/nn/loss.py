"""Next-token cross-entropy that never holds all logits."""

import functools

import jax
from jax import lax
from jax import numpy as jnp


def cross_entropy(
  x_BTD: jax.Array,
  head_VD: jax.Array,
  targets_BT: jax.Array,
  weights_BT: jax.Array,
  *,
  chunk: int,
  dtype: str,
) -> jax.Array:
  """Sum over tokens of weight * -log softmax(x head^T)[target], in nats.

  Logits live for `chunk` positions at a time. The gradient with respect to the
  logits is known as soon as they are, so it is used while they are there, and
  the backward pass only scales what was found.

  Args:
    x_BTD: hidden states.
    head_VD: the head's matrix.
    targets_BT: int token ids.
    weights_BT: float32; 0 leaves a token out. They get no gradient.
    chunk: positions; a T that it does not divide is computed in one chunk.
    dtype: of the operands of products, by name.

  Returns:
    A float32 scalar.
  """
  if x_BTD.shape[1] % chunk:
    chunk = x_BTD.shape[1]
  return _cross_entropy(x_BTD, head_VD, targets_BT, weights_BT, chunk, dtype)


def nats_by_row(
  x_BTD: jax.Array,
  head_VD: jax.Array,
  targets_BT: jax.Array,
  weights_BT: jax.Array,
  *,
  chunk: int,
  dtype: str,
) -> jax.Array:
  """The sums of `cross_entropy` of each row alone, float32 `[B]`.

  Its arguments are those; for a value without a gradient.
  """
  if x_BTD.shape[1] % chunk:
    chunk = x_BTD.shape[1]
  head = head_VD.astype(dtype)

  def step(total_B, args):
    x_MD, target_M, weight_M = args
    nll_M, _, _ = _nll(x_MD.astype(dtype), head, target_M)
    return total_B + (nll_M * weight_M).reshape(-1, chunk).sum(1), None

  xs = [_chunks(a, chunk) for a in (x_BTD, targets_BT, weights_BT)]
  zeros = jnp.zeros(x_BTD.shape[:1], jnp.float32)
  return lax.scan(step, zeros, tuple(xs))[0]


def _chunks(a: jax.Array, chunk: int) -> jax.Array:
  """`[B, T, ...]` -> `[T / chunk, B * chunk, ...]`."""
  batch, length = a.shape[:2]
  a = a.reshape(batch, length // chunk, chunk, *a.shape[2:])
  return a.swapaxes(0, 1).reshape(length // chunk, batch * chunk, *a.shape[3:])


def _unchunk(a: jax.Array, batch: int) -> jax.Array:
  """The inverse of `_chunks`."""
  n, rows = a.shape[:2]
  a = a.reshape(n, batch, rows // batch, *a.shape[2:]).swapaxes(0, 1)
  return a.reshape(batch, -1, *a.shape[3:])


def _nll(x_MD, head_VD, target_M):
  """-log p of the targets, and the logits and log-sum-exp it came from."""
  logits_MV = lax.dot_general(
    x_MD,
    head_VD,
    (((1,), (1,)), ((), ())),
    preferred_element_type=jnp.float32,
  )
  lse_M = jax.nn.logsumexp(logits_MV, axis=-1)
  hit = jnp.take_along_axis(logits_MV, target_M[:, None], axis=-1)[:, 0]
  return lse_M - hit, logits_MV, lse_M


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _cross_entropy(x_BTD, head_VD, targets_BT, weights_BT, chunk, dtype):
  head = head_VD.astype(dtype)

  def step(total, args):
    x_MD, target_M, weight_M = args
    nll_M, _, _ = _nll(x_MD.astype(dtype), head, target_M)
    return total + jnp.sum(nll_M * weight_M), None

  xs = [_chunks(a, chunk) for a in (x_BTD, targets_BT, weights_BT)]
  return lax.scan(step, jnp.zeros((), jnp.float32), tuple(xs))[0]


def _fwd(x_BTD, head_VD, targets_BT, weights_BT, chunk, dtype):
  head = head_VD.astype(dtype)
  vocabulary = head.shape[0]

  def step(carry, args):
    total, dhead_DV = carry
    x_MD, x_DM, target_M, weight_M = args
    nll_M, logits_MV, lse_M = _nll(x_MD, head, target_M)
    p_MV = jnp.exp(logits_MV - lse_M[:, None])
    token_MV = lax.broadcasted_iota(jnp.int32, (x_MD.shape[0], vocabulary), 1)
    dlogits_MV = (p_MV - (token_MV == target_M[:, None])) * weight_M[:, None]
    dlogits_MV = dlogits_MV.astype(dtype)
    product = functools.partial(
      lax.dot_general,
      dimension_numbers=(((1,), (0,)), ((), ())),
      preferred_element_type=jnp.float32,
    )
    dx_MD = product(dlogits_MV, head).astype(x_BTD.dtype)
    dhead_DV = dhead_DV + product(x_DM, dlogits_MV)
    return (total + jnp.sum(nll_M * weight_M), dhead_DV), dx_MD

  x_cMD = _chunks(x_BTD.astype(dtype), chunk)
  start = (jnp.zeros((), jnp.float32), jnp.zeros(head.shape[::-1], jnp.float32))
  # The transposed copy is made outside the loop: inside, XLA:CPU would fold the
  # transpose into the product, which then runs at half the speed.
  (total, dhead_DV), dx_cMD = lax.scan(
    step,
    start,
    (
      x_cMD,
      x_cMD.swapaxes(1, 2),
      _chunks(targets_BT, chunk),
      _chunks(weights_BT, chunk),
    ),
  )
  dx_BTD = _unchunk(dx_cMD, x_BTD.shape[0])
  return total, (dx_BTD, dhead_DV, jnp.zeros(0, head_VD.dtype))


def _bwd(chunk, dtype, residuals, d):
  dx_BTD, dhead_DV, head_like = residuals
  return (
    (dx_BTD * d).astype(dx_BTD.dtype),
    (dhead_DV.T * d).astype(head_like.dtype),
    None,
    None,
  )


_cross_entropy.defvjp(_fwd, _bwd)
