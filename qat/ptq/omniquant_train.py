"""OmniQuant's training: block after block, by the error of its output.

Two streams of hidden states pass the blocks: what the model in full precision
passes on, and what the part that is quantized already does. A block's grids and
transformations are trained to map the second stream to the first's outputs,
then both streams go on. What a block has learned is a part of the store.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import functools
from typing import Any

import jax
from jax import numpy as jnp
import numpy as np
import optax

from qat.nn import transformer
from qat.ptq import calibrate
from qat.ptq import job as job_lib
from qat.ptq import omniquant
from qat.ptq import omniquant_transforms as transforms
from qat.quant import blocks

_ADAM = optax.scale_by_adam()  # AdamW's moments; the decay is 0.


@dataclasses.dataclass(frozen=True)
class Setup:
  """What the training of all blocks shares; hashable.

  Attributes:
    options: of the method.
    readers: which layers read which norm.
    heads: of attention.
  """

  options: omniquant.Options
  readers: transforms.Readers
  heads: transforms.Heads

  def fold(self, params: Mapping, learned: Mapping) -> dict[str, Any]:
    """The parameters of a block with what it learned folded in, in float."""
    return transforms.fold(params, learned, self.readers, self.heads)

  def fake_quantized(self, params: Mapping, learned: Mapping) -> dict[str, Any]:
    """The transformed parameters with rounded matrices, differentiable."""
    params = self.fold(params, learned)
    for name in _layers(learned):
      w_KN, clip = calibrate.kernel(params, name), omniquant.clip(learned, name)
      rounded_KN = omniquant.fake_quantize(w_KN, clip, self.options)
      params = calibrate.with_kernel(params, name, rounded_KN)
    return params


def _layers(learned: Mapping) -> tuple[str, ...]:
  """The layers of a block that are quantized."""
  ends = sorted(name for name in learned if name.endswith('/high'))
  return tuple(name.removesuffix('/high') for name in ends)


def learn(job: job_lib.Job) -> dict[str, list[float]]:
  """Trains all blocks that have layers to quantize; sets `job.learned`.

  Returns:
    Block -> its mean loss in each epoch.

  Raises:
    ValueError: a loss, or an input, is not finite.
  """
  parts = {block: f'learned-{block}' for block in job.plan.layers}
  options = job.plan.options
  missing = [b for b in job.plan.layers if not job.store.has(parts[b])]
  made = setup_of(job)
  streams = Streams(job) if missing else None
  losses = {}
  for block in job.blocks:
    params = job.block(block) if streams else None
    if streams:
      streams.pass_clean(params, keep=block in missing)
    if block in missing:
      learned, found = _train_block(job, streams, made, params, block)
      job.store.save(parts[block], jax.device_get(learned), found)
    elif block in parts:
      job.step(f'training, {block}', options.epochs)
    learned = {}
    if block in parts:
      learned, losses[block] = job.store.load(parts[block])
    if missing and block == missing[-1]:
      streams = None
    if streams:
      streams.pass_quantized(quantized(made, params, learned))

  def load(block: str) -> dict[str, np.ndarray]:
    return job.store.load(parts[block])[0] if block in parts else {}

  job.learned = job_lib.Learned(load, made.fold)
  return losses


def setup_of(job: job_lib.Job) -> Setup:
  """What the training of a job's blocks shares."""
  c = job.config.model
  heads = transforms.Heads(
    queries=c.n_heads,
    keys=c.n_kv_heads,
    width=c.d_model // c.n_heads,
    rotary=c.positions == 'rotary',
  )
  readers = tuple((g.norm, g.layers) for g in job.plan.groups if g.norm)
  return Setup(job.plan.options, readers, heads)


def quantized(
  setup: Setup, params: Mapping, learned: Mapping
) -> dict[str, Any]:
  """A block's parameters with the values of its quantized matrices."""
  params = setup.fold(params, learned)
  for name in _layers(learned):
    w_KN, clip = calibrate.kernel(params, name), omniquant.clip(learned, name)
    leaf = omniquant.quantize(w_KN, clip, setup.options)
    params = calibrate.with_kernel(params, name, leaf.dequantize())
  return params


