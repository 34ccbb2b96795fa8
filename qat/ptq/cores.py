"""What gives the codes of a matrix, by the name that a config has for it."""

from collections.abc import Callable
import functools
from types import ModuleType
from typing import Any
from typing import NamedTuple

import jax
from jax import numpy as jnp
import numpy as np

from qat.ptq import billm
from qat.ptq import gptq
from qat.ptq import hessian
from qat.ptq import omniquant
from qat.ptq import rtn
from qat.ptq import slim_llm
from qat.ptq import splitquant
from qat.ptq import spqr
from qat.ptq import statistics as statistics_lib
from qat.quant import composed

# From the matrix alone, from it and the statistics of its inputs, or from it
# and what was learned about it on its block.
DATA_FREE: dict[str, ModuleType] = {'rtn': rtn, 'splitquant': splitquant}
CALIBRATED: dict[str, ModuleType] = {
  'gptq': gptq,
  'spqr': spqr,
  'slim_llm': slim_llm,
  'billm': billm,
}
LEARNED: dict[str, ModuleType] = {'omniquant': omniquant}
QUANTIZERS = {**DATA_FREE, **CALIBRATED, **LEARNED}


class Core(NamedTuple):
  """How the codes of a matrix are found.

  Attributes:
    prepare: from the statistics of an input, or None, to what `quantize` takes
      for every layer that reads it; of `LEARNED`, that is what was learned.
    quantize: (w_KN, what was prepared, which weights to keep or None) -> the
      quantized matrix.
    check: raises a ValueError for a matrix, given as its shape, that the
      options do not fit.
    bias: what becomes of a layer's bias.
  """

  prepare: Callable[[statistics_lib.Statistics | None], Any]
  quantize: Callable[..., composed.Quantized]
  check: Callable[[tuple[int, int]], None]
  bias: Callable[[np.ndarray], np.ndarray]


def make(quantizer: str, options: Any) -> Core:
  """The core of a quantizer.

  Args:
    quantizer: a key of `QUANTIZERS`.
    options: its Options.
  """
  module = QUANTIZERS[quantizer]

  def prepare(statistics: statistics_lib.Statistics | None) -> Any:
    # One factorization for all layers that read an input.
    if quantizer in ('gptq', 'spqr'):
      return hessian.factor(statistics, options.percdamp, options.act_order)
    if quantizer == 'billm':
      return hessian.factor(statistics, options.percdamp)
    return statistics

  def quantize(w_KN: jax.Array, prepared: Any, keep_KN: jax.Array | None):
    if quantizer in DATA_FREE:
      return module.quantize(w_KN, options)
    if keep_KN is None:
      return module.quantize(w_KN, prepared, options)
    return module.quantize(w_KN, prepared, options, keep_KN)

  def bias(b_N: np.ndarray) -> np.ndarray:
    if quantizer == 'splitquant':
      return splitquant.quantize_bias(b_N, options)
    return b_N

  check = functools.partial(_CHECKS[quantizer], options)
  return Core(prepare, quantize, check, bias)


def check_shape(core: Core, path: str, shape: tuple[int, int]) -> None:
  """Raises a ValueError that names the layer, where options do not fit it."""
  try:
    core.check(shape)
  except ValueError as error:
    raise ValueError(f'{path}, {shape[0]} x {shape[1]}: {error}') from error


def _trace_rtn(options: rtn.Options, shape: tuple[int, int]) -> None:
  w_KN = jax.ShapeDtypeStruct(shape, jnp.float32)
  jax.eval_shape(functools.partial(rtn.quantize, options=options), w_KN)


# (options, shape of a matrix); raises a ValueError where they do not fit.
_CHECKS: dict[str, Callable[[Any, tuple[int, int]], None]] = {
  'rtn': _trace_rtn,
  'splitquant': lambda options, _: splitquant.check(options),
  'gptq': lambda options, shape: gptq.check(options, shape[0]),
  'spqr': spqr.check,
  'slim_llm': lambda options, _: slim_llm.check(options),
  'billm': billm.check,
  'omniquant': omniquant.check,
}
