r"""ZeroQAT (arXiv 2509.00031): training of a quantized model by forward passes.

The whole path, from somebody's model to numbers before and after:

  python scripts/import_model.py HuggingFaceTB/SmolLM2-135M --out models/smollm2
  python scripts/prepare_data.py wiki.jsonl --out data/wiki \
      --tokenizer models/smollm2/tokenizer.json
  python scripts/quantize.py --config=configs/ptq/omniquant.py:zeroqat-w4a4 \
      --model=models/smollm2 --dataset=data/wiki --out=models/zeroqat-w4a4
  python -m qat.main --config=configs/zeroqat.py:w4a4 \
      --config.init.model=models/zeroqat-w4a4 --config.data.dataset=data/wiki \
      --workdir=runs/zeroqat-w4a4
  python scripts/evaluate.py --model models/zeroqat-w4a4 --text wiki.test.txt
  python scripts/evaluate.py --model runs/zeroqat-w4a4 --text wiki.test.txt

Fine-tuning on a task, whose right choices are predicted; for those of another
task than BoolQ set data.task_choices, and data.batch_size to rows of as many:

  python -m qat.main --config=configs/zeroqat.py:w4a4,task \
      --config.init.model=models/zeroqat-w4a4 --config.data.dataset=data/wiki \
      --config.data.task=tasks/boolq/rc_0shot --workdir=runs/boolq
  python scripts/evaluate.py --model models/zeroqat-w4a4 --task-run runs/boolq
  python scripts/evaluate.py --model runs/boolq --task-run runs/boolq

The lightweight variant: all matrices of the blocks are quantized for good and
stay packed, apart from those of queries and values, which are trained.

  python scripts/quantize.py --config=configs/ptq/omniquant.py:zeroqat-w2a16 \
      --config.latent=False --config.layers='block_\d+/(attn/(k|o)|ffn/.*)' \
      --config.method.group_size=64 \
      --model=models/smollm2 --dataset=data/wiki --out=models/zeroqat-light
  python -m qat.main --config=configs/zeroqat.py:w2a16,light,task \
      --config.init.model=models/zeroqat-light ...

(Groups of 128, the paper's, do not divide SmolLM2-135M's width of 576.)

Clipping trained along, as the paper writes: 'w4a4,joint'.

The baseline of first order, the same quantizers trained by backpropagation with
straight-through gradients: 'w4a4,ste'. A size or a shape behind it all, as in
'w4a4,1.3b' or 'w2a16,llama-13b', begins with fresh parameters, for
scripts/compile_check.py. docs/methods/zeroqat.md has more.
"""

from typing import Any

from configs import common

# Of weights and inputs. The rates and distances that the authors' code notes
# for LLaMA-2-7B at W2A16 and LLaMA-1-7B otherwise; the paper's grid is rates of
# 5e-7 and 1e-8, distances of 1e-3, 5e-4 and 1e-4 (table C.1).
SETTINGS: dict[str, dict[str, Any]] = {
  'w6a6': dict(
    spec=('lwc6', 'int6_asym', 'channel'), peak_lr=5e-7, eps=5e-4, group_size=64
  ),
  'w4a4': dict(
    spec=('lwc4', 'int4_asym', 'channel'), peak_lr=5e-7, eps=5e-4, group_size=64
  ),
  'w2a16': dict(
    spec=('lwc2', 'none', 'group'), peak_lr=1e-8, eps=1e-4, group_size=128
  ),
}

# Shapes of the models that the paper trains, for compilation alone.
_OPT = dict(
  vocab_size=50_272,
  activation='relu',
  ffn='plain',
  norm_type='layer',
  bias='all',
  positions='learned',
  max_positions=2048,
)
SHAPES: dict[str, dict[str, Any]] = {
  'opt-1.3b': dict(
    d_model=2048, n_heads=32, n_kv_heads=32, n_layers=24, d_ff=8192, **_OPT
  ),
  'opt-13b': dict(
    d_model=5120, n_heads=40, n_kv_heads=40, n_layers=40, d_ff=20_480, **_OPT
  ),
  'llama-7b': dict(
    d_model=4096,
    n_heads=32,
    n_kv_heads=32,
    n_layers=32,
    d_ff=11_008,
    tied_embeddings=False,
  ),
  'llama-13b': dict(
    d_model=5120,
    n_heads=40,
    n_kv_heads=40,
    n_layers=40,
    d_ff=13_824,
    tied_embeddings=False,
  ),
}
OPTIONS = ('task', 'light', 'ste', 'joint')

# As released: matrices, embedding and head, but no norms and biases; clipping
# is trained in 'joint' alone, as the paper writes.
WEIGHTS = r'.*(kernel|embedding|head|positions)'
LIGHT = r'.*attn/(q|v)/kernel'
# The code's trainer for tasks trains norms and biases, too.
TASK = r'.*(kernel|embedding|head|positions|norm/scale|bias)'


