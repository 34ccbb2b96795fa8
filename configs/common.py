"""The fields every run has: their defaults, their units and their reasons.

A method's file (`configs/pquant.py`, ...) starts from `base(size)` and changes
what the method changes. Nothing in the framework supplies a default of its own:
what is not here is not configurable.
"""

from ml_collections import ConfigDict

# D_model, heads, layers, D_FF of the baselines and the branch width r.
# 300m to 2.6b: pQuant (arXiv 2602.22592) tables 1 and 4. The paper prints no
# depth and no head count for 2.6B; 26 layers and 30 heads reproduce the size.
SIZES = {
  'tiny': dict(d_model=192, n_heads=3, n_layers=4, d_ff=512, branch=32),
  'small': dict(d_model=288, n_heads=6, n_layers=6, d_ff=768, branch=64),
  '300m': dict(d_model=1024, n_heads=16, n_layers=24, d_ff=2400, branch=128),
  '700m': dict(d_model=1536, n_heads=24, n_layers=24, d_ff=4096, branch=256),
  '1.3b': dict(d_model=2048, n_heads=32, n_layers=24, d_ff=5460, branch=384),
  '2.6b': dict(d_model=2880, n_heads=30, n_layers=26, d_ff=7680, branch=512),
}

PAPER_SIZES = ('300m', '700m', '1.3b', '2.6b')


def check_size(size: str) -> str:
  """Returns `size`, or raises a ValueError that lists the sizes there are."""
  if size not in SIZES:
    raise ValueError(f'No size {size!r}; choose one of {", ".join(SIZES)}.')
  return size


