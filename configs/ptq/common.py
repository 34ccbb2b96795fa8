r"""The fields of every quantization after training, with units and reasons.

A method's file (`configs/ptq/tacq.py`, ...) starts from `base(algorithm)`, adds
the method's own fields in `config.method` and changes what it changes:

  python scripts/quantize.py --config=configs/ptq/gptq.py --model=runs/fp \
      --out=models/gptq --config.method.bits=3 --config.calibration.length=512
"""

from ml_collections import ConfigDict


def base(algorithm: str) -> ConfigDict:
  """What all methods share; unlocked, for a method's file.

  Args:
    algorithm: the method's stem, the name of its module in `qat/ptq`.
  """
  config = ConfigDict()
  # 'rtn', 'splitquant', 'gptq', 'spqr', 'slim_llm' and 'billm' give codes;
  # 'omniquant' learns them; 'smoothquant', 'dbellquant' and 'tacq' prepare the
  # model for one of them.
  config.algorithm = algorithm
  config.method = ConfigDict()  # The fields of the algorithm's `Options`.
  # What gives the codes; the algorithm itself where it does.
  config.quantizer = algorithm
  config.quantizer_options = ConfigDict()  # Its fields; empty: in `method`.
  config.corrupt = ConfigDict()  # Of TaCQ alone: how its copy is quantized.

  # Regex of the whole paths of the matrices: all of the blocks. Embedding,
  # norms and head stay as they are, as in all papers here.
  config.layers = r'block_\d+/(attn|ffn)/.*'
  # Of the inputs of these layers, for each token: 'none', 'int8', 'int6',
  # 'int4', and with a zero point 'int8_asym', ... Calibration runs with it too,
  # as DBellQuant's code does.
  config.activation = 'none'
  # A block's layers in the order q k v, o, gate up, down, each on the inputs
  # that the quantized ones before it give, as TaCQ's and GPTQ's scripts do.
  # False: all on those of the block before anything of it is quantized, which
  # runs the block once rather than four times.
  config.true_sequential = True
  # Calibrate methods that need no data, too, to report errors of outputs.
  config.output_errors = False

  calibration = config.calibration = ConfigDict()
  # A JSON Lines file of texts, taken whole in random order until `sequences`
  # times `length` tokens; '': windows of a data set (--dataset).
  calibration.prompts = ''
  calibration.field = 'text'  # Of a line's object: the text.
  calibration.sequences = 128  # All papers here take 128 x 2048.
  calibration.length = 2048  # Tokens of a window.
  calibration.seed = 0  # Of the choice of windows, texts and kept inputs.
  calibration.batch_size = 4  # Sequences that a block takes at once.
  # Inputs of a layer that are kept as they are, for methods that look at its
  # outputs (SliM-LLM); 0: none.
  calibration.rows = 0
  # Examples that a block takes at once while TaCQ's gradients are taken; the
  # hidden states of so many before every block are on the host.
  calibration.gradient_batch = 4

  evaluation = config.eval = ConfigDict()
  evaluation.batches = 0  # Of validation, before and after; 0: all of it.
  evaluation.batch_size = 4  # Sequences.
  evaluation.length = 0  # Tokens of a sequence; 0: the model's data.seq_len.
  return config
