"""Norms, and linear layers that find their quantization rule by path."""

from collections.abc import Sequence
import functools
import math

import flax.linen as nn
import jax
from jax import numpy as jnp
from ml_collections import FrozenConfigDict

from qat.nn import stacked
from qat.quant import composed
from qat.quant import dot
from qat.quant import operand as operand_lib
from qat.quant import packed
from qat.quant import rules as rules_lib


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x: jax.Array, gain_D: jax.Array, eps: float) -> jax.Array:
  """x / sqrt(mean(x^2) + eps) * gain over the last axis, in float32.

  Keeps only `x` and `gain_D` until the backward pass.

  Args:
    x: float, `[..., D]`.
    gain_D: float, `[D]`.
    eps: added to the mean square.

  Returns:
    An array of the shape and dtype of `x`.
  """
  return _rms_norm_fwd(x, gain_D, eps)[0]


def _inverse_rms(x: jax.Array, eps: float) -> jax.Array:
  return jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + eps)


def _rms_norm_fwd(x, gain_D, eps):
  x32 = x.astype(jnp.float32)
  y = x32 * _inverse_rms(x32, eps) * _last_axis(gain_D, x.ndim)
  return y.astype(x.dtype), (x, gain_D)


def _rms_norm_bwd(eps, residuals, dy):
  x, gain_D = residuals
  dx_MD, dgain_D = jax.lax.platform_dependent(
    x.reshape(-1, x.shape[-1]).astype(jnp.float32),
    gain_D.astype(jnp.float32),
    dy.reshape(-1, x.shape[-1]).astype(jnp.float32),
    cpu=functools.partial(_rms_norm_gradients_on_cpu, eps),
    default=functools.partial(_rms_norm_gradients, eps),
  )
  return dx_MD.reshape(x.shape).astype(x.dtype), dgain_D.astype(gain_D.dtype)


def _rms_norm_gradients(eps, x_MD, gain_D, dy_MD):
  inverse_M1 = _inverse_rms(x_MD, eps)
  normed_MD = x_MD * inverse_M1
  dgain_D = jnp.sum(dy_MD * normed_MD, axis=0)
  dnormed_MD = dy_MD * gain_D[None]
  projection_M1 = jnp.mean(dnormed_MD * normed_MD, -1, keepdims=True)
  return inverse_M1 * (dnormed_MD - normed_MD * projection_M1), dgain_D


def _rms_norm_gradients_on_cpu(eps, x_MD, gain_D, dy_MD):
  """The same with the two large sums as products of one array x * dy.

  XLA:CPU reduces by a library that wants its operands in memory, the gain
  repeated for each row among them; so written, a third of the time is left.
  """
  inverse_M1 = jax.lax.optimization_barrier(_inverse_rms(x_MD, eps))
  both_MD = jax.lax.optimization_barrier(x_MD * dy_MD)
  dgain_D = (inverse_M1.reshape(1, -1) @ both_MD)[0]
  projection_M1 = jax.lax.optimization_barrier(
    (both_MD @ gain_D)[:, None] * (inverse_M1**3 / x_MD.shape[-1])
  )
  return dy_MD * gain_D[None] * inverse_M1 - x_MD * projection_M1, dgain_D


rms_norm.defvjp(_rms_norm_fwd, _rms_norm_bwd)


def _last_axis(gain_D: jax.Array, ndim: int) -> jax.Array:
  return gain_D.reshape((1,) * (ndim - 1) + gain_D.shape)


class RMSNorm(nn.Module):
  """`rms_norm` with a learnable gain that starts at 1."""

  eps: float

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    gain_D = self.param(
      'scale', nn.initializers.ones, (x.shape[-1],), jnp.float32
    )
    return rms_norm(x, gain_D, self.eps)


class LayerNorm(nn.Module):
  """(x - mean) / sqrt(variance + eps) * scale + bias, in float32."""

  eps: float

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    width = (x.shape[-1],)
    gain_D = self.param('scale', nn.initializers.ones, width, jnp.float32)
    bias_D = self.param('bias', nn.initializers.zeros, width, jnp.float32)
    y = _standardize(x.astype(jnp.float32), self.eps)
    y = y * _last_axis(gain_D, x.ndim) + _last_axis(bias_D, x.ndim)
    return y.astype(x.dtype)


def make_norm(
  config: FrozenConfigDict, name: str | None = None
) -> RMSNorm | LayerNorm:
  """The norm that a model section asks for."""
  kinds = {'rms': RMSNorm, 'layer': LayerNorm}
  return kinds[config.norm_type](config.norm_eps, name=name)


def output_std(config: FrozenConfigDict) -> float:
  """Of the initial weights of what adds to the residual stream: o and down."""
  if config.init_residual_scale:
    return config.init_std / math.sqrt(2 * config.n_layers)
  return config.init_std


