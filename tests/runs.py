"""Folders of made-up runs, with every file of a finished one."""

import json
import math
import pathlib

import numpy as np

from qat import sensitivity
from qat import sensitivity_files
from tests import analyses

LINEARS = (
  *(f'attn/{name}' for name in 'qkvo'),
  *(
    f'ffn/{branch}/{name}'
    for branch in ('wide', 'narrow')
    for name in ('gate', 'up', 'down')
  ),
)
CONFIG = {
  'name': 'pquant-tiny',
  'model': {'ffn': 'decoupled', 'n_layers': 4, 'd_model': 256, 'n_experts': 4},
  'data': {'dataset': 'austen'},
  'train': {'steps': 400},
}
SUMMARY = {
  'parameters': 3_700_000,
  'tokens': 1_638_400,
  'steps': 400,
  'seconds': 1312.4,
  'eval/loss': 3.42,
  'eval/perplexity': 30.57,
  'eval/bits_per_byte': 1.92,
  'baseline/unigram_bits_per_byte': 4.37,
  'baseline/gzip_bits_per_byte': 2.71,
  'bits_per_weight': 1.28,
  'tokens_per_s': 1248.0,
}
SAMPLES = [
  {
    'step': step,
    'prompt': prompt,
    'text': prompt + ' of the house, and she could not but be sensible of the'
    ' kindness\nwith which it had been given, though the hour was late.',
  }
  for step in (200, 400)
  for prompt in ('It is a truth', 'She was')
]


def write(
  workdir: pathlib.Path,
  steps: int = 400,
  blocks: int = 4,
  experts: int = 4,
) -> pathlib.Path:
  """Writes the files of a run that went as runs go; returns its folder."""
  rng = np.random.default_rng(0)
  workdir.mkdir(parents=True, exist_ok=True)
  (workdir / 'config.json').write_text(json.dumps(CONFIG))
  (workdir / 'summary.json').write_text(json.dumps(SUMMARY))
  lines = [json.dumps(row) + '\n' for row in SAMPLES]
  (workdir / 'samples.jsonl').write_text(''.join(lines))
  rows = []
  for step in range(1, steps + 1):
    t = step / steps
    lr = (1.5e-3 if t < 0.5 else 1e-3) * min(t / 0.05, (1 - t) / 0.95)
    loss = 3.1 + 4.5 * math.exp(-9 * t) - 0.15 * (t > 0.5)
    row = {
      'step': step,
      'time': 1e9 + step,
      'train/loss': loss + 0.08 * rng.normal(),
      'train/lr': lr,
      'train/weight_decay': 0.1 if t < 0.5 else 0.0,
      'train/grad_norm': (0.3 + 2 * math.exp(-12 * t)) * rng.lognormal(0, 0.2),
      'train/param_norm': 60 + 20 * t,
      'train/tokens_per_s': 1250 * (1 - 0.08 * rng.random()),
      'train/tokens': 4096 * step,
    }
    if step % (steps // 20) == 0:
      row['eval/bits_per_byte'] = 1.9 + 2.9 * math.exp(-7 * t)
      row['eval/loss'] = row['eval/bits_per_byte'] * 1.8
      for i in range(blocks):
        for j, name in enumerate(LINEARS):
          path = f'block_{i}/{name}'
          noise = rng.lognormal(0, 0.1)
          row[f'health/flips/{path}'] = lr * (1 + j / 5) * noise
          row[f'health/zeros/{path}'] = 0.02 * ('narrow' in path)
          row[f'health/scale/{path}'] = 0.02 * (
            1 + t * (i / blocks - 0.4) * noise
          )
        row[f'health/alpha/block_{i}'] = 2 - 0.5 * t * (1 + i / blocks)
        row[f'health/beta/block_{i}'] = 0.2 + 0.3 * t * (1 - i / blocks)
        row[f'health/router_entropy/block_{i}'] = 1.38 - 0.3 * t * (
          1 + i / blocks
        )
        load = rng.dirichlet(np.full(experts, 30 - 20 * t))
        for e in range(experts):
          row[f'health/expert_load/block_{i}/{e}'] = load[e]
    rows.append(json.dumps(row) + '\n')
  (workdir / 'metrics.jsonl').write_text(''.join(rows))
  sensitivity_files.save(workdir, steps, analysis(blocks, rng))
  return workdir


def analysis(blocks: int, rng: np.random.Generator) -> sensitivity.Analysis:
  """An analysis of every linear layer."""
  paths = (f'block_{i}/{name}' for i in range(blocks) for name in LINEARS)
  return analyses.make(paths, rng)


EVIL = (
  '</script><script>alert(1)</script>',
  '<img src=x onerror=alert(1)>',
  '"><svg onload=alert(1)>',
  "' onmouseover='alert(1)",
  '<a href="javascript:alert(1)">x</a>',
  '</pre></blockquote></title></style><!-- <iframe src=http://evil>',
  '<![CDATA[ ${alert(1)} $plotly $body {{7*7}} %(x)s %{x} \\u003cb>',
  '\x1b]0;pwned\x07\u202e\ud800\x00\u2028',
)


def write_hostile(workdir: pathlib.Path) -> pathlib.Path:
  """Writes a run whose every text is hostile; returns its folder."""
  write(workdir, steps=40)
  evil = ''.join(EVIL)
  config = json.loads(json.dumps(CONFIG))
  config['name'] = evil
  config['model']['ffn'] = evil
  config[evil] = [evil, {evil: evil}]
  (workdir / 'config.json').write_text(json.dumps(config))
  summary = SUMMARY | {evil: 1.0, 'text': evil}
  (workdir / 'summary.json').write_text(json.dumps(summary))
  row = {'step': 40, 'prompt': evil, 'text': evil * 2}
  (workdir / 'samples.jsonl').write_text(json.dumps(row) + '\n')
  keys = ('flips', 'zeros', 'scale', 'alpha', 'beta', 'router_entropy')
  row = {'step': 40, 'time': 1.0, evil: 1.0, 'train/lr': evil}
  for place in (f'block_0/{evil}', evil, f'block_0{evil}'):
    row |= {f'health/{key}/{place}': 0.5 for key in keys}
    row[f'health/expert_load/{place}/0'] = 0.5
  with (workdir / 'metrics.jsonl').open('a') as file:
    file.write(json.dumps(row) + '\n')
  made = analysis(1, np.random.default_rng(0))
  safe = ''.join(EVIL[:-1])  # The name of a file in an archive has no NUL.
  made[f'block_0/{safe}'] = next(iter(made.values()))
  sensitivity_files.save(workdir, 41, made)
  return workdir
