"""What a file keeps of a quantized matrix: as few bits as its values need.

Codes of b bits lie in b bit planes, eight weights a byte; ternary codes five to
a byte; float8 codes as they are. Scales and zero points are float16 where that
changes none of them, else float32; zero points that are integers take as many
bits as the largest needs. Those that have codes themselves are bit planes, too,
and two numbers for each group of codes. Of `exact`, what is not 0 is kept: 16
bits of value and 16 bits of distance from the one before, row by row. A
PackedMatrix is kept as it is, in the layout of the device that it was made for.

`unpack(*pack(leaf))` is the leaf, bit for bit. All of it is NumPy on the host.
"""

from collections.abc import Mapping
from typing import Any

from jax import numpy as jnp
import numpy as np

from qat.quant import bitplanes
from qat.quant import composed
from qat.quant import packed as packed_lib
from qat.quant import qtensor
from qat.quant import sparse

Arrays = dict[str, np.ndarray]
Meta = dict[str, Any]

_EXACT = {'bfloat16': jnp.bfloat16, 'float16': np.float16}
_PACKED = ('data', 'scale', 'shift', 'gain_K')
_WHOLE = {'int8': np.int8, 'float32': np.float32}


def pack(leaf: composed.Quantized) -> tuple[Arrays, Meta]:
  """A quantized matrix as arrays for a file and what tells how to read them.

  Args:
    leaf: any of `composed.KINDS`, of JAX or NumPy arrays.

  Returns:
    The arrays by name, and a dict that JSON can hold.

  Raises:
    ValueError: a code does not belong to the leaf's alphabet.
  """
  arrays: Arrays = {}
  meta: Meta = {'kind': type(leaf).__name__, 'shape': list(leaf.shape)}
  match leaf:
    case composed.Sum():
      meta['parts'] = []
      for i, part in enumerate(leaf.parts):
        inner, inner_meta = pack(part)
        arrays |= {f'{i}.{name}': a for name, a in inner.items()}
        meta['parts'].append(inner_meta)
    case qtensor.QTensor() | composed.TwoLevel():
      _pack_qtensor(leaf, arrays, meta)
    case composed.Clustered():
      meta['alphabet'] = leaf.alphabet
      meta['cluster_bits'] = (leaf.scale.shape[0] - 1).bit_length()
      arrays['codes'] = _pack_codes(np.asarray(leaf.codes), leaf.alphabet)
      cluster = np.asarray(leaf.cluster).view(np.uint8)
      bitplanes.check_below(cluster, leaf.scale.shape[0], 'a cluster')
      arrays['cluster'] = bitplanes.planes(cluster, meta['cluster_bits'])
      _pack_numbers('scale', leaf.scale, arrays, meta)
      _pack_numbers('zero', leaf.zero, arrays, meta)
    case composed.MixedBits():
      _pack_mixed(leaf, arrays, meta)
    case composed.Binarized():
      meta['block_size'] = leaf.block_size
      for name in ('signs', 'second'):
        codes = np.asarray(getattr(leaf, name))
        arrays[name] = _pack_codes(codes, 'binary')
      arrays['salient_K'] = bitplanes.planes(
        np.asarray(leaf.salient_K).view(np.uint8), 1
      )
      _pack_numbers('levels', leaf.levels, arrays, meta)
    case packed_lib.PackedMatrix():
      for name in ('format', 'axis', 'block'):
        meta[name] = getattr(leaf, name)
      parts = {name: getattr(leaf, name) for name in _PACKED}
      arrays |= {n: np.asarray(a) for n, a in parts.items() if a is not None}
    case _:
      raise ValueError(f'{type(leaf).__name__} is no quantized matrix.')
  return arrays, meta


def unpack(
  arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]
) -> composed.Quantized:
  """The leaf that was packed, of NumPy arrays.

  Args:
    arrays: of `pack`, or as a file gave them back.
    meta: of `pack`.

  Raises:
    ValueError: the arrays and `meta` do not belong together.
  """
  kind, shape = meta['kind'], tuple(meta['shape'])
  if kind == 'Sum':
    return composed.Sum(
      tuple(
        unpack(
          {
            name.removeprefix(f'{i}.'): a
            for name, a in arrays.items()
            if name.startswith(f'{i}.')
          },
          part,
        )
        for i, part in enumerate(meta['parts'])
      )
    )
  if kind in ('QTensor', 'TwoLevel'):
    return _unpack_qtensor(arrays, meta, shape)
  if kind == 'Clustered':
    cluster = bitplanes.unplane(arrays['cluster'], meta['cluster_bits'], shape)
    scale = _unpack_numbers('scale', arrays, meta)
    bitplanes.check_below(cluster, scale.shape[0], 'a cluster')
    return composed.Clustered(
      _unpack_codes(arrays['codes'], meta['alphabet'], shape),
      cluster.view(np.int8),
      scale,
      _unpack_numbers('zero', arrays, meta),
      meta['alphabet'],
    )
  if kind == 'MixedBits':
    return _unpack_mixed(arrays, meta, shape)
  if kind == 'Binarized':
    return composed.Binarized(
      _unpack_codes(arrays['signs'], 'binary', shape),
      _unpack_codes(arrays['second'], 'binary', shape),
      bitplanes.unplane(arrays['salient_K'], 1, shape[:1]).view(bool),
      _unpack_numbers('levels', arrays, meta),
      meta['block_size'],
    )
  if kind == 'PackedMatrix':
    leaf = packed_lib.PackedMatrix(
      *map(arrays.get, _PACKED),
      *(meta['format'], *shape[-2:], meta['axis'], meta['block']),
    )
    packed_lib.check(leaf)
    return leaf
  raise ValueError(f'No kind of quantized matrix is called {kind!r}.')


