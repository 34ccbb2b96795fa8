r"""Quantizes a finished model after training.

  python scripts/quantize.py --config=configs/ptq/gptq.py --model=runs/fp \
      --out=models/gptq4 --config.calibration.length=256
  python scripts/quantize.py --config=configs/ptq/tacq.py --out=models/tacq \
      --model=models/smollm2 --dataset=data/wiki
  python scripts/quantize.py --config=configs/ptq/splitquant.py \
      --model=models/smollm2 --out=models/split4 --no-eval

A model is a run's workdir (its newest checkpoint) or a model folder
(scripts/import_model.py), of full precision. The method and its settings are a
file of configs/ptq; any field can be set, as for qat.main, and those that all
methods have are in configs/ptq/common.py. Calibration reads windows of the
training split of --dataset (of a run, by default its own), or texts:
--config.calibration.prompts=FILE.jsonl. The validation split is evaluated
before and after.

--out becomes a model folder that scripts/evaluate.py, scripts/generate.py and
scripts/export_model.py read, with report.json and report.html beside the
parameters. OmniQuant can leave the matrices in float beside what their grids
follow from (--config.latent=True), for a run that trains on from there; the
report then tells of the bits that the grids would take.

Until --out is there, what is finished stands in OUT.parts; the same command,
given again, goes on from it, with the same result.
"""

from qat import launch

if __name__ == '__main__':
  launch.one_blas_thread()
  launch.tune_malloc()

import argparse
from collections.abc import Sequence
import dataclasses
import hashlib
import json
import pathlib
import sys
from typing import Any

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
from ml_collections import ConfigDict
import numpy as np

from qat import config as config_lib
from qat import config_file
from qat import display
from qat import evaluate
from qat import manifest
from qat import windows
from qat.data import dataset as dataset_lib
from qat.data import files
from qat.data import progress
from qat.infer import load
from qat.interop import files as model_files
from qat.interop import folder
from qat.ptq import apply
from qat.ptq import examples as examples_lib
from qat.ptq import partial
from qat.ptq import plan
from qat.ptq import report


def main(arguments: Sequence[str]) -> int:
  """Runs the command line; returns the exit status."""
  options, fields = _parser().parse_known_args(arguments)
  try:
    ptq = config_file.read(options.config, fields).copy_and_resolve_references()
    made = _quantize(options, ptq)
  except (ValueError, OSError, manifest.CorruptError) as error:
    progress.note(f'Error: {display.printable(str(error))}')
    return 2
  except KeyboardInterrupt:
    progress.note('Stopped; the same command goes on from what is finished.')
    return 130
  report.table(display.console(), made)
  progress.note(f'Model: {options.out}; report: {options.out / "report.html"}')
  return 0