def get_config(variant: str = 'w4a4'):
  """ZeroQAT, or what it is compared with.

  Args:
    variant: words with commas between them: one of `SETTINGS`, any of
      `OPTIONS`, and maybe a size of `common.SIZES` or one of `SHAPES`.

  Raises:
    ValueError: there is no such word, or there are two of a kind.
  """
  words = variant.split(',')
  sizes = (*common.SIZES, *SHAPES)
  for word in words:
    if word not in (*SETTINGS, *OPTIONS, *sizes):
      raise ValueError(
        f'No variant {word!r}; choose among {", ".join(SETTINGS)},'
        f' {", ".join(OPTIONS)}, and sizes: {", ".join(sizes)}.'
      )
  settings = [word for word in words if word in SETTINGS] or ['w4a4']
  shapes = [word for word in words if word in sizes]
  if len({'light', 'ste', 'joint'} & {*words}) > 1:
    raise ValueError(
      f"{variant!r}: 'ste' trains what 'light' freezes, and 'joint' is forward"
      " passes for clipping, which 'ste' has a gradient for and 'light' lacks."
    )
  if len(settings) > 1 or len(shapes) > 1:
    raise ValueError(
      f'{variant!r}: at most one of {", ".join(SETTINGS)}, at most one size.'
    )
  config = _base(shapes[0] if shapes else None)
  config.name = f'zeroqat-{variant.replace(",", "-")}'
  setting = SETTINGS[settings[0]]
  _quantization(config, setting, 'light' in words)
  source = 'light' if 'light' in words else settings[0]
  config.init.model = '' if shapes else f'models/zeroqat-{source}'
  config.init.quant = not shapes

  optim, zo = config.optim, config.zo
  optim.estimator, optim.optimizer = 'spsa', 'sgd'
  optim.schedule = 'constant'
  optim.warmup_steps = 0
  optim.peak_lr = setting['peak_lr']
  optim.weight_decay = optim.second_weight_decay = 0.0
  optim.clip_norm = 0.0  # Slopes are clipped instead, to +-0.2 / eps.
  zo.eps = setting['eps']
  zo.directions = 1
  zo.clip = 0.2
  zo.perturbed = LIGHT if 'light' in words else WEIGHTS

  data, train = config.data, config.train
  data.batch_size = 4
  data.seq_len = 2048
  # The model comes from elsewhere, and is measured before as it was there.
  data.begin = 'tokenizer'
  train.steps = 10_000
  train.log_every = 10
  train.health_every = 500
  config.eval.every = 500  # As in the authors' logs.
  config.eval.batch_size = 4
  # Both would take more memory than the training.
  config.sensitivity.sequences = 0
  config.sample.tokens = 0
  config.checkpoint.every = 500
  config.checkpoint.keep_last = 1
  if 'task' in words:
    _task(config)
    if 'light' not in words:
      zo.perturbed = TASK
  if 'joint' in words:
    zo.quantizer_eps = 0.01
  if 'ste' in words:
    _straight_through(config)
  return config.lock()


def _base(shape: str | None):
  """What runs share; the model section is that of `init.model` without one."""
  if shape in common.SIZES:
    return common.base(shape)
  config = common.base('300m' if shape else 'tiny')
  if shape:
    config.model.update(SHAPES[shape])
  else:
    # As a model folder is evaluated: the run begins with the same losses.
    config.model.dot_dtype = 'float32'
  config.model.scan_layers = True  # Deep models, compiled in seconds.
  return config


def _quantization(config, setting: dict[str, Any], light: bool) -> None:
  """Rules of a model that has none of its own yet."""
  config.quant.specs = {
    'low': common.spec(*setting['spec'], group_size=setting['group_size']),
    'full': common.full_precision(),
  }
  rules = (('.*', 'low'),)
  config.quant.rules = (('.*/attn/(q|v)', 'full'), *rules) if light else rules


def _task(config) -> None:
  """Table C.1: batch 32 or 16, 8K steps, 1e-6 or 5e-7, eps 1e-3.

  BoolQ's documents have two choices each, and its loss in MeZO is theirs. The
  code's trainer for tasks does not clip slopes.
  """
  config.zo.clip = 0.0
  config.optim.peak_lr = 1e-6
  config.zo.eps = 1e-3
  config.data.batch_size = 2 * 16  # Rows of 16 documents.
  config.data.seq_len = 512  # Tokens of a prompt; longer ones are cut.
  config.data.task = 'tasks/boolq/rc_0shot'
  config.data.task_choices = 2
  config.train.steps = 8000
  config.eval.batches = 16  # Of the data set, beside the task.


def _straight_through(config) -> None:
  """QAT of first order; the rate is ours, no paper gives one for this."""
  config.optim.estimator, config.optim.optimizer = 'backprop', 'adamw'
  config.optim.peak_lr = 1e-5
  config.optim.clip_norm = 1.0
  config.model.remat = 'block'
