"""Packed products on Hopper GPUs, in Mosaic GPU: weights stay where they are.

The tensor cores multiply int8, and a byte of packed weights, with all but one
plane masked away, is an int8 number: the index of that plane times base^b. So a
plane costs one AND for four weights and no shift. Only the highest plane holds
the sign bit; it is flipped first, which makes

  byte of plane b = base^b * index,               b < top
  byte of the top = base^top * (index - base / 2)

The powers of the base are undone in the sums, exactly, because every term has
the factor:

- Few tokens ('decode'): each plane has sums of its own, which are shifted and
  added at the end. The weights are read once.
- More tokens ('prefill'): planes follow each other from the highest on, and
  between two of them the sums are shifted (Horner's rule). Registers then hold
  one tile of sums, as large as for int8 weights; the bytes of a tile are read
  once for each plane, mostly from the cache.

With S the sum of index * x, what was subtracted is added again with `low`:

  x @ codes = step * S + low * rowsum(x)

Weights are the left operand, for they come from registers; so a tile of sums is
[N, M] and is turned when it is stored.
"""

from collections.abc import Sequence
import functools

import jax
from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import dispatch
from pallas_kernels import packing

UNIT = 8  # A matrix in memory has a multiple of these rows.
BLOCK = 128  # Bytes of a block: the widest swizzle of shared memory.
ROWS_N = 64  # Columns of the weights that a warpgroup multiplies at once.
DECODE_ROWS = 32  # Rows of x up to which planes have sums of their own.
WARPGROUPS = 2  # That multiply, then.
PREFILL_ROWS = 64, 256  # Fewest and most rows of a tile above that.
CHUNK = 64  # Rows of x that are scaled and stored at once.
# Bytes of shared memory for tiles on their way: of 227 KiB, which several
# programs share when tokens are few.
DECODE_BYTES, PREFILL_BYTES = 64 << 10, 160 << 10
MOST_STAGES = 6


def packed_matmul(
  x_MK: jax.Array,
  packed: packing.Packed,
  x_scale_M1: jax.Array,
  out_dtype: jax.typing.DTypeLike,
  target: dispatch.Target,
  interpret: object | None = None,
) -> jax.Array:
  """See `api.packed_matmul`.

  Args:
    x_MK: int8 or bfloat16.
    packed: of '1bit', '2bit', 'int4' or 'int8', with K last and blocks of 128.
    x_scale_M1: float32.
    out_dtype: of what is returned.
    target: a GPU of `dispatch.TABLE`; they all run the same.
    interpret: parameters of Pallas's interpreter of GPUs; None: compile.
  """
  del target
  return products(
    *(x_MK, [packed], x_scale_M1, out_dtype, interpret),
    name=f'packed_matmul_{packed.format}',
  )[0]


