"""GPTQ and its grids in float64 NumPy, column after column, as papers say.

Matrices are `W_NK` here, outputs first, as in the papers.
"""

import numpy as np


def half(values):
  return np.asarray(values).astype(np.float16).astype(np.float64)


def replaced(W, ignored):
  """Ignored weights become the mean of the others of their row."""
  W = W.copy()
  for row, mask in zip(W, ignored, strict=True):
    row[mask] = row[~mask].mean() if (~mask).any() else 0
  return W


def scale_and_zero(least, most, bits, symmetric):
  low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
  scale = max(half((most - least) / (2**bits - 1)), 2.0**-24)
  zero = 0 if symmetric else np.clip(np.round(low - least / scale), low, high)
  return scale, zero


def encode(w, scale, zero, bits):
  codes = np.round(w / scale) + zero
  return np.clip(codes, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def level(w, scale, zero, bits):
  return (encode(w, scale, zero, bits) - zero) * scale


def fit_row(row, bits, symmetric, mse):
  """Scale and zero of weights that share a grid."""
  least, most = min(row.min(), 0), max(row.max(), 0)
  if symmetric:
    most = max(most, -least)
    least = -most
  best = scale_and_zero(least, most, bits, symmetric)
  if mse:
    smallest = np.inf
    for i in range(80):
      share = 1 - i / 100
      tried = scale_and_zero(share * least, share * most, bits, symmetric)
      error = (np.abs(level(row, *tried, bits) - row) ** 2.4).sum()
      if error < smallest:
        best, smallest = tried, error
  return best


def fit(W, bits, symmetric=False, mse=False, ignored=None):
  """Scales and zeros `[N]` of the rows of a group."""
  if ignored is not None:
    W = replaced(W, ignored)
  found = [fit_row(row, bits, symmetric, mse) for row in W]
  return tuple(np.array(part, np.float64) for part in zip(*found, strict=True))


def hessian(X_MK, percdamp):
  """The damped Hessian, which inputs are dead, U with U^T U = H^-1."""
  X_MK = X_MK.astype(np.float64)
  H = 2 / len(X_MK) * X_MK.T @ X_MK
  dead = np.diag(H) == 0
  H[dead, dead] = 1
  H += percdamp * np.mean(np.diag(H)) * np.eye(len(H))
  return H, dead, np.linalg.cholesky(np.linalg.inv(H)).T


def gptq(
  W,
  X_MK,
  *,
  bits,
  group_size,
  symmetric,
  mse,
  percdamp,
  act_order,
  static_groups,
  keep=None,
  fit_group=None,
  is_kept=None,
):
  """Returns values `[N, K]`, scales and zeros `[N, G]`, kept `[N, K]`.

  `fit_group(W_group, columns, U_jj of them)` and `is_kept(w, q, column, U_jj)`
  replace the fit and the mask `keep`.
  """
  W = W.astype(np.float64).copy()
  outputs, inputs = W.shape
  size = group_size or inputs
  H, dead, _ = hessian(X_MK, percdamp)
  W[:, dead] = 0
  order = np.arange(inputs)
  if act_order:
    order = np.argsort(-np.diag(H), kind='stable')
  H = H[order][:, order]
  U = np.linalg.cholesky(np.linalg.inv(H)).T
  diagonal = np.zeros(inputs)
  diagonal[order] = np.diag(U)

  def fitted(W, g):
    columns = np.arange(g * size, (g + 1) * size)
    if fit_group is not None:
      return fit_group(W[:, columns], columns, diagonal[columns])
    ignored = None if keep is None else keep[:, columns]
    return fit(W[:, columns], bits, symmetric, mse, ignored)

  groups = [None] * (inputs // size)
  if static_groups or not group_size:
    groups = [fitted(W, g) for g in range(len(groups))]
  kept_NK = np.zeros(W.shape, bool)
  for i, column in enumerate(order):
    g = column // size
    if groups[g] is None:
      groups[g] = fitted(W, g)
    w = W[:, column].copy()
    scale, zero = groups[g]
    q = level_of(w, scale, zero, bits)
    if is_kept is not None:
      kept_NK[:, column] = is_kept(w, q, column, U[i, i])
    elif keep is not None:
      kept_NK[:, column] = keep[:, column]
    q = np.where(kept_NK[:, column], w, q)
    error = (w - q) / U[i, i]
    W[:, column] = q
    later = order[i + 1 :]
    W[:, later] -= np.outer(error, U[i, i + 1 :])
  scales, zeros = (np.stack(part, 1) for part in zip(*groups, strict=True))
  return W, scales, zeros, kept_NK


def level_of(w, scale, zero, bits):
  """Levels where zero points may lie between two codes."""
  low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
  codes = np.arange(low, high + 1)
  if np.array_equal(zero, np.round(zero)):
    return level(w, scale, zero, bits)
  levels = (codes - zero[:, None]) * scale[:, None]
  nearest = np.argmin(np.abs(levels - w[:, None]), 1)
  return levels[np.arange(len(w)), nearest]
