"""Measures training steps, packed products (on CPUs), and packed models.

  python scripts/bench.py train
  python scripts/bench.py train --methods=plain,bitnet --rounds=12 --json=b.json
  python scripts/bench.py train --d-model=1024 --layers=4 --d-ff=2400 \
      --heads=16 --seq-len=512 --batch=8
  python scripts/bench.py train --size=300m --batch=8   # On an accelerator.
  python scripts/bench.py kernels
  python scripts/bench.py decode --size=300m --json=d.json --plot=d.png
  python scripts/bench.py decode --llama   # Beside llama.cpp: make bench-llama.
  python scripts/bench.py prefill --size=300m --batch=4

Every round runs one step of each variant in turn, so that a slow moment of the
machine meets all of them; ratios are taken round by round. `plain` is BitNet in
plain float32 straight-through autodiff (`qat.nn.reference`).
"""

import sys

from qat import launch

if __name__ == '__main__':
  launch.tune_malloc()

import argparse
from collections.abc import Callable
import datetime
import json
import pathlib
import statistics
import time
from typing import Any
from typing import NamedTuple

import jax
from jax import numpy as jnp
import numpy as np
import optax
from rich import console as rich_console
from rich import table as rich_table

from configs import bitnet
from configs import bitnet_b158
from configs import common
from configs import fp
from configs import pquant
from pallas_kernels import measure
from qat import benchmarks
from qat import display
from qat import flops
from qat import optim
from qat import sharding
from qat import step as step_lib
from qat.infer import llama
from qat.infer import measure as measure_models
from qat.nn import reference
from qat.nn import transformer

# A method's config, and what is changed in it.
METHODS = {
  'fp': (fp, {}),
  'int8': (bitnet, {'quant.specs.binary.weight': 'int8'}),
  'bitnet': (bitnet, {}),
  'bitnet_b158': (bitnet_b158, {}),
  'pquant': (pquant, {}),
  'pquant-8': (pquant, {'model.n_experts': 8}),
}
PLAIN = 'plain'


class Variant(NamedTuple):
  """A compiled step and where it stands."""

  name: str
  step: Callable[[Any, Any], tuple[Any, Any]]
  state: Any
  flops_per_token: float
  devices: int


def _config(module, changes: dict, args: argparse.Namespace):
  config = module.get_config(args.size).unlock()
  if args.size == 'tiny':
    config.model.update(
      d_model=args.d_model,
      n_layers=args.layers,
      d_ff=args.d_ff,
      n_heads=args.heads,
      n_kv_heads=args.heads,
      vocab_size=args.vocabulary,
      branch_width=args.branch,
    )
    config.data.seq_len = args.seq_len
  config.data.batch_size = args.batch
  config.optim.accumulate = args.accumulate
  config.model.dot_dtype = args.dot_dtype
  config.train.steps = 10_000
  config.update_from_flattened_dict(changes)
  return config.lock()


def _fast(name: str, args: argparse.Namespace) -> Variant:
  config = _config(*METHODS[name], args)
  program = step_lib.compile_program(config, sharding.make_mesh(config.mesh))
  return Variant(
    name,
    program.train_step,
    program.init(),
    flops.train_flops_per_token(config, program.abstract.params),
    program.mesh.size,
  )


def _plain(args: argparse.Namespace) -> Variant:
  config = _config(bitnet, {}, args)
  model = transformer.build(config, jax.default_backend(), 1)
  optimizer = optim.make(config.optim, config.train.steps)

  def init():
    params = model.init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
    return params['params'], optimizer.init(params['params'])

  def step(state, batch):
    params, opt_state = state
    loss, grads = jax.value_and_grad(reference.loss)(
      params, batch, config.model, model.rules
    )
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return (optax.apply_updates(params, updates), opt_state), loss

  state = jax.jit(init)()
  rows = jax.ShapeDtypeStruct(
    (config.data.batch_size, config.data.seq_len), jnp.int32
  )
  compiled = (
    jax.jit(step, donate_argnums=0)
    .lower(state, {'tokens': rows, 'targets': rows})
    .compile()
  )
  per_token = flops.train_flops_per_token(config, state[0])
  return Variant(PLAIN, compiled, state, per_token, devices=1)