def base(size: str) -> ConfigDict:
  """A full-precision LLaMA-style run of `size`; unlocked, for a method's file.

  Args:
    size: a key of `SIZES`.

  Returns:
    The ConfigDict. A method's file changes it and calls `.lock()`.
  """
  shape = SIZES[check_size(size)]
  paper = size in PAPER_SIZES
  config = ConfigDict()
  config.name = f'run-{size}'  # Names the run in logs and in the report.
  config.seed = 0  # Of the parameters and of the order of the data.

  model = config.model = ConfigDict()
  model.vocab_size = {'tiny': 2048, 'small': 8192}.get(size, 32_000)  # Tokens.
  model.d_model = shape['d_model']  # Width of the residual stream.
  model.n_layers = shape['n_layers']  # Decoder blocks.
  model.n_heads = shape['n_heads']  # Query heads; must divide d_model.
  model.n_kv_heads = shape['n_heads']  # Fewer: grouped-query attention.
  model.d_ff = shape['d_ff']  # Hidden width of the gated feed-forward layer.
  # Of the gate: 'silu', 'gelu', 'relu', 'relu2'; pQuant does not name its own.
  model.activation = 'silu'
  model.norm = 'pre'  # 'pre': once before a sub-layer; 'inside': each linear.
  model.norm_shared = True  # Linears that read one input share its norm.
  model.norm_eps = 1e-6  # Added to the mean square.
  model.norm_type = 'rms'  # 'rms', or 'layer': LayerNorm, with a bias.
  # Of the linears: 'none', 'qkv' (Qwen2.5's queries, keys and values), 'all'.
  model.bias = 'none'
  model.positions = 'rotary'  # 'rotary', or 'learned': a table, as OPT's.
  model.max_positions = 0  # Tokens of the longest sequence; 0: no limit.
  model.rope_theta = 10_000.0  # Base of the rotary wavelengths.
  # How wavelengths are stretched for sequences longer than those of
  # pretraining: 'none', or 'llama3' (LLaMA 3.1 and later).
  model.rope_scaling = ConfigDict(
    dict(
      kind='none',
      factor=8.0,  # Wavelengths beyond the long one: times this.
      low_freq_factor=1.0,  # The long wavelength: original_positions over it.
      high_freq_factor=4.0,  # The short one, below which nothing changes.
      original_positions=8192,  # Tokens that pretraining began with.
    )
  )
  model.tied_embeddings = True  # The output head is the embedding, transposed.
  model.init_std = 0.02  # Normal; also the embedding's.
  model.init_residual_scale = True  # Output projections / sqrt(2 n_layers).
  # 'gated', 'decoupled' (pQuant's two branches), or 'plain' (no gate; OPT).
  model.ffn = 'gated'
  # The fields of the decoupled layer; a 'gated' layer has none of them.
  model.branch_width = shape['branch']  # r: hidden width of a narrow branch.
  model.branch_multiple = 128 if paper else 1  # r must be a multiple of this.
  model.n_experts = 1  # N narrow branches; more than 1 adds a router.
  model.experts_per_token = 1  # k: branches that a token meets; 1 or 2.
  # Alpha and beta, learnable scalars; without them both are 1 and fixed.
  model.feature_scaling = True
  model.alpha_init = 2.0  # Learnable scale of the narrow branch (section 3.2).
  model.beta_init = 0.2  # Learnable scale of the wide branch (section 3.2).
  model.gate_probability = True  # Multiply the routed output by its p.
  model.router_init_std = 0.02  # Normal.
  model.router_jitter = 0.0  # The router's input in training: times 1 +- this.
  # An expert takes at most so many times its even share of a device's tokens;
  # the rest get nothing from it. 0: it takes all that choose it.
  model.capacity_factor = 0.0
  model.balance_coef = 0.0  # Of a Switch-style load-balancing loss; 0: none.
  # How it is computed; none of these changes the function beyond rounding.
  model.dtype = 'bfloat16' if paper else 'float32'  # Stream, elementwise.
  model.dot_dtype = 'bfloat16'  # Of matrix products' inputs that stay float.
  # Of codes: 'int8', 'native' (int8 by the C++ extension, on a CPU), 'float',
  # or whichever is fastest here.
  model.quantized_dot = 'auto'
  # Of the experts: 'grouped' computes those that are chosen, 'dense' (the slow
  # reference) all of them; 'auto' is 'grouped'.
  model.expert_form = 'auto'
  # Rows that 'grouped' multiplies by one matrix; fewer pad less.
  model.expert_tile = 128 if paper else 64
  # 'blocked', 'looped', 'xla', 'cudnn', or what fits here.
  model.attention = 'auto'
  # What a block keeps of its forward pass until the backward pass. 'none': all
  # that is read again. 'dots': its input, attention's output, what products of
  # floats return; element-wise work and products of int8 codes are done again.
  # 'block': its input alone.
  model.remat = 'block' if paper else 'none'
  # One block is compiled and a loop runs it over all layers, whose parameters
  # are stacked; rules may then not tell layers apart.
  model.scan_layers = paper
  model.loss_chunk = 64  # Positions of a sequence whose logits live at once.

  # Where a run begins: with fresh parameters, or with those of a model folder
  # or of another run's workdir, whose model section then takes this one's place
  # (but for how it is computed).
  init = config.init = ConfigDict()
  init.model = ''  # A path; '': fresh parameters.
  init.quant = False  # Its quant.rules and quant.specs, too.

  quant = config.quant = ConfigDict()
  quant.rules = (('.*', 'full'),)  # (regex of a linear's path, spec); first.
  quant.specs = ConfigDict({'full': full_precision()})
  # Training may begin in full precision, or with a growing share of
  # quantization: lambda * quantized + (1 - lambda) * float, of weights and of
  # inputs alike. Evaluation and generation are always fully quantized.
  anneal = quant.anneal = ConfigDict()
  anneal.shape = 'none'  # Of lambda: 'none' (always 1), 'linear', 'cosine'.
  anneal.start_step = 0  # Until here lambda is 0.
  anneal.steps = 0  # Steps in which it rises to 1; 0: it jumps.

  optim = config.optim = ConfigDict()
  # Of the gradient: 'backprop', or without a backward pass 'spsa' (two losses
  # a direction) and 'forward' (a slope a direction); see config.zo.
  optim.estimator = 'backprop'
  optim.optimizer = 'adamw'  # 'adamw', or 'sgd': no state, no moments.
  optim.peak_lr = 1e-3  # At the end of the warm-up.
  optim.schedule = 'cosine'  # 'two_phase', 'cosine', 'wsd' or 'constant'.
  optim.warmup_steps = 500 if paper else 50  # Optimizer steps, linear from 0.
  optim.final_lr_ratio = 0.1  # Of peak_lr, at the end of 'cosine' and 'wsd'.
  optim.decay_fraction = 0.2  # Share of the run that 'wsd' decays over.
  optim.second_peak_ratio = 2 / 3  # Of peak_lr: the line of phase two.
  optim.switch_fraction = 0.5  # Share of the run in phase one.
  optim.weight_decay = 0.1  # Decoupled; times the learning rate.
  optim.second_weight_decay = 0.1  # In phase two of 'two_phase'.
  # Regex of undecayed parameters.
  optim.no_decay = r'.*(norm|alpha|beta|bias).*'
  optim.b1 = 0.9  # Decay of the first moment.
  optim.b2 = 0.95  # Decay of the second moment.
  optim.eps = 1e-8  # Added to the root of the second moment.
  # What quantizers learn beside the kernels (LSQ, ParetoQ, OneBit, learned
  # clipping): undecayed. Regex.
  optim.scales = r'.*/(learned_scale|gain_in|gain_out|clip_high|clip_low)'
  optim.scale_lr_ratio = 1.0  # Their learning rate, of the others'.
  optim.clip_norm = 1.0  # Global gradient norm; 0: no clipping.
  optim.accumulate = 1  # Micro-batches summed into one optimizer step.

  # Of the estimators 'spsa' and 'forward'; ZeroQAT's values.
  zo = config.zo = ConfigDict()
  zo.eps = 1e-3  # How far parameters move to both sides, times N(0, 1).
  zo.directions = 1  # q, whose estimates are averaged.
  zo.clip = 0.2  # Slopes are clipped to +-clip / eps; 0: no clipping.
  zo.perturbed = r'.*'  # Regex of the parameters that are trained.
  # Of what quantizers learn (optim.scales): how far it moves along directions
  # of its own, for another 2 q forward passes a step. 0: none; it is trained
  # where zo.perturbed covers it, as all else. ZeroQAT's code has 0.01.
  zo.quantizer_eps = 0.0
  zo.quantizer_lr = 1e-3  # Their peak learning rate; that of ZeroQAT's code.
  # A power of two, of which parameters are multiples, so that a step can be
  # undone bit for bit; 0: none.
  zo.resolution = 0.0
  # Of what is trained, and of frozen kernels, embedding, head; or 'bfloat16',
  # to which steps are rounded at random.
  zo.master = 'float32'

  data = config.data = ConfigDict()
  # 'austen' is the embedded corpus, prepared on first use; else a folder made
  # by scripts/prepare_data.py.
  data.dataset = 'austen'
  data.cache_dir = 'data'  # Where the embedded corpus is prepared.
  data.seq_len = 2048 if paper else (512 if size == 'small' else 256)  # Tokens.
  data.batch_size = 512 if paper else 16  # Sequences in an optimizer step.
  data.workers = 0  # Loader processes; 0 reads in threads of this one.
  data.threads = 2  # Reader threads per loader process.
  data.timeout_s = 600.0  # A batch that takes longer ends the run.
  # What begins a text for the finished model, and a prompt: 'end', the token
  # that ends a text, which stands before every document of the training; or
  # 'tokenizer', what the tokenizer puts there (LLaMA's `<s>`; nothing for
  # SmolLM2), as before a model of others.
  data.begin = 'end'
  # Fine-tuning on the continuations of a zero-shot task: its file, or the
  # folder of it (docs/evaluation.md). '': windows of the data set.
  data.task = ''
  data.task_train = 1000  # Documents to train on; these three are MeZO's.
  data.task_dev = 500  # Documents to evaluate every eval.every steps.
  data.task_test = 1000  # Documents to evaluate at the end.
  data.task_seed = 0  # Of which documents these are.
  # Rows of a document in a step; data.batch_size counts rows. 1: its right
  # continuation, whose tokens are predicted. More: all its choices, of which it
  # has at most so many, and the right one is predicted by a softmax over their
  # mean log-probabilities, as MeZO trains classification.
  data.task_choices = 1

  train = config.train = ConfigDict()
  train.steps = {'tiny': 400, 'small': 1250}.get(size, 100_000)  # Optimizer's.
  train.log_every = 100 if paper else 10  # Steps between lines of the log.
  train.health_every = 500 if paper else 20  # Steps between low-bit health.
  train.timeout_s = 3600.0  # Compiling, or a step, that takes longer: an end.

  evaluation = config.eval = ConfigDict()
  evaluation.every = 1000 if paper else 100  # Steps; also once at the end.
  evaluation.batch_size = 64 if paper else 16  # Sequences.
  evaluation.batches = 0  # At most so many; 0: the whole validation split.

  checkpoint = config.checkpoint = ConfigDict()
  checkpoint.every = 1000 if paper else 100  # Steps; also once at the end.
  checkpoint.keep_last = 3  # Newest checkpoints kept.
  checkpoint.keep_every = 10_000 if paper else 0  # Also multiples; 0: none.
  checkpoint.timeout_s = 1200.0  # A save that takes longer ends the run.

  sensitivity = config.sensitivity = ConfigDict()
  sensitivity.every = 5000 if paper else 0  # Steps; 0: only at the end.
  sensitivity.sequences = 8  # Of the training split, to calibrate; 0: no study.
  sensitivity.damping = 0.01  # Of the Gram matrix's mean diagonal, added to it.

  sample = config.sample = ConfigDict()
  sample.prompts = ('It is a truth', 'She was')  # Continued at the end.
  sample.tokens = 64  # New tokens of a sample.
  sample.temperature = 0.8  # 0: greedy.
  sample.top_k = 40  # Candidates; 0: all.
  sample.top_p = 0.95  # Probability mass of the candidates; 1: all.

  mesh = config.mesh = ConfigDict()
  mesh.data = -1  # Devices that share parameters; -1: all that are left.
  mesh.fsdp = 1  # Devices that parameters and optimizer state are split over.
  return config