def stored_bits(leaf: composed.Quantized) -> int:
  """The bits that a file keeps of a leaf, all of its arrays together."""
  return bits(pack(leaf)[0])


def bits(arrays: Arrays) -> int:
  """`stored_bits` of what `pack` has made of a leaf."""
  return 8 * sum(a.nbytes for a in arrays.values())


# ----------------------------------------------------------- codes of alphabets


def _levels(alphabet: str) -> tuple[int, int, int]:
  """The lowest code, the distance of neighbours, and how many there are."""
  values = qtensor.ALPHABETS[alphabet]
  return int(values[0]), int(values[1] - values[0]), len(values)


def _bits(alphabet: str) -> int:
  return (_levels(alphabet)[2] - 1).bit_length()


def _pack_codes(codes: np.ndarray, alphabet: str) -> np.ndarray:
  if alphabet == 'fp8':
    return codes.view(np.uint8)
  low, step, count = _levels(alphabet)
  index = codes.view(np.uint8) - np.uint8(low % 256)
  if step == 2:
    if np.any(index & 1):
      raise ValueError(f'A code lies between those of {alphabet!r}.')
    index >>= 1
  bitplanes.check_below(
    index, count, f'a code of {alphabet!r}, from the lowest on,'
  )
  return (
    bitplanes.trits(index)
    if count == 3
    else bitplanes.planes(index, _bits(alphabet))
  )


def _unpack_codes(
  packed: np.ndarray, alphabet: str, shape: tuple[int, ...]
) -> np.ndarray:
  if alphabet not in qtensor.ALPHABETS:
    raise ValueError(
      f'No alphabet {alphabet!r}; there are {list(qtensor.ALPHABETS)}.'
    )
  if alphabet == 'fp8':
    bitplanes.check_array(packed, shape)
    return packed.view(jnp.float8_e4m3fn)
  low, step, count = _levels(alphabet)
  if count == 3:
    index = bitplanes.untrit(packed, shape)
  else:
    index = bitplanes.unplane(packed, _bits(alphabet), shape)
  index *= np.uint8(step)
  index += np.uint8(low % 256)
  return index.view(np.int8)


# ------------------------------------------------------ scales and zero points


def _same_bits(a: np.ndarray, b: np.ndarray) -> bool:
  return np.array_equal(a.view(np.uint8), b.view(np.uint8))


def _pack_numbers(name: str, values, arrays: Arrays, meta: Meta) -> None:
  """Levels, int8 or float32, in the smallest form that loses nothing."""
  if isinstance(values, composed.Levels):
    codes, bits = np.asarray(values.codes), values.bits
    bitplanes.check_below(codes, 2**bits, f'a code of {name}')
    arrays[name] = bitplanes.planes(codes, bits)
    meta[name] = {'levels': bits, 'shape': list(codes.shape)}
    _pack_numbers(f'{name}.base', values.base, arrays, meta)
    _pack_numbers(f'{name}.step', values.step, arrays, meta)
    return
  values = np.ascontiguousarray(values)
  if values.dtype.name not in _WHOLE:
    raise ValueError(f'{name} is {values.dtype}; want one of {list(_WHOLE)}.')
  with np.errstate(over='ignore', invalid='ignore'):
    whole = values.astype(np.int8)
    half = values.astype(np.float16)
  if values.size and _same_bits(whole.astype(values.dtype), values):
    low, high = int(whole.min()), int(whole.max())
    bits = 1 + max(high, ~low, 0).bit_length()
    arrays[name] = bitplanes.planes(whole.view(np.uint8), bits)
    meta[name] = [bits, values.dtype.name, list(values.shape)]
  elif _same_bits(half.astype(np.float32), values):
    arrays[name] = half
  else:
    arrays[name] = values


