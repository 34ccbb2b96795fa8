"""Which linear layer is quantized how: regexes over module paths."""

from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import functools
import re
from typing import Any

import jax
from jax import numpy as jnp

from qat.quant import activations
from qat.quant import blocks
from qat.quant import composed
from qat.quant import learned
from qat.quant import qtensor
from qat.quant import weights


@dataclasses.dataclass(frozen=True)
class Spec:
  """How one kind of linear layer is quantized.

  Attributes:
    weight: 'none', or a key of `weights.QUANTIZERS` or `learned.QUANTIZERS`.
    activation: 'none', or a key of `activations.QUANTIZERS`.
    granularity: of the weights' scales, a key of `blocks.AXES`.
    activation_granularity: one of `activations.GRANULARITIES`.
    group_size: inputs that share a scale, where a granularity is 'group'.
    kept_share: share of exact weights of 'binary_mix'.
    output_norm: whether a LayerNorm without parameters follows the product
      (OneBit, 2402.11295).
  """

  weight: str
  activation: str
  granularity: str
  activation_granularity: str = 'token'
  group_size: int = weights.GROUP
  kept_share: float = weights.KEPT
  output_norm: bool = False

  def __post_init__(self):
    quantizers = {**weights.QUANTIZERS, **learned.QUANTIZERS}
    choices = {
      'weight': ('none', *quantizers),
      'activation': ('none', *activations.QUANTIZERS),
      'granularity': tuple(blocks.AXES),
      'activation_granularity': activations.GRANULARITIES,
    }
    for field, allowed in choices.items():
      if getattr(self, field) not in allowed:
        raise ValueError(
          f'{field}={getattr(self, field)!r} in a quantization spec; choose'
          f' one of {", ".join(allowed)}.'
        )
    if self._learned and self.granularity not in self._learned.granularities:
      raise ValueError(
        f'granularity={self.granularity!r} in a quantization spec with weight='
        f'{self.weight!r}; choose one of'
        f' {", ".join(self._learned.granularities)}.'
      )
    if self.group_size < 1:
      raise ValueError(
        f'group_size={self.group_size} in a quantization spec; at least 1.'
      )
    if not 0 <= self.kept_share < 1:
      raise ValueError(
        f'kept_share={self.kept_share} in a quantization spec; at least 0,'
        ' below 1.'
      )

  @property
  def _learned(self) -> learned.Learned | None:
    return learned.QUANTIZERS.get(self.weight)

  @property
  def _blocks(self) -> tuple[str, int]:
    return self.granularity, self.group_size

  @property
  def bits(self) -> float:
    """Bits of a weight, as papers count them; 16 where it is not quantized.

    Scales, zero points and learned vectors are not counted, nor where the exact
    weights of 'binary_mix' stand.
    """
    if self.weight == 'none':
      return 16.0
    if self.weight == 'binary_mix':
      return 1.0 * (1 - self.kept_share) + 16.0 * self.kept_share
    if self._learned:
      return qtensor.BITS[self._learned.alphabet]
    return qtensor.BITS[self.weight.removesuffix('_asym')]

  @property
  def input_key(self) -> tuple[str, str, int]:
    """Equal for layers that quantize an input alike."""
    grouped = self.activation_granularity == 'group'
    size = self.group_size if grouped else 0
    return self.activation, self.activation_granularity, size

  @property
  def parameters(self) -> tuple[str, ...]:
    """The names of what the layer learns beside its 'kernel'."""
    return self._learned.parameters if self._learned else ()

  def start(self, w_KN: jax.Array) -> dict[str, jax.Array]:
    """The `parameters` that a layer with the kernel `[..., K, N]` starts with.

    Raises:
      ValueError: if `group_size` does not divide K.
    """
    return self._learned.start(w_KN, *self._blocks) if self._learned else {}

  def check_width(self, width: int) -> None:
    """Raises a ValueError if a layer of `width` inputs cannot be quantized."""
    if self.weight != 'none':
      blocks.check(self.granularity, self.group_size, width)
    if self.activation != 'none':
      activations.check(self.activation_granularity, self.group_size, width)

  def quantize(self, layer: Mapping[str, jax.Array]) -> qtensor.QTensor | None:
    """The quantized weight of a layer, or None for weight='none'.

    Args:
      layer: 'kernel', `[..., K, N]`, and the `parameters`.
    """
    if self.weight == 'none':
      return None
    if self._learned:
      return self._learned.quantize(layer, *self._blocks)
    quantizer = weights.QUANTIZERS[self.weight]
    if self.weight == 'binary_mix':
      return quantizer(layer['kernel'], *self._blocks, self.kept_share)
    return quantizer(layer['kernel'], *self._blocks)

  def fake_quantize(
    self, layer: Mapping[str, jax.Array], quantized: qtensor.QTensor
  ) -> jax.Array:
    """The float array `[..., K, N]` that `quantized` stands for.

    Its gradient is the one that the quantizer publishes where it learns its
    scales; else it passes straight through to the kernel.

    Args:
      layer: what `quantize` was given.
      quantized: what it returned, without a gradient.
    """
    if self._learned:
      return _learned_value(self, dict(layer), quantized.dequantize())
    return _straight_through(layer['kernel'], quantized.dequantize())

  def quantize_input(self, x_MK: jax.Array) -> qtensor.QTensor | None:
    """The quantized inputs `[..., K]`, or None for activation='none'."""
    if self.activation == 'none':
      return None
    return activations.QUANTIZERS[self.activation](
      x_MK, self.activation_granularity, self.group_size
    )


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _learned_value(
  spec: Spec, layer: dict[str, jax.Array], quantized: jax.Array
) -> jax.Array:
  """The value of `quantized` with the gradients of the quantizer's paper."""
  del spec, layer
  return quantized


def _learned_value_bwd(spec, layer, gradient):
  found = spec._learned.gradient(layer, gradient, *spec._blocks)
  return found, jnp.zeros_like(gradient)


_learned_value.defvjp(
  lambda spec, layer, quantized: (quantized, layer), _learned_value_bwd
)


def make_rules(
  rules: Sequence[tuple[str, str]], specs: Mapping[str, Mapping[str, Any]]
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
    `[E, K, N]` for experts, or a matrix that was quantized after training
    (`composed.Quantized`); what its quantizer learns; its bias.
  """
  found = {}
  for keys, leaf in jax.tree_util.tree_leaves_with_path(
    params, is_leaf=composed.is_quantized
  ):
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
