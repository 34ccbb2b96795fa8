"""Packs a model for inference: every quantized matrix once, in packed bytes.

What a layer's rule makes of its latent weights in each step of training is made
once, matrix by matrix, and takes the place of the layer's 'kernel' and of what
its quantizer learned. The model is the one that was trained: its layers
multiply packed matrices where they find them (`qat.quant.packed`).

  packed      one scale, or one for each column: PackedMatrix
  quantized   scales of groups, float8, exact weights: stays a QTensor, whose
              values are computed in the layer; so does what quantization after
              training leaves and the kernels have no form for
  float       everything else
"""

from collections.abc import Iterator
import dataclasses
import functools
import pathlib
import re
from typing import Any

import jax
from jax import numpy as jnp

from pallas_kernels import dispatch
from qat.infer import load
from qat.interop import folder as folder_lib
from qat.nn import stacked
from qat.nn import transformer
from qat.quant import composed
from qat.quant import packed
from qat.quant import qtensor
from qat.quant import rules as rules_lib

FLOATS = ('float32', 'bfloat16')
# Matrices that are not quantized: those that products or the residual stream
# round. A router's stays float32, for its product is computed so.
_MATRICES = re.compile(r'(.*/)?(embedding|head|positions|kernel)')
# Of a file. Writing takes this much memory twice beside the latent weights.
SHARD_BYTES = 1 << 27


def lossless_floats(model: transformer.Transformer) -> str:
  """The smallest of FLOATS that changes nothing that the model computes."""
  c = model.config
  both = {str(c.dtype), str(c.dot_dtype)}
  return 'bfloat16' if both == {'bfloat16'} else 'float32'


def leaves(
  model: transformer.Transformer,
  params: Any,
  target: dispatch.Target,
  floats: str | None = None,
) -> Iterator[tuple[str, Any]]:
  """Path and leaf of the packed model, one by one and layer by layer.

  Under `jax.eval_shape` it computes shapes.

  Args:
    model: what the parameters belong to; may scan over its layers.
    params: its parameters; quantized matrices may be among them.
    target: where the packed model will run.
    floats: of FLOATS, for matrices that are not quantized; vectors, scalars and
      routers stay float32. None: `lossless_floats`.

  Raises:
    ValueError: no such `floats`.
  """
  floats = floats or lossless_floats(model)
  if floats not in FLOATS:
    raise ValueError(f'No floats {floats!r}; one of {list(FLOATS)}.')
  layers = rules_lib.layers(params)
  for path, leaf in folder_lib.flat(params).items():
    layer, _, name = path.rpartition('/')
    depth = model.config.n_layers if path.startswith(stacked.BLOCKS) else 0
    if layer in layers:
      spec = model.rules.find(stacked.one_layer(layer))
      if name in spec.parameters:
        continue  # It is in the packed kernel.
      if name == 'kernel' and (
        composed.is_quantized(leaf) or spec.weight != 'none'
      ):
        of_layer = {n: a for n, a in layers[layer].items() if n != 'bias'}
        for i in range(depth or 1):
          yield (
            _of_block(path, i),
            _packed(spec, target, bool(depth), of_layer, i),
          )
        continue
    matrix = _MATRICES.fullmatch(path)
    dtype = floats if matrix else jnp.float32
    for i in range(depth or 1):
      part = leaf[i] if depth else leaf
      yield _of_block(path, i), jnp.asarray(part, dtype)


def _of_block(path: str, i: int) -> str:
  """'blocks/attn/q/kernel' -> 'block_3/attn/q/kernel'; others as they are."""
  return re.sub(f'^{stacked.BLOCKS}/', f'block_{i}/', path)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _packed(
  spec: rules_lib.Spec,
  target: dispatch.Target,
  is_stack: bool,
  layer: dict[str, Any],
  i: jax.Array,
) -> composed.Quantized:
  """The quantized matrix of a layer, or of layer i of a stack, packed."""
  if is_stack:
    layer = jax.tree.map(lambda a: a[i], layer)
  kernel = layer['kernel']
  if isinstance(kernel, packed.PackedMatrix):
    return packed.repack(kernel, target)
  if not composed.is_quantized(kernel):
    kernel = spec.quantize(layer)
    if 'gain_in' in spec.parameters:
      return _of_gains(kernel, layer, target)
  if not isinstance(kernel, qtensor.QTensor):
    return kernel
  made = packed.pack(kernel, target)
  return kernel if made is None else made