def _unpack_numbers(
  name: str, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]
) -> np.ndarray | composed.Levels:
  if name not in meta:
    return np.asarray(arrays[name], np.float32)
  if isinstance(meta[name], Mapping):
    bits, shape = meta[name]['levels'], tuple(meta[name]['shape'])
    codes = bitplanes.unplane(arrays[name], bits, shape)
    base, step = (
      _unpack_numbers(f'{name}.{part}', arrays, meta)
      for part in ('base', 'step')
    )
    return composed.Levels(codes, base, step, bits)
  bits, dtype, shape = meta[name]
  return bitplanes.signed(
    bitplanes.unplane(arrays[name], bits, tuple(shape)), bits
  ).astype(_WHOLE[dtype])


# -------------------------------------------------------------- kinds of leaves


def _pack_qtensor(
  leaf: qtensor.QTensor | composed.TwoLevel, arrays: Arrays, meta: Meta
) -> None:
  codes, alphabet = np.asarray(leaf.codes), leaf.alphabet
  meta['alphabet'] = alphabet
  exact = None if leaf.exact is None else np.ascontiguousarray(leaf.exact)
  if exact is not None:
    meta['exact'] = exact.dtype.name
    bits = exact.view(np.uint16).reshape(-1)
    kept = np.flatnonzero(bits)
    arrays['exact'], arrays['distance'] = sparse.pack(bits, kept)
    if alphabet == 'binary_mix' and np.array_equal(
      kept, np.flatnonzero(codes == 0)
    ):  # The positions of the exact weights tell which codes are 0.
      codes, alphabet = np.where(codes == 0, np.int8(-1), codes), 'binary'
  meta['stored_as'] = alphabet
  arrays['codes'] = _pack_codes(codes, alphabet)
  _pack_numbers('scale', leaf.scale, arrays, meta)
  if leaf.zero is not None:
    _pack_numbers('zero', leaf.zero, arrays, meta)


def _unpack_qtensor(arrays, meta, shape) -> qtensor.QTensor | composed.TwoLevel:
  codes = _unpack_codes(arrays['codes'], meta['stored_as'], shape)
  exact = None
  if 'exact' in meta:
    bits = sparse.unpack(arrays['exact'], arrays['distance'], shape)
    if meta['stored_as'] != meta['alphabet']:
      codes[bits != 0] = 0
    exact = bits.view(_EXACT[meta['exact']])
  zero = None
  if 'zero' in arrays:
    zero = _unpack_numbers('zero', arrays, meta)
  scale = _unpack_numbers('scale', arrays, meta)
  two = meta['kind'] == 'TwoLevel'
  kind = composed.TwoLevel if two else qtensor.QTensor
  return kind(codes, scale, meta['alphabet'], zero, exact)


def _mixed(leaf_bits_G, group_size: int, inputs: int):
  """For each number of bits: it, its groups and its inputs, as masks."""
  bits_G = np.asarray(leaf_bits_G)
  bits_K = np.repeat(bits_G, group_size)[:inputs]
  for bits in map(int, np.unique(bits_G)):
    if not 1 <= bits <= 8:
      raise ValueError(f'A group of {bits} bits; want 1 to 8.')
    yield bits, bits_G == bits, bits_K == bits


def _pack_mixed(leaf: composed.MixedBits, arrays: Arrays, meta: Meta) -> None:
  codes = np.asarray(leaf.codes)
  arrays['bits_G'] = np.asarray(leaf.bits_G)
  meta['group_size'] = leaf.group_size
  for bits, of_G, of_K in _mixed(leaf.bits_G, leaf.group_size, codes.shape[0]):
    index = codes[of_K].view(np.uint8) & np.uint8(2**bits - 1)
    if not np.array_equal(_mixed_codes(index, bits), codes[of_K]):
      raise ValueError(f'A code of a group of {bits} bits needs more.')
    arrays[f'codes{bits}'] = bitplanes.planes(index, bits)
    for name in ('scale', 'zero'):
      values = np.asarray(getattr(leaf, name))[of_G]
      _pack_numbers(f'{name}{bits}', values, arrays, meta)


def _unpack_mixed(arrays, meta, shape) -> composed.MixedBits:
  bits_G, size = arrays['bits_G'], meta['group_size']
  codes = np.zeros(shape, np.int8)
  scale, zero = np.zeros((2, bits_G.size, *shape[1:]), np.float32)
  for bits, of_G, of_K in _mixed(bits_G, size, shape[0]):
    part = (int(of_K.sum()), *shape[1:])
    index = bitplanes.unplane(arrays[f'codes{bits}'], bits, part)
    codes[of_K] = _mixed_codes(index, bits)
    scale[of_G] = _unpack_numbers(f'scale{bits}', arrays, meta)
    zero[of_G] = _unpack_numbers(f'zero{bits}', arrays, meta)
  return composed.MixedBits(codes, scale, zero, bits_G, size)


def _mixed_codes(index: np.ndarray, bits: int) -> np.ndarray:
  """Codes of a group: two's complement, but 0 and 1 of one bit."""
  return index.view(np.int8) if bits == 1 else bitplanes.signed(index, bits)
