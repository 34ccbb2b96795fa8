"""Which linear layer is quantized how: regexes over module paths."""

from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import re

import jax
from jax import numpy as jnp

from qat.quant import activations
from qat.quant import qtensor
from qat.quant import weights


@dataclasses.dataclass(frozen=True)
class Spec:
  """How one kind of linear layer is quantized.

  Attributes:
    weight: 'none', or a key of `weights.QUANTIZERS`.
    activation: 'none', or a key of `activations.QUANTIZERS`.
    granularity: a key of `weights.GRANULARITIES`.
  """

  weight: str
  activation: str
  granularity: str

  def __post_init__(self):
    choices = {
      'weight': ('none', *weights.QUANTIZERS),
      'activation': ('none', *activations.QUANTIZERS),
      'granularity': tuple(weights.GRANULARITIES),
    }
    for field, allowed in choices.items():
      if getattr(self, field) not in allowed:
        raise ValueError(
          f'{field}={getattr(self, field)!r} in a quantization spec; choose'
          f' one of {", ".join(allowed)}.'
        )

  def quantize(self, layer: Mapping[str, jax.Array]) -> qtensor.QTensor | None:
    """The quantized weight of a layer, or None for weight='none'.

    Args:
      layer: 'kernel', `[..., K, N]`.
    """
    if self.weight == 'none':
      return None
    return weights.QUANTIZERS[self.weight](layer['kernel'], self.granularity)

  def fake_quantize(
    self, layer: Mapping[str, jax.Array], quantized: qtensor.QTensor
  ) -> jax.Array:
    """The float array `[..., K, N]` that `quantized` stands for.

    Its gradient passes straight through to the kernel.

    Args:
      layer: what `quantize` was given.
      quantized: what it returned, without a gradient.
    """
    return _straight_through(layer['kernel'], quantized.dequantize())

  def quantize_input(self, x_MK: jax.Array) -> qtensor.QTensor | None:
    """The quantized inputs `[..., K]`, or None for activation='none'."""
    if self.activation == 'none':
      return None
    return activations.QUANTIZERS[self.activation](x_MK)


@dataclasses.dataclass(frozen=True)
class Rules:
  """An ordered list of (regex of the whole module path, Spec); first wins."""

  rules: tuple[tuple[str, Spec], ...]

  def __post_init__(self):
    for pattern, _ in self.rules:
      try:
        re.compile(pattern)
      except re.error as error:
        raise ValueError(
          f'Quantization rule {pattern!r} is no regex: {error}.'
        ) from error

  def index(self, path: str) -> int:
    """The number of the first rule that covers `path`."""
    for i, (pattern, _) in enumerate(self.rules):
      if re.fullmatch(pattern, path):
        return i
    raise ValueError(
      f'No quantization rule covers {path!r}; end the rules with ".*".'
    )

  def find(self, path: str) -> Spec:
    """The Spec of the layer at `path`, such as 'block_0/attn/q'."""
    return self.rules[self.index(path)][1]

  def check(self, paths: Iterable[str]) -> None:
    """Raises a ValueError for a layer without a rule, or the reverse."""
    paths = list(paths)
    used = {self.index(path) for path in paths}
    for i, (pattern, _) in enumerate(self.rules):
      if i not in used:
        raise ValueError(
          f'Quantization rule {pattern!r} decides about no layer; the layers'
          f' are {", ".join(paths)}.'
        )


@jax.custom_vjp
def _straight_through(latent: jax.Array, quantized: jax.Array) -> jax.Array:
  """The value of `quantized` with the gradient of `latent`."""
  del latent
  return quantized


_straight_through.defvjp(
  lambda latent, quantized: (quantized, None),
  lambda _, gradient: (gradient, jnp.zeros_like(gradient)),
)


def make_rules(
  rules: Sequence[tuple[str, str]], specs: Mapping[str, Mapping[str, str]]
) -> Rules:
  """Rules from a config's `quant.rules` and `quant.specs`."""
  made = []
  for pattern, name in rules:
    if name not in specs:
      raise ValueError(
        f'Quantization rule {pattern!r} names spec {name!r}; there are'
        f' {", ".join(sorted(specs))}.'
      )
    made.append((pattern, Spec(**specs[name])))
  return Rules(tuple(made))


def layers(params: Mapping) -> dict[str, dict[str, jax.Array]]:
  """The parameters of every linear layer, by layer path, in the tree's order.

  Args:
    params: a parameter tree; a linear layer is what has a leaf 'kernel'.

  Returns:
    Path such as 'block_0/attn/q' -> its own leaves: 'kernel', `[K, N]`, or
    `[E, K, N]` for experts, and what its quantizer learns.
  """
  found = {}
  for keys, leaf in jax.tree_util.tree_leaves_with_path(params):
    *path, last = [key.key for key in keys]
    found.setdefault('/'.join(path), {})[last] = leaf
  return {path: leaves for path, leaves in found.items() if 'kernel' in leaves}


def kernels(params: Mapping) -> dict[str, jax.Array]:
  """The matrix of every linear layer, by layer path; see `layers`."""
  return {path: layer['kernel'] for path, layer in layers(params).items()}


def quantize_kernels(
  params: Mapping, rules: Rules
) -> dict[str, qtensor.QTensor]:
  """Every linear layer's quantized matrix; layers with weight='none' absent."""
  quantized = {
    path: rules.find(path).quantize(layer)
    for path, layer in layers(params).items()
  }
  return {path: q for path, q in quantized.items() if q is not None}
