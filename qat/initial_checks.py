"""Models that a run cannot start from: errors that tell the way out."""

import pathlib
from typing import Any

from ml_collections import ConfigDict

from qat import carried
from qat import config as config_lib
from qat import estimators
from qat.data import dataset as dataset_lib
from qat.infer import load
from qat.quant import composed
from qat.quant import rules as rules_lib


def check_tokenizer(
  config: ConfigDict, source: load.Loaded, dataset: dataset_lib.Dataset
) -> None:
  """Refuses data whose token ids mean something else to the model."""
  mine, its = (
    tokenizer.get_vocab(with_added_tokens=True)
    for tokenizer in (dataset.tokenizer, source.tokenizer)
  )
  if mine == its:
    return
  own = pathlib.Path(config.init.model)
  if source.dataset is not None:
    own = source.dataset.path
  end = source.tokenizer.id_to_token(source.end)
  raise error(
    config,
    f'{dataset.path} has another tokenizer ({len(mine)} tokens) than the model'
    f' ({len(its)}), so its token ids mean something else. Prepare the text'
    f' with scripts/prepare_data.py --tokenizer {own / dataset_lib.TOKENIZER}'
    f' --end-of-text {end!r}, and give the folder as config.data.dataset.',
  )


def check_rules(config: ConfigDict, source: load.Loaded) -> None:
  """Refuses to train in full precision by the rules of a model without any."""
  rules, kernels = source.model.rules, rules_lib.kernels(source.params)
  quantizes = any(
    composed.is_quantized(kernel)
    or {rules.find(path).weight, rules.find(path).activation} != {'none'}
    for path, kernel in kernels.items()
  )
  if config.init.quant and not quantizes:
    raise error(
      config,
      'config.init.quant=True takes its rules, which quantize nothing. Quantize'
      ' it first (scripts/quantize.py), or set config.init.quant=False and let'
      ' config.quant.rules say what is quantized.',
    )


def check_latent(config: ConfigDict, params: Any) -> None:
  """Refuses frozen matrices that are kept in float, to be rounded each time.

  Where no matrix is trained, but norms, say, there is nothing to be gained.

  Args:
    config: the run's config.
    params: its parameters, or their shapes, by layer.
  """
  rules = rules_lib.make_rules(config.quant.rules, config.quant.specs)
  kernels = rules_lib.kernels(params)
  trained = {
    path for path in kernels if estimators.is_trained(config, f'{path}/kernel')
  }
  latent = [
    path
    for path, kernel in kernels.items()
    if path not in trained
    and not composed.is_quantized(kernel)
    and rules.find(path).weight != 'none'
  ]
  if trained and latent:
    raise config_lib.ConfigError(
      f'config.zo.perturbed={config.zo.perturbed!r} trains {len(trained)} of'
      f' {len(kernels)} matrices, and {latent[0]} is not among them: it would'
      ' stay in float and be quantized again in every pass. Start from a model'
      ' in which it is quantized for good (scripts/quantize.py with'
      ' --config.latent=False and --config.layers), as config.init.model with'
      ' config.init.quant=True, or train it, too.'
    )


def check_frozen(config: ConfigDict, described: carried.Description) -> None:
  """Refuses an estimator that would train all there is."""
  if config.optim.estimator == 'backprop':
    raise error(
      config,
      f'{min(described)} was quantized after training, and has no gradient.'
      ' Start from a float model, or train the other parameters with'
      " config.optim.estimator='spsa' (config.zo).",
    )


def error(config: ConfigDict, text: str) -> config_lib.ConfigError:
  """An error that names the model."""
  return config_lib.ConfigError(
    f'config.init.model={config.init.model!r}: {text}'
  )