def full_precision() -> ConfigDict:
  """A linear layer that is not quantized."""
  return spec('none', 'none')


def spec(
  weight: str,
  activation: str,
  granularity: str = 'tensor',
  *,
  activation_granularity: str = 'token',
  group_size: int = 64,
  kept_share: float = 0.08,
  output_norm: bool = False,
) -> ConfigDict:
  """How one kind of linear layer is quantized.

  Args:
    weight: format of the weights. 'none' (16 bits); 'binary'; 'ternary';
      'int2', 'int3', 'int4', 'int8', and with a zero point 'int2_asym', ...;
      'fp8' (e4m3); 'binary_mix' (binary, apart from the largest weights);
      with learned scales 'lsq3', 'lsq4', 'paretoq1', 'paretoq_ternary',
      'paretoq2', 'onebit' (granularity 'channel'); with learned clipping
      'lwc2', 'lwc3', 'lwc4', 'lwc6', 'lwc8' ('channel' or 'group').
    activation: format of the inputs: 'none', 'int8', 'int6', 'int4',
      and with a zero point 'int8_asym', ...
    granularity: weights that share a scale: 'tensor', 'channel' (output), or
      'group' (of an output's inputs).
    activation_granularity: inputs that share a scale: 'tensor' (the whole
      batch), 'token' or 'group' (of a token's inputs).
    group_size: inputs in a group; must divide a layer's inputs.
    kept_share: share of the weights that 'binary_mix' keeps in 16 bits.
    output_norm: a LayerNorm without parameters after the product, as OneBit's.

  Returns:
    The ConfigDict; `qat.quant.rules.Spec` has the same fields.
  """
  return ConfigDict(
    dict(
      weight=weight,
      activation=activation,
      granularity=granularity,
      activation_granularity=activation_granularity,
      group_size=group_size,
      kept_share=kept_share,
      output_norm=output_norm,
    )
  )
