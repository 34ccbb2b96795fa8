"""Which implementation of a kernel runs where: one table, read from the top.

A kernel's `api` describes a call as a `Call`; the first row of the kernel that
fits it is the fastest that can run. A name asks for one implementation and
gets it or an error that says why not.
"""

from collections.abc import Sequence
import dataclasses

import jax

from pallas_kernels import native

# What a TPU calls itself, and the short name of its generation.
TPU_KINDS = {
  'TPU v4': 'v4',
  'TPU v5 lite': 'v5e',
  'TPU v5e': 'v5e',
  'TPU v5': 'v5p',
  'TPU v5p': 'v5p',
  'TPU v6 lite': 'v6e',
  'TPU v6e': 'v6e',
  'TPU7x': 'tpu7x',
}

# The type that the matrix unit multiplies low-bit operands as. v4 and 7x have
# no int8 unit; bfloat16 holds int8 codes exactly, and the sums of a step's
# products stay below 2^24, so there too sums of codes are exact.
TPU_OPERANDS = {
  'v4': 'bfloat16',
  'v5e': 'int8',
  'v5p': 'int8',
  'v6e': 'int8',
  'tpu7x': 'bfloat16',
}


@dataclasses.dataclass(frozen=True)
class Target:
  """A kind of device that programs are compiled for.

  Attributes:
    platform: 'cpu', 'gpu' or 'tpu'.
    chip: of a TPU a key of `TPU_OPERANDS`, of a GPU its compute capability
      ('9.0'), else ''.
  """

  platform: str
  chip: str = ''

  def __str__(self) -> str:
    return f'{self.platform} {self.chip}'.strip()


def here() -> Target:
  """The kind of device that this process computes on."""
  device = jax.devices()[0]
  if device.platform == 'tpu':
    chip = TPU_KINDS.get(device.device_kind, device.device_kind)
    return Target('tpu', chip)
  if device.platform == 'gpu':
    return Target('gpu', str(getattr(device, 'compute_capability', '')))
  return Target(device.platform)


@dataclasses.dataclass(frozen=True)
class Call:
  """What a choice depends on.

  Attributes:
    target: where it will run.
    dtype: of the activations, by name.
    rows: M, tokens.
    format: of packed weights (`packing.FORMATS`); '' where there are none.
    axis: of their K, -2 or -1; 0 where there are none.
    block: their L; 0 where there are none.
  """

  target: Target
  dtype: str
  rows: int
  format: str = ''
  axis: int = 0
  block: int = 0


@dataclasses.dataclass(frozen=True)
class Row:
  """What an implementation of a kernel can do; empty means anything.

  Attributes:
    kernel: its folder.
    name: of the implementation: the file in that folder.
    platform: that it runs on.
    chips: that it runs on.
    dtypes: of the activations.
    formats: of the weights.
    axis: of the weights' K.
    block: the weights' L must be a multiple of it.
    most_block: the largest L.
    native: it needs the C++ extension.
    rows: the fewest and the most tokens for which it is taken unasked.
  """

  kernel: str
  name: str
  platform: str = ''
  chips: tuple[str, ...] = ()
  dtypes: tuple[str, ...] = ()
  formats: tuple[str, ...] = ()
  axis: int = 0
  block: int = 1
  most_block: float = float('inf')
  native: bool = False
  rows: tuple[int, float] = (0, float('inf'))

  def lacks(self, call: Call) -> list[str]:
    """Why it cannot do a call; empty if it can."""
    found = []
    if self.platform not in ('', call.target.platform):
      found.append(f'it runs on {self.platform}, not on {call.target}')
    elif self.chips and call.target.chip not in self.chips:
      found.append(f'it runs on {self.chips}, not on {call.target}')
    if self.dtypes and call.dtype not in self.dtypes:
      found.append(f'activations are {call.dtype}, not of {self.dtypes}')
    if self.formats and call.format not in self.formats:
      found.append(f'weights are {call.format!r}, not of {self.formats}')
    if self.axis not in (0, call.axis):
      found.append(f'weights have axis {call.axis}, not {self.axis}')
    if call.block % self.block or call.block > self.most_block:
      found.append(f'blocks of {call.block} bytes, not of {self.block}')
    if self.native and not native.variants():
      found.append(f'the C++ extension is {native.status()}')
    return found