def products(
  x_MK: jax.Array,
  matrices: Sequence[packing.Packed],
  x_scale_M1: jax.Array,
  out_dtype: jax.typing.DTypeLike,
  interpret: object | None,
  name: str,
) -> list[jax.Array]:
  """x times each of some matrices with the same K, by one kernel."""
  rows = x_MK.shape[0]
  if rows <= DECODE_ROWS:
    multiply, warpgroups = _decode, 1
    tile_M = _between(8, DECODE_ROWS, rows)
  else:
    multiply, warpgroups = _prefill, WARPGROUPS
    tile_M = _between(*PREFILL_ROWS, rows)
  tile_N = warpgroups * ROWS_N
  tiles = [pl.cdiv(packed.outputs, tile_N) for packed in matrices]
  padded_M = pl.cdiv(rows, tile_M) * tile_M
  widest = max(packed.padded_inputs for packed in matrices)
  x_MK = jnp.pad(x_MK, ((0, -rows % UNIT), (0, widest - x_MK.shape[1])))
  operands = []
  for packed, count in zip(matrices, tiles, strict=True):
    scale_N = jnp.broadcast_to(packed.scale[0], (packed.outputs,))
    low_M = _low(x_MK[:, : packed.padded_inputs], packed)
    operands += [
      jnp.pad(packed.data, ((0, -packed.data.shape[0] % UNIT), (0, 0))),
      _filled(low_M, padded_M),
      _filled(scale_N, count * tile_N),
    ]
  y = plgpu.kernel(
    functools.partial(
      _kernel,
      multiply=functools.partial(multiply, tile_M=tile_M),
      formats=[packed.format for packed in matrices],
      tiles=tiles,
    ),
    out_type=[
      jax.ShapeDtypeStruct((padded_M, count * tile_N), out_dtype)
      for count in tiles
    ],
    scratch_types={
      'y_smem': plgpu.SMEM(
        (warpgroups, min(CHUNK, tile_M), ROWS_N),
        out_dtype,
        transforms=_transforms(out_dtype),
      )
    },
    grid=(sum(tiles), padded_M // tile_M),
    grid_names=('n', 'm'),
    num_threads=None if warpgroups == 1 else warpgroups + 1,
    thread_name=None if warpgroups == 1 else 'warpgroup',
    compiler_params=plgpu.CompilerParams(
      lowering_semantics=plgpu.LoweringSemantics.Warpgroup
    ),
    interpret=interpret,
    kernel_name=name,
  )(x_MK, _filled(x_scale_M1[:, 0], padded_M), *operands)
  return [
    y_MN[:rows, : packed.outputs]
    for y_MN, packed in zip(y, matrices, strict=True)
  ]


def _low(x_MK: jax.Array, packed: packing.Packed) -> jax.Array:
  """What is added to step * sums, `[M]`."""
  planes, base, step, low = packing.FORMATS[packed.format]
  kind = sum_dtype(x_MK.dtype)
  if planes == 1:
    return jnp.zeros(x_MK.shape[:1], kind)
  x_MnbL = x_MK.reshape(x_MK.shape[0], -1, planes, packed.block)
  x_Mb = jnp.sum(x_MnbL, (1, 3), dtype=kind)
  return low * x_Mb.sum(1) + step * (base // 2) * x_Mb[:, -1]


def _between(least: int, most: int, rows: int) -> int:
  """The power of two that holds some rows."""
  return min(most, max(least, pl.next_power_of_2(rows)))


def _filled(a_N: jax.Array, size: int) -> jax.Array:
  """With zeros up to a size."""
  return jnp.pad(a_N, (0, size - a_N.shape[0]))


def sum_dtype(dtype: jax.typing.DTypeLike) -> jax.typing.DTypeLike:
  """The type of sums of products with x of a type."""
  return jnp.int32 if dtype == jnp.int8 else jnp.float32


def _kernel(x_gmem, x_scale_M, *refs, y_smem, multiply, formats, tiles):
  """A tile of the outputs of one of the matrices."""
  n, first = lax.axis_index('n'), 0
  for i, (format, count) in enumerate(zip(formats, tiles, strict=True)):
    w_gmem, low_M, w_scale_N = refs[3 * i : 3 * i + 3]
    y_gmem = refs[3 * len(formats) + i]
    store = functools.partial(
      *(_store, low_M, x_scale_M, w_scale_N, y_gmem, y_smem, format)
    )
    run = functools.partial(multiply, first, x_gmem, w_gmem, store, format)
    if len(formats) == 1:
      run()
    else:
      pl.when((n >= first) & (n < first + count))(run)
    first += count


def _decode(first, x_gmem, w_gmem, store, format, tile_M):
  """A tile of outputs for few tokens, by one warpgroup."""
  planes, base, _, _ = packing.FORMATS[format]
  n, m = lax.axis_index('n') - first, lax.axis_index('m')
  kind = sum_dtype(x_gmem.dtype)
  specs = [
    _spec((tile_M, planes * BLOCK), lambda k: (m, k), x_gmem.dtype),
    _spec((ROWS_N, BLOCK), lambda k: (n, k), w_gmem.dtype),
  ]

  def sums(*plane_sums):
    def step(_, x_smem, w_smem):
      for b, sum_NM in enumerate(plane_sums):
        x_ML = x_smem.at[:, pl.ds(b * BLOCK, BLOCK)]
        a = _plane(w_smem, format, jnp.int32(b), x_smem.dtype)
        plgpu.wgmma(sum_NM, a, plgpu.transpose_ref(x_ML, (1, 0)))
        # Two planes at a time: registers hold no more beside the sums.
        plgpu.wgmma_wait(1)
      plgpu.wgmma_wait(0)

    plgpu.emit_pipeline(
      step,
      grid=(w_gmem.shape[1] // BLOCK,),
      in_specs=specs,
      max_concurrent_steps=_stages(specs, x_gmem, w_gmem, DECODE_BYTES),
    )(x_gmem, w_gmem)
    total_NM = plane_sums[0][...]
    for b in range(1, planes):
      total_NM += _divided(plane_sums[b][...], b * (base.bit_length() - 1))
    return total_NM

  total_NM = pl.run_scoped(
    sums, *[plgpu.ACC((ROWS_N, tile_M), kind) for _ in range(planes)]
  )
  store(total_NM, 0, m * tile_M, n * ROWS_N)


def _prefill(first, x_gmem, w_gmem, store, format, tile_M):
  """A tile of outputs for many tokens: two warpgroups multiply, one reads."""
  planes, base, _, _ = packing.FORMATS[format]
  bits, top = base.bit_length() - 1, planes - 1
  tile_N = WARPGROUPS * ROWS_N
  n, m = lax.axis_index('n') - first, lax.axis_index('m')
  group = lax.axis_index('warpgroup')
  mine = pl.ds(group * ROWS_N, ROWS_N)
  kind = sum_dtype(x_gmem.dtype)
  specs = [
    _spec(
      (tile_M, BLOCK), lambda p, k: (m, planes * k + top - p), x_gmem.dtype
    ),
    _spec((tile_N, BLOCK), lambda p, k: (n, k), w_gmem.dtype),
  ]

  def step(indices, x_smem, w_smem, sum_NM):
    p, k = indices
    if planes > 1:

      @pl.when((k == 0) & (p > 0))
      def _():
        sum_NM[...] = _divided(sum_NM[...], bits)

    a = _plane(w_smem.at[mine], format, top - p, x_smem.dtype)
    plgpu.wgmma(sum_NM, a, plgpu.transpose_ref(x_smem, (1, 0)))
    plgpu.wgmma_wait(0)
    return sum_NM

  def compute(pipeline):
    def sums(sum_NM):
      pipeline(sum_NM)
      return sum_NM[...]

    total_NM = pl.run_scoped(sums, plgpu.ACC((ROWS_N, tile_M), kind))
    store(total_NM, group, m * tile_M, n * tile_N + group * ROWS_N)

  plgpu.emit_pipeline_warp_specialized(
    step,
    grid=(planes, w_gmem.shape[1] // BLOCK),
    in_specs=specs,
    max_concurrent_steps=_stages(specs, x_gmem, w_gmem, PREFILL_BYTES),
    wg_axis='warpgroup',
    num_compute_wgs=WARPGROUPS,
    memory_registers=40,
    compute_context=compute,
  )(x_gmem, w_gmem)


def _spec(shape, index_map, dtype) -> plgpu.BlockSpec:
  """A tile of an operand of the tensor cores."""
  return plgpu.BlockSpec(shape, index_map, transforms=_transforms(dtype))


def _transforms(dtype: jax.typing.DTypeLike) -> tuple[object, ...]:
  """The order of shared memory that tensor cores read without conflicts."""
  elements = BLOCK // jnp.dtype(dtype).itemsize
  return (
    plgpu.TilingTransform((8, elements)),
    plgpu.SwizzleTransform(BLOCK),
  )


def _stages(specs, x_gmem, w_gmem, most: int) -> int:
  """How many tiles are on their way at once."""
  size = sum(
    spec.block_shape[0] * spec.block_shape[1] * jnp.dtype(ref.dtype).itemsize
    for spec, ref in zip(specs, (x_gmem, w_gmem), strict=True)
  )
  return max(2, min(MOST_STAGES, most // size))


def _plane(w_smem, format: str, plane: jax.Array, dtype: jax.typing.DTypeLike):
  """What the tensor cores multiply x by: bytes with but one plane, or codes."""
  planes, base, _, _ = packing.FORMATS[format]
  if planes == 1:
    return w_smem if dtype == jnp.int8 else w_smem[...].astype(dtype)
  mask = (base - 1) << (plane * (base.bit_length() - 1))
  flipped = jnp.where(plane == planes - 1, -128, 0).astype(jnp.int8)
  return ((w_smem[...] ^ flipped) & mask.astype(jnp.int8)).astype(dtype)


def _divided(sum_NM: jax.Array, bits: int) -> jax.Array:
  """A sum of multiples of 2^bits, divided by it."""
  if sum_NM.dtype == jnp.int32:
    return sum_NM >> bits
  return sum_NM * jnp.float32(2.0**-bits)


def _store(
  low_M,
  x_scale_M,
  w_scale_N,
  y_gmem,
  y_smem,
  format,
  sum_NM,
  group,
  start_M,
  start_N,
):
  """Writes the products that a tile of sums stands for."""
  step = packing.FORMATS[format].step
  columns, rows = sum_NM.shape
  y_smem = y_smem.at[group]
  chunk = y_smem.shape[0]
  n = pl.ds(start_N, columns)
  for start in range(0, rows, chunk):
    m, shape = pl.ds(start_M + start, chunk), (columns, chunk)
    y_NM = step * sum_NM[:, start : start + chunk] + _spread(low_M, m, shape, 1)
    y_NM = y_NM.astype(jnp.float32) * _spread(x_scale_M, m, shape, 1)
    y_NM = (y_NM * _spread(w_scale_N, n, shape, 0)).astype(y_smem.dtype)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    turned = plgpu.transpose_ref(y_smem, (1, 0))
    turned[...] = plgpu.layout_cast(y_NM, plgpu.Layout.WGMMA_TRANSPOSED)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(y_smem, y_gmem.at[m, n])
  plgpu.wait_smem_to_gmem(0)


def _spread(ref, where, shape: tuple[int, int], axis: int) -> jax.Array:
  """Some entries of a vector in memory, along an axis of a tile of sums."""
  # Without the layout the compiler searches for one, for minutes.
  layout = plgpu.Layout.WGMMA.reduce(1 - axis)
  part = plgpu.load(ref, where, layout=layout, optimized=False)
  return lax.broadcast_in_dim(part, shape, (axis,))