def with_clips(params: Mapping, learned: Mapping) -> dict[str, Any]:
  """A block's parameters in the formats 'lwc2', ... of `quant.learned`.

  Args:
    params: of the block, in float, with its transformations folded in.
    learned: what the block has learned; nothing if it is not quantized.
  """
  params = dict(params)
  for name in _layers(learned):
    part, layer = name.split('/')
    high, low = map(blocks.merge, omniquant.clip(learned, name))
    clipped = {**params[part][layer], 'clip_high': high, 'clip_low': low}
    params[part] = {**params[part], layer: clipped}
  return params


class Streams:
  """Hidden states of all sequences before some block, batch by batch, on hosts.

  Attributes:
    block: the block whose inputs are quantized, if they are.
    states: what it reads, `[B, T, D]`.
    weights: `[B, T]`, 0 on padding.
    targets: what the block in full precision gives, for training.
    ranges: layer -> what it reads in the clean model, where that is needed.
  """

  def __init__(self, job: job_lib.Job):
    """Embeds the calibration sequences of a job."""
    options, top = job.plan.options, calibrate.outside(job.params)
    build = functools.partial(
      transformer.build, platform=jax.default_backend(), devices=1
    )
    model = build(job.config)
    self._clean_block = calibrate.one_block(model, job.params)
    self.block = calibrate.one_block(build(job.plan.config), job.params)
    batches = list(job.examples.batches(options.batch_size))
    self.weights = [jnp.asarray(weights_BT) for _, weights_BT in batches]
    self._clean = [
      np.asarray(calibrate.embed(model, top, tokens)) for tokens, _ in batches
    ]
    self.states = list(self._clean)
    self.targets: list[tuple[jax.Array, ...]] = []
    self.ranges: dict[str, transforms.Range] = {}
    self._options = options
    firsts = [layers[0] for _, layers in setup_of(job).readers]
    self._read = (*firsts, 'attn/o') if options.let else ()

  def pass_clean(self, params: Mapping, keep: bool) -> None:
    """Moves the clean stream on; keeps what training needs, if asked."""
    block = self._clean_block
    if keep and self._read:
      found = [
        _ranges(block, self._read, params, x_BTD, weights_BT)
        for x_BTD, weights_BT in zip(self._clean, self.weights, strict=True)
      ]
      self.ranges = {name: _joined(found, name) for name in self._read}
    self._clean = _passed(block, params, self._clean)
    self.targets = []
    if keep:
      self.targets = [(y_BTD,) for y_BTD in self._clean]
    if keep and self._options.aug_loss:
      own = _passed(block, params, self.states)
      both = zip(self.targets, own, strict=True)
      self.targets = [(*targets, y_BTD) for targets, y_BTD in both]

  def pass_quantized(self, params: Mapping) -> None:
    """Moves the quantized stream on."""
    self.states = _passed(self.block, params, self.states)


def _passed(
  block: calibrate.OneBlock, params: Mapping, states: Sequence[np.ndarray]
) -> list[np.ndarray]:
  """Hidden states after a block, each on the host before the next."""
  return [np.asarray(forward(block, params, x_BTD)) for x_BTD in states]


def _train_block(
  job: job_lib.Job,
  streams: Streams,
  setup: Setup,
  params: Mapping,
  block: str,
) -> tuple[dict[str, jax.Array], list[float]]:
  options, learned = setup.options, {}
  for name in job.plan.layers[block]:
    shape = calibrate.kernel(params, name).shape
    learned |= omniquant.start(name, shape, options)
  if options.let:
    learned |= transforms.start(
      params, streams.ranges, setup.readers, setup.heads, options
    )
  _check_finite(learned, f'What {block} reads is')
  moments, losses = _ADAM.init(learned), []
  for epoch in range(options.epochs):
    found = []
    for x_BTD, weights_BT, targets in zip(
      streams.states, streams.weights, streams.targets, strict=True
    ):
      learned, moments, now = step(
        streams.block,
        setup,
        params,
        learned,
        moments,
        (x_BTD, weights_BT, targets),
      )
      found.append(now)
    losses.append(float(np.mean(jax.device_get(found))))
    _check_finite((losses[-1], learned), f'In epoch {epoch + 1} {block} is')
    job.step(f'training, {block}, epoch {epoch + 1}')
  return learned, losses