def train(args: argparse.Namespace) -> dict[str, Any]:
  """Times the training steps; returns and prints what was measured."""
  console = display.console()
  variants = []
  for name in args.methods.split(','):
    with console.status(f'Compiling {name}'):
      variants.append(_plain(args) if name == PLAIN else _fast(name, args))
  config = _config(fp, {}, args)
  shape = (config.data.batch_size, config.data.seq_len)
  rng = np.random.default_rng(0)
  batch = {
    name: jnp.asarray(
      rng.integers(0, config.model.vocab_size, shape), jnp.int32
    )
    for name in ('tokens', 'targets')
  }
  states = {v.name: v.state for v in variants}
  seconds: dict[str, list[float]] = {v.name: [] for v in variants}
  for i in range(args.rounds + 1):
    with console.status(f'Round {i} of {args.rounds}'):
      for v in variants:
        start = time.perf_counter()
        states[v.name], measured = v.step(states[v.name], batch)
        jax.block_until_ready((states[v.name], measured))
        if i:  # The first is a warm-up.
          seconds[v.name].append(time.perf_counter() - start)
  peak = flops.measured_peak(seconds=1.0)
  base_name = args.base or variants[0].name
  base = seconds[base_name]
  rows = {}
  for v in variants:
    mine = seconds[v.name]
    speed = shape[0] * shape[1] / statistics.median(mine)
    ratios = [a / b for a, b in zip(base, mine, strict=True)]
    memory = v.step.memory_analysis()
    rows[v.name] = {
      'tokens_per_s': speed,
      'speedup': statistics.median(ratios),
      'speedup_min': min(ratios),
      'speedup_max': max(ratios),
      'flops_share': speed * v.flops_per_token / (peak * v.devices),
      'flops_per_s': speed * v.flops_per_token,
      'temporary_bytes': memory.temp_size_in_bytes,
      # The step gives its memory to the state it returns.
      'peak_bytes': memory.temp_size_in_bytes
      + memory.argument_size_in_bytes
      + memory.output_size_in_bytes
      - memory.alias_size_in_bytes,
    }
  result = {
    'machine': benchmarks.machine(),
    'date': datetime.date.today().isoformat(),
    'commit': benchmarks.commit(),
    'jax': jax.__version__,
    'arguments': {k: v for k, v in vars(args).items() if k != 'json'},
    'peak_flops': peak,
    'rows': rows,
  }
  _print(console, result, base_name)
  return result


def _print(console: rich_console.Console, result: dict, base: str) -> None:
  table = rich_table.Table(
    title=f'{result["machine"]}, jax {result["jax"]}, bf16 peak'
    f' {display.count(result["peak_flops"])}FLOP/s'
  )
  names = f',tokens/s,against {base},FLOP/s,of peak,temporaries,memory'
  for name in names.split(','):
    table.add_column(name, justify='right', no_wrap=True)
  for name, row in result['rows'].items():
    table.add_row(
      name,
      f'{row["tokens_per_s"]:,.0f}',
      f'{row["speedup"]:.2f} ({row["speedup_min"]:.2f} to'
      f' {row["speedup_max"]:.2f})',
      display.count(row['flops_per_s']),
      f'{row["flops_share"]:.0%}',
      f'{row["temporary_bytes"] / 1e6:,.0f} MB',
      f'{row["peak_bytes"] / 1e6:,.0f} MB',
    )
  console.print(table)


def kernels(args: argparse.Namespace) -> dict[str, Any]:
  """Times products with packed weights; returns and prints what was measured.

  Raises:
    ValueError: without the C++ extension.
  """
  rows = list(measure.packed_products(args.rounds))
  if args.plot:
    benchmarks.plot_products(args.plot, rows)
  return benchmarks.show(rows)