_TPUS = tuple(TPU_OPERANDS)
_HOPPER = ('9.0',)  # H100, H200.
_CODES = ('int8', 'bfloat16')
_BITS = ('1bit', '2bit', 'int4', 'int8')

# The fastest first. The last row of a kernel is its specification.
TABLE: tuple[Row, ...] = (
  Row(
    *('packed_matmul', 'tpu', 'tpu', _TPUS, _CODES, _BITS),
    axis=-2,
    block=128,
  ),
  Row(
    *('packed_matmul', 'gpu', 'gpu', _HOPPER, _CODES, _BITS),
    axis=-1,
    block=128,
    most_block=128,
  ),
  Row(
    *('packed_matmul', 'cpu', 'cpu'),
    dtypes=('int8',),
    formats=_BITS,
    axis=-1,
    block=64,
    most_block=64,
    native=True,
  ),
  Row('packed_matmul', 'reference'),
  Row('act_quant', 'tpu', 'tpu', _TPUS, ('bfloat16', 'float32')),
  Row('act_quant', 'gpu', 'gpu', _HOPPER, ('bfloat16', 'float32')),
  Row(
    *('act_quant', 'cpu', 'cpu'),
    dtypes=('bfloat16', 'float32'),
    native=True,
    rows=(0, 8),  # It runs on one thread.
  ),
  Row('act_quant', 'reference'),
  Row(
    *('decoupled_ffn_up', 'tpu', 'tpu', _TPUS, _CODES),
    formats=('1bit',),
    axis=-2,
    block=128,
  ),
  Row(
    *('decoupled_ffn_up', 'gpu', 'gpu', _HOPPER, _CODES),
    formats=('1bit',),
    axis=-1,
    block=128,
    most_block=128,
  ),
  Row('decoupled_ffn_up', 'reference'),
  Row(
    *('grouped_matmul', 'tpu', 'tpu', _TPUS, _CODES, _BITS),
    axis=-2,
    block=128,
  ),
  Row(
    *('grouped_matmul', 'gpu', 'gpu', _HOPPER, _CODES, _BITS),
    axis=-1,
    block=128,
    most_block=128,
  ),
  Row('grouped_matmul', 'reference'),
  Row('quantized_train_matmul', 'tpu', 'tpu', _TPUS, ('int8',)),
  Row('quantized_train_matmul', 'gpu', 'gpu', _HOPPER, ('int8',)),
  Row('quantized_train_matmul', 'reference'),
)


def choose(
  kernel: str,
  call: Call,
  implementation: str | None = None,
  table: Sequence[Row] = TABLE,
) -> str:
  """The name of the implementation to use.

  Args:
    kernel: one in the table.
    call: what it is asked for.
    implementation: None: the first row that fits, else the name of a row.
    table: of `Row`s, the fastest first.

  Raises:
    ValueError: there is no such implementation, or it cannot do this.
  """
  rows = [row for row in table if row.kernel == kernel]
  if implementation is None:
    for row in rows:
      least, most = row.rows
      if not row.lacks(call) and least <= call.rows <= most:
        return row.name
    raise ValueError(f'{kernel}: no implementation can do {call}.')
  named = [row for row in rows if row.name == implementation]
  if not named:
    names = list(dict.fromkeys(row.name for row in rows))
    raise ValueError(f'{kernel} has no {implementation!r}; one of {names}.')
  reasons = [row.lacks(call) for row in named]
  if [] not in reasons:
    text = '; or '.join(', '.join(r) for r in reasons)
    raise ValueError(f'{kernel}: {implementation!r} cannot do this: {text}.')
  return implementation


def rows_for(kernel: str, target: Target) -> list[Row]:
  """The rows of a kernel that are written for a target's platform and chip."""
  return [
    row
    for row in TABLE
    if row.kernel == kernel
    and row.platform == target.platform
    and (not row.chips or target.chip in row.chips)
  ]