def _quantize(options: argparse.Namespace, ptq: ConfigDict) -> dict[str, Any]:
  """Quantizes, evaluates and saves; returns the content of report.json."""
  out = options.out
  model_files.check_new(out)
  model = load.load_model(options.model, None)
  # A walk takes its blocks from the host, one at a time.
  model = model._replace(params=jax.device_get(model.params))
  # What is wrong with the config is told before the data are read.
  plan.make(model.config, model.params, ptq)
  dataset = _dataset(options, model)
  examples = None
  if plan.needs_examples(ptq):
    examples = _examples(ptq, model, dataset)
    examples_lib.check(examples, model.config, ptq.algorithm)
  if not options.eval:
    dataset = None
  elif dataset is None:
    raise ValueError(
      f'{options.model} has no data set of its own to be evaluated on; give'
      ' --dataset, or --no-eval.'
    )
  parts = out.absolute().with_name(out.name + '.parts')
  parts.mkdir(parents=True, exist_ok=True)
  with files.lock(parts, wait=False):
    store = partial.Store(parts, _settings(model, ptq, examples))
    evaluation = {}
    if dataset is not None:
      evaluation['before'] = _stored_evaluation(store, model, ptq, dataset)
    with progress.bar(ptq.algorithm, total=1000) as bar:
      result = apply.quantize(
        model.config,
        model.params,
        ptq,
        examples,
        store,
        lambda done, total, words: bar(1000 * done // total, words),
      )
    # Until its report is there, too, it is a part like others.
    made_at = parts / 'model'
    if not made_at.exists():
      folder.save(
        made_at,
        result.config,
        result.leaves(),
        model.tokenizer,
        begin=model.begin,
        end=model.end,
        source={
          'format': 'quantized',
          'algorithm': ptq.algorithm,
          'settings': _plain(ptq),
          'calibration': examples and examples.source,
          'model': model.source,
        },
      )
    sizes = report.memory() | {
      'model_bytes': sum(file.stat().st_size for file in made_at.iterdir())
    }
    # The quantized model takes the place of the one it was made of.
    del model
    result = dataclasses.replace(result, leaves=lambda: iter(()))
    if dataset is not None:
      saved = load.load_model(made_at, None)
      evaluation['after'] = _evaluate(saved, ptq, dataset, 'after')
    made = report.make(
      result,
      ptq,
      model=str(options.model),
      examples=examples and examples.source,
      evaluation=evaluation,
      sizes=sizes,
      whole=not store.begun,
    )
    text = json.dumps(report.finite(made), indent=2, allow_nan=False) + '\n'
    for name, content in (
      ('report.json', text),
      ('report.html', report.page(made)),
    ):
      files.write(made_at / name, content.encode())
    files.rename(made_at, out)
    store.remove()
  return made


def _dataset(
  options: argparse.Namespace, model: load.Loaded
) -> dataset_lib.Dataset | None:
  if options.dataset is None:
    return model.dataset
  dataset = dataset_lib.open_dataset(options.dataset)
  if dataset.tokenizer.to_str() != model.tokenizer.to_str():
    raise ValueError(
      f'{dataset.path} has another tokenizer than {options.model}, so its token'
      ' ids mean something else. Prepare the text with the tokenizer of the'
      ' model (scripts/prepare_data.py --tokenizer).'
    )
  return dataset


def _examples(
  ptq: ConfigDict, model: load.Loaded, dataset: dataset_lib.Dataset | None
) -> examples_lib.Examples:
  c = ptq.calibration
  trained = model.config.data.seq_len
  own = model.source['format'] == 'run'
  if c.prompts:
    start = windows.start(model)
    found = examples_lib.from_prompts(
      c.prompts, c, lambda text: windows.encode(model.tokenizer, text, start)
    )
    longest = found.tokens_ST.shape[1]
    if own and longest > trained:
      raise ValueError(
        f'{c.prompts} has a text of {longest} tokens, more than the {trained}'
        ' of the sequences that the model was trained on; leave such texts out.'
      )
    return found
  if dataset is None:
    raise ValueError(
      f'config.algorithm={ptq.algorithm!r} needs text to calibrate on; give'
      ' --dataset (scripts/prepare_data.py), or --config.calibration.prompts.'
    )
  if own and c.length > trained:
    raise ValueError(
      f'config.calibration.length={c.length} is more than the {trained} tokens'
      ' of the sequences that the model was trained on; give'
      f' --config.calibration.length={trained}.'
    )
  return examples_lib.from_dataset(dataset.path, c)


def _settings(
  model: load.Loaded,
  ptq: ConfigDict,
  examples: examples_lib.Examples | None,
) -> dict[str, Any]:
  """What the finished parts depend on."""
  digest = hashlib.sha256()
  for path, leaf in folder.flat(model.params).items():
    digest.update(f'{path} {leaf.dtype} {leaf.shape}'.encode())
    digest.update(np.ascontiguousarray(leaf).data)
  return {
    'model config': json.loads(config_lib.to_json(model.config)),
    'parameters': digest.hexdigest(),
    'settings': _plain(ptq),
    'calibration tokens': examples and examples.digest,
    'device': jax.devices()[0].device_kind,
    'jax': jax.__version__,
  }


def _stored_evaluation(
  store: partial.Store,
  model: load.Loaded,
  ptq: ConfigDict,
  dataset: dataset_lib.Dataset,
) -> dict[str, float]:
  name = f'before-{dataset.digest[:16]}'
  if not store.has(name):
    store.save(name, {}, _evaluate(model, ptq, dataset, 'before'))
  return store.load(name)[1]


def _evaluate(
  model: load.Loaded,
  ptq: ConfigDict,
  dataset: dataset_lib.Dataset,
  when: str,
) -> dict[str, float]:
  params = jax.device_put(
    model.params, NamedSharding(model.mesh, PartitionSpec())
  )
  model = windows.settled(model._replace(params=params))
  config = model.config.unlock()
  config.eval.batches = ptq.eval.batches
  config.eval.batch_size = ptq.eval.batch_size
  config.data.seq_len = ptq.eval.length or config.data.seq_len
  return evaluate.evaluate(
    evaluate.make_eval_step(config, model.model, model.mesh),
    model.params,
    config,
    dataset,
    model.mesh,
    label=f'evaluation {when}',
  )


def _plain(ptq: ConfigDict) -> dict[str, Any]:
  return json.loads(json.dumps(ptq.to_dict()))


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  add = parser.add_argument
  add(
    '--config',
    required=True,
    metavar='FILE',
    help='the method: a file of configs/ptq; --config.FIELD=VALUE sets a field',
  )
  add(
    '--model',
    type=pathlib.Path,
    required=True,
    metavar='DIR',
    help='folder of a run (qat.main --workdir), or a model folder',
  )
  add(
    '--out',
    type=pathlib.Path,
    required=True,
    metavar='DIR',
    help='model folder to write; must not be there yet',
  )
  add(
    '--dataset',
    metavar='DIR',
    help="a data set (scripts/prepare_data.py) with the model's tokenizer, to"
    " calibrate on and to evaluate (default: the run's own)",
  )
  add(
    '--no-eval',
    dest='eval',
    action='store_false',
    help='do not evaluate the validation split before and after',
  )
  return parser


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
