"""A tile of a packed product on Hopper GPUs: what one program computes.

See `gpu` for the arithmetic. A tile of sums is `[N, M]`, because weights are
the left operand of the tensor cores, the one that may come from registers.
"""

from collections.abc import Callable
import functools
from typing import NamedTuple

import jax
from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import packing

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


class Plan(NamedTuple):
  """How programs multiply.

  Attributes:
    multiply: (first, x, w, store, format): the tile of outputs of the grid's
      'n', counted from `first` on, and 'm', given to `store` with where it
      belongs: (sums, warpgroup, row of x, row of w).
    warpgroups: that multiply; several have one more, which reads.
    tile_M: rows of x.
  """

  multiply: Callable[..., None]
  warpgroups: int
  tile_M: int

  @property
  def tile_N(self) -> int:
    """Columns of the weights."""
    return self.warpgroups * ROWS_N

  def call(self, body, out_type, grid, name: str, interpret: object | None):
    """A kernel of such programs; `body` takes `y_smem`, for `store`."""
    (dtype,) = {one.dtype for one in out_type}
    several = self.warpgroups > 1
    return plgpu.kernel(
      body,
      out_type=out_type,
      scratch_types={
        'y_smem': plgpu.SMEM(
          (self.warpgroups, min(CHUNK, self.tile_M), ROWS_N),
          dtype,
          transforms=_transforms(dtype),
        )
      },
      grid=grid,
      grid_names=('n', 'm'),
      num_threads=self.warpgroups + 1 if several else None,
      thread_name='warpgroup' if several else None,
      compiler_params=plgpu.CompilerParams(
        lowering_semantics=plgpu.LoweringSemantics.Warpgroup
      ),
      interpret=interpret,
      kernel_name=name,
    )


def plan(rows: int) -> Plan:
  """How some rows of x are multiplied."""
  if rows <= DECODE_ROWS:
    multiply, warpgroups = _decode, 1
    tile_M = _between(8, DECODE_ROWS, rows)
  else:
    multiply, warpgroups = _prefill, WARPGROUPS
    tile_M = _between(*PREFILL_ROWS, rows)
  return Plan(functools.partial(multiply, tile_M=tile_M), warpgroups, tile_M)


def _between(least: int, most: int, rows: int) -> int:
  """The power of two that holds some rows."""
  return min(most, max(least, pl.next_power_of_2(rows)))


def sum_dtype(dtype: jax.typing.DTypeLike) -> jax.typing.DTypeLike:
  """The type of sums of products with x of a type."""
  return jnp.int32 if dtype == jnp.int8 else jnp.float32


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


def store(
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