def _check_finite(tree: Any, what: str) -> None:
  if not all(
    bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(tree)
  ):
    raise ValueError(
      f'{what} not finite (NaN or infinite). Look at the parameters of the'
      ' model, or lower config.method.lwc_lr and config.method.let_lr.'
    )


def loss(
  block: calibrate.OneBlock,
  setup: Setup,
  params: Mapping,
  learned: Mapping[str, jax.Array],
  batch: tuple[jax.Array, jax.Array, tuple[jax.Array, ...]],
) -> jax.Array:
  """The sum over targets of the mean squared error of a block's outputs.

  Args:
    block: the model's, with inputs quantized as in the result.
    setup: of the training.
    params: of the block, in full precision.
    learned: u and l of its matrices, and its transformations.
    batch: what it reads `[B, T, D]`; weights `[B, T]`, 0 on padding; targets.
  """
  x_BTD, weights_BT, targets = batch
  folded = setup.fake_quantized(params, learned)
  y_BTD = _apply(block, folded, x_BTD).astype(jnp.float32)
  weights_BT1 = weights_BT[..., None]
  count = jnp.maximum(jnp.sum(weights_BT), 1) * y_BTD.shape[-1]
  total = jnp.zeros((), jnp.float32)
  for target_BTD in targets:
    error_BTD = y_BTD - target_BTD.astype(jnp.float32)
    total += jnp.sum(weights_BT1 * jnp.square(error_BTD)) / count
  return total


@functools.partial(jax.jit, static_argnums=(0, 1))
def step(
  block: calibrate.OneBlock,
  setup: Setup,
  params: Mapping,
  learned: dict[str, jax.Array],
  moments: Any,
  batch: tuple[jax.Array, jax.Array, tuple[jax.Array, ...]],
) -> tuple[dict[str, jax.Array], Any, jax.Array]:
  """One step of AdamW without decay; arguments as of `loss`.

  Returns:
    What is learned, the moments, and the loss before the step.
  """
  value, slopes = jax.value_and_grad(loss, argnums=3)(
    block, setup, params, learned, batch
  )
  moves, moments = _ADAM.update(slopes, moments)
  options = setup.options
  rates = {True: options.lwc_lr, False: options.let_lr}
  learned = {
    name: old - rates[name.endswith(('/high', '/low'))] * moves[name]
    for name, old in learned.items()
  }
  return transforms.away_from_zero(learned), moments, value


def _apply(block, params, x_BTD):
  return block.apply({'params': {'block_0': params}}, x_BTD)


forward = jax.jit(_apply, static_argnums=0)  # (block, params, x_BTD) -> y_BTD


@functools.partial(jax.jit, static_argnums=(0, 1))
def _ranges(block, names, params, x_BTD, weights_BT):
  """Name -> the range of what a layer of the block reads of a batch."""
  _, sown = block.apply(
    {'params': {'block_0': params}}, x_BTD, mutable=['inputs']
  )
  found = {}
  for name in names:
    part, layer = name.split('/')
    (x_BTK,) = sown['inputs']['block_0'][part][layer]['x']
    there_BT1 = weights_BT[..., None] > 0
    x_BTK = x_BTK.astype(jnp.float32)
    most_K = jnp.max(x_BTK, (0, 1), where=there_BT1, initial=-jnp.inf)
    least_K = jnp.min(x_BTK, (0, 1), where=there_BT1, initial=jnp.inf)
    found[name] = transforms.Range(
      jnp.maximum(jnp.abs(most_K), jnp.abs(least_K)), (most_K + least_K) / 2
    )
  return found


def _joined(found: list[dict], name: str) -> transforms.Range:
  """The range over batches."""
  absmax_SK, middle_SK = (
    jnp.stack(parts)
    for parts in zip(*(one[name] for one in found), strict=True)
  )
  return transforms.Range(jnp.max(absmax_SK, 0), jnp.mean(middle_SK, 0))