def _of_gains(
  signs: qtensor.QTensor, layer: dict[str, Any], target: dispatch.Target
) -> packed.PackedMatrix:
  """OneBit: of its scale, of rank 1, one factor belongs to the inputs."""
  scale_1N = layer['gain_out'][..., None, :]
  # What is not finite shows in the output, as in training.
  finite_1N = jnp.all(jnp.isfinite(layer['kernel']), -2, keepdims=True)
  scale_1N = jnp.where(finite_1N, scale_1N, jnp.nan)
  signs = dataclasses.replace(signs, scale=scale_1N)
  return packed.pack(signs, target, layer['gain_in'])


def for_packed(
  model: transformer.Transformer, target: dispatch.Target | None
) -> transformer.Transformer:
  """The model that packed parameters belong to.

  Args:
    model: the one that was trained.
    target: where it will run; None: where this process computes.
  """
  model = transformer.changed(model, scan_layers=False, remat='none')
  method = dataclasses.replace(model.method, target=target)
  return model.clone(method=method)


def abstract(
  model: transformer.Transformer,
  params: Any,
  target: dispatch.Target,
  floats: str | None = None,
) -> dict[str, Any]:
  """Shapes and dtypes of the packed parameters; see `leaves`."""
  return jax.eval_shape(
    lambda p: folder_lib.nested(dict(leaves(model, p, target, floats))), params
  )


def pack(loaded: load.Loaded, floats: str | None = None) -> load.Loaded:
  """A model with packed parameters, to use it here.

  Args:
    loaded: the model; `load.load_model(..., by_layer=False)` takes less memory.
    floats: see `leaves`.
  """
  target = dispatch.here()
  made = leaves(loaded.model, loaded.params, target, floats)
  return loaded._replace(
    config=_by_layer(loaded.config),
    model=for_packed(loaded.model, None),
    params=folder_lib.nested(dict(made)),
    source=_source(loaded, target, floats),
  )


def save(
  out: pathlib.Path, loaded: load.Loaded, floats: str | None = None
) -> None:
  """Writes a model folder with packed parameters; see `pack`.

  A matrix is packed when it is written, so that the packed model is never in
  memory as a whole.

  Raises:
    FileExistsError: `out` holds something.
  """
  target = dispatch.here()
  folder_lib.save(
    out,
    _by_layer(loaded.config),
    leaves(loaded.model, loaded.params, target, floats),
    loaded.tokenizer,
    begin=loaded.begin,
    end=loaded.end,
    source=_source(loaded, target, floats),
    shard_bytes=SHARD_BYTES,
  )


def _by_layer(config):
  config = config.copy_and_resolve_references().unlock()
  config.model.scan_layers = False
  return config.lock()


def _source(
  loaded: load.Loaded, target: dispatch.Target, floats: str | None
) -> dict[str, Any]:
  shapes = abstract(loaded.model, loaded.params, target, floats)
  about = {
    'target': str(target),
    'floats': floats or lossless_floats(loaded.model),
    'bytes': sizes(shapes),
  }
  return {**loaded.source, load.PACKED: about}


def sizes(params: Any) -> dict[str, int]:
  """Bytes of packed parameters, by what they are.

  Args:
    params: of arrays or of shapes.

  Returns:
    By format of `packed.FORMATS` those of codes; 'scales' of packed matrices,
    'quantized' of those without a packed form, and 'float'.
  """
  found: dict[str, int] = {}
  for leaf in folder_lib.flat(params).values():
    parts = {'float': leaf}
    if isinstance(leaf, packed.PackedMatrix):
      scales = leaf.scale, leaf.shift, leaf.gain_K
      parts = {leaf.format: leaf.data, 'scales': scales}
    elif composed.is_quantized(leaf):
      parts = {'quantized': leaf}
    for kind, part in parts.items():
      more = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(part))
      found[kind] = found.get(kind, 0) + more
  return found