def models(args: argparse.Namespace) -> dict[str, Any]:
  """Times packed models, and full precision; returns and prints the figures."""
  decode = args.what == 'decode'
  prompt = args.prompt or (16 if decode else 512)
  tokens = 64 if decode else 1
  found, base = {}, None
  if args.llama:  # First: its packages may be missing.
    base, other = llama.random_model(fp.get_config(args.size), prompt + tokens)
  for name in ('pquant', 'bitnet', 'fp'):
    config = METHODS[name][0].get_config(args.size)
    found[name] = measure_models.random_model(config, args.cache)
  if base:
    found[base] = other
  shape = dict(batch=args.batch, prompt=prompt, tokens=tokens)
  rows = list(
    measure_models.speeds(found, **shape, rounds=args.rounds, base=base)
  )
  if args.plot:
    title = f'{args.what} of {args.size}, batch {args.batch}, random weights'
    once = args.batch if decode else args.batch * prompt
    benchmarks.plot_models(
      *(args.plot, title, rows, f'{args.what}/s', once, ('fp', base))
    )
  return benchmarks.show(rows)


def main(argv: list[str]) -> int:
  """Parses the command line and measures."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  commands = parser.add_subparsers(required=True, dest='what')
  command = commands.add_parser('kernels')
  command.add_argument('--rounds', type=int, default=30)
  benchmarks.add_outputs(command)
  for what in ('decode', 'prefill'):
    command = commands.add_parser(what)
    command.add_argument('--size', default='300m', choices=common.SIZES)
    command.add_argument('--batch', type=int, default=1, help='texts at once')
    command.add_argument('--prompt', type=int, help='tokens of a prompt')
    command.add_argument('--rounds', type=int, default=5)
    command.add_argument('--cache', help='of keys and values: int8, ...')
    if what == 'decode':
      command.add_argument('--llama', action='store_true', help='and llama.cpp')
    command.set_defaults(llama=False)
    benchmarks.add_outputs(command)
  command = commands.add_parser(
    'train', formatter_class=argparse.ArgumentDefaultsHelpFormatter
  )
  every = ','.join([PLAIN, *METHODS])
  command.add_argument('--methods', default=every, help='what to compare')
  command.add_argument(
    '--base', help='ratios are against this method; without it, the first'
  )
  command.add_argument(
    '--dot-dtype', default='bfloat16', help='of products: bfloat16 or float32'
  )
  command.add_argument(
    '--size',
    default='tiny',
    choices=common.SIZES,
    help='a size of configs/common.py; of tiny, the shape comes from below',
  )
  for name, value, meaning in (
    ('rounds', 8, 'timed steps of each variant'),
    ('d_model', 512, 'width'),
    ('layers', 8, 'decoder blocks'),
    ('d_ff', 1376, 'hidden width'),
    ('heads', 8, 'attention heads'),
    ('branch', 64, "pQuant's r"),
    ('vocabulary', 8192, 'tokens of the vocabulary'),
    ('seq_len', 256, 'tokens of a sequence'),
    ('batch', 16, 'sequences of a step'),
    ('accumulate', 1, 'parts that a step computes in turn, except of plain'),
  ):
    command.add_argument(
      f'--{name.replace("_", "-")}', type=int, default=value, help=meaning
    )
  command.add_argument('--json', help='also write the result to this file')
  args = parser.parse_args(argv)
  if args.what == 'decode' and args.llama and (args.batch > 1 or args.cache):
    parser.error('--llama takes one text, and a 16-bit cache')
  if args.what == 'train':
    result = _train(parser, args)
  else:
    result = kernels(args) if args.what == 'kernels' else models(args)
  if args.json:
    pathlib.Path(args.json).write_text(json.dumps(result, indent=2) + '\n')
  return 0


def _train(parser, args: argparse.Namespace) -> dict[str, Any]:
  """Checks what to compare, and compares it."""
  unknown = set(args.methods.split(',')) - {PLAIN, *METHODS}
  if unknown:
    parser.error(
      f'no method {", ".join(unknown)}; there are {PLAIN}, {", ".join(METHODS)}'
    )
  if args.base and args.base not in args.methods.split(','):
    parser.error(f'--base={args.base} is not among --methods={args.methods}')
  return train(args)


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