class Linear(nn.Module):
  """A projection; its path decides how it is quantized.

  Attributes:
    features: N, the output width.
    rules: from layer paths to quantization specs.
    init_std: of the normal initialization.
    norm_eps: eps of a norm of its own, or None for a layer without one.
    experts: the leading size of a stack of matrices; 0 for a single one.
    bias: whether a vector is added to the product.
  """

  features: int
  rules: rules_lib.Rules
  init_std: float
  norm_eps: float | None = None
  experts: int = 0
  bias: bool = False

  @property
  def path_name(self) -> str:
    """The module path as the rules see it: 'block_0/attn/q'."""
    return stacked.one_layer('/'.join(self.path))

  @property
  def spec(self) -> rules_lib.Spec:
    """How this layer is quantized."""
    return self.rules.find(self.path_name)

  @nn.compact
  def parameters_and_input(
    self, x: jax.Array
  ) -> tuple[dict[str, jax.Array], jax.Array]:
    """The layer's own parameters, and `x`, normed if it is.

    'kernel' is the latent weight, `[K, N]` or `[E, K, N]`, and beside it stands
    what its quantizer learns, made from the kernel; or a matrix that was
    quantized after training or packed (`composed.Quantized`), which is read as
    it is. A bias is taken from the scope where it is added.
    """
    shape = (x.shape[-1], self.features)
    self._check(x.shape[-1])
    if self.experts:
      shape = (self.experts, *shape)
    kernel = self.get_variable('params', 'kernel')
    if not composed.is_quantized(kernel):
      kernel = self.param(
        'kernel', nn.initializers.normal(self.init_std), shape, jnp.float32
      )
    elif tuple(kernel.shape) != shape:
      raise ValueError(
        f'{self.path_name} has a quantized matrix of {list(kernel.shape)}; the'
        f' config says {list(shape)}.'
      )
    if self.norm_eps is not None:
      x = RMSNorm(self.norm_eps, name='norm')(x)
    layer = {'kernel': kernel}
    if self.bias:
      zeros = nn.initializers.zeros
      self.param('bias', zeros, (self.features,), jnp.float32)
    if composed.is_quantized(kernel):
      return layer, x
    for name in self.spec.parameters:
      layer[name] = self.param(
        name, lambda _, name=name: self.spec.start(kernel)[name]
      )
    return layer, x

  def _check(self, width: int) -> None:
    """Raises a ValueError that names the layer whose rule does not fit it."""
    try:
      self.spec.check_width(width)
    except ValueError as error:
      raise ValueError(f'{self.path_name}: {error}') from error
    if self.experts and self.spec.output_norm:
      raise ValueError(
        f'{self.path_name} is a stack of experts, whose outputs have no norm;'
        ' give it a rule with output_norm=False.'
      )


def operands(
  x: jax.Array,
  linears: Sequence[Linear],
  method: dot.Method,
  mix: jax.Array | None = None,
) -> list[tuple[operand_lib.Operand, operand_lib.Operand]]:
  """What several linear layers multiply with one input.

  The input is quantized once for all layers that have no norm of their own and
  quantize it alike; they share one Operand.

  Args:
    x: float, `[..., K]`.
    linears: layers that read `x`, bound to their scope.
    method: how they will be multiplied.
    mix: share of quantization while it is annealed; see `operand.make_input`.

  Returns:
    For each layer its input and its weight.
  """
  pairs, shared = [], {}
  for linear in linears:
    layer, normed = linear.parameters_and_input(x)
    make_input = functools.partial(operand_lib.make_input, mix=mix)
    if mix is None and isinstance(layer['kernel'], packed.PackedMatrix):
      make_input = functools.partial(
        operand_lib.make_packed_input, target=method.target
      )
    if linear.norm_eps is not None:
      source = make_input(normed, linear.spec)
    else:
      key = linear.spec.input_key
      if key not in shared:
        shared[key] = make_input(normed, linear.spec)
      source = shared[key]
    _record(linear, source)
    pairs.append((source, operand_lib.make_weight(layer, linear.spec, mix)))
  return pairs


def project(
  x: jax.Array,
  linears: Sequence[Linear],
  method: dot.Method,
  mix: jax.Array | None = None,
) -> list[jax.Array]:
  """Applies several linear layers to one input.

  Args:
    x: float, `[..., K]`.
    linears: layers that read `x`, bound to their scope.
    method: how to multiply.
    mix: share of quantization while it is annealed; see `operand.make_input`.

  Returns:
    For each layer float32 `[..., N]`; for a stack of experts `[..., E, N]`:
    each of its matrices applied to every token.
  """
  return products(linears, operands(x, linears, method, mix), method)


def products(
  linears: Sequence[Linear],
  pairs: Sequence[tuple[operand_lib.Operand, operand_lib.Operand]],
  method: dot.Method,
) -> list[jax.Array]:
  """What the layers give for their `operands`; as `project` returns it."""
  ys = []
  dots = dot.quantized_dots(pairs, method)
  for linear, y in zip(linears, dots, strict=True):
    if linear.bias:
      y = y + _last_axis(linear.get_variable('params', 'bias'), y.ndim)
    # Without gain and bias, as OneBit (2402.11295) ends a layer.
    ys.append(_standardize(y, 1e-5) if linear.spec.output_norm else y)
  return ys


def _standardize(y: jax.Array, eps: float) -> jax.Array:
  """Mean 0 and variance 1 along the last axis."""
  y = y - jnp.mean(y, -1, keepdims=True)
  variance = jnp.mean(jnp.square(y), -1, keepdims=True)
  return y * jax.lax.rsqrt(variance + eps)


def _record(linear: Linear, source: operand_lib.Operand) -> None:
  """Keeps what the layer multiplies, where a caller asks for 'inputs'."""
  value = source.value
  if source.quantized is not None:
    value = source.quantized.dequantize(value.dtype)
  linear.sow('inputs', 'x', value)
