"""One quantization: what all of its steps share."""

from collections.abc import Callable
from collections.abc import Mapping
import functools
from typing import Any
from typing import NamedTuple

import jax
from jax import numpy as jnp
from ml_collections import ConfigDict
import numpy as np

from qat.nn import transformer
from qat.ptq import calibrate
from qat.ptq import dbellquant
from qat.ptq import examples as examples_lib
from qat.ptq import partial
from qat.ptq import plan as plan_lib

Show = Callable[[int, int, str], None]


class Learned(NamedTuple):
  """What training found out about the blocks.

  Attributes:
    load: block -> its arrays by name; none of a block that is not quantized.
    fold: (params, arrays) -> the parameters of a block with its transformations
      folded in.
  """

  load: Callable[[str], dict[str, np.ndarray]]
  fold: Callable[[Mapping, Mapping], dict[str, Any]]


class Job:
  """A model to quantize, how, and where finished parts stand.

  Attributes:
    config: of the model as it came.
    params: its parameters.
    ptq: a config of `configs/ptq`.
    plan: what follows from both.
    examples: the calibration sequences, or None.
    store: the finished parts.
    blocks: names of all blocks in order.
    scales: path of a norm -> what is folded into it, `[K]`; empty before they
      are found, and where none are.
  """

  def __init__(
    self,
    config: ConfigDict,
    params: Mapping[str, Any],
    ptq: ConfigDict,
    examples: examples_lib.Examples | None,
    store: partial.Store,
    show: Show,
  ):
    """Checks that all of it fits together; see `apply.quantize`."""
    self.config, self.params, self.ptq = config, params, ptq
    self.plan = plan_lib.make(config, params, ptq)
    if plan_lib.needs_examples(ptq):
      examples_lib.check(examples, config, ptq.algorithm)
    self.examples, self.store = examples, store
    self.blocks = [f'block_{i}' for i in range(config.model.n_layers)]
    self.scales: dict[str, np.ndarray] = {}
    self.learned: Learned | None = None
    count = 0 if examples is None else examples.count
    self._total = self.plan.steps(-(-count // ptq.calibration.gradient_batch))
    self._done, self._show = 0, show

  def step(self, words: str, steps: int = 1) -> None:
    """Counts finished steps, and tells of them."""
    self._done += steps
    self._show(self._done, self._total, words)

  def calibration(self, config: ConfigDict) -> calibrate.Calibration:
    """The calibration sequences before the first block.

    Args:
      config: of the model; its rules say how inputs are quantized.
    """
    c = self.ptq.calibration
    return calibrate.Calibration(
      transformer.build(config, jax.default_backend(), 1),
      self.params,
      self.examples,
      batch_size=c.batch_size,
      rows=c.rows,
      seed=c.seed,
    )

  def block(self, name: str) -> dict[str, Any]:
    """The parameters of a block in float32 on the device.

    What was found for its norms, or learned for the block, is folded in.
    """
    on_device = functools.partial(jnp.asarray, dtype=jnp.float32)
    params = jax.tree.map(on_device, dict(self.params[name]))
    for group in self.plan.groups:
      scale_K = self.scales.get(f'{name}/{group.norm}')
      if scale_K is None:
        continue
      part, norm = group.norm.split('/')
      kernels = [calibrate.kernel(params, layer) for layer in group.layers]
      gain, kernels = dbellquant.fold(params[part][norm], kernels, scale_K)
      params[part] = {**params[part], norm: gain}
      for layer, w_KN in zip(group.layers, kernels, strict=True):
        params = calibrate.with_kernel(params, layer, w_KN)
    if self.learned is not None:
      params = self.learned.fold(params, self.learned.load(name))
    return params
