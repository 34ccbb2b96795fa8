"""What the steps of a quantization share."""

import jax
import numpy as np

from qat.ptq import job as job_lib
from qat.ptq import partial
from tests import clean


def make(tmp_path, stem='rtn', show=lambda *step: None):
  config = clean.config()
  half = jax.tree.map(
    lambda leaf: np.asarray(leaf, np.float16), clean.params(config)
  )
  return job_lib.Job(
    config,
    half,
    clean.ptq(stem),
    clean.examples(),
    partial.Store(tmp_path / 'parts', {}),
    show,
  )


def test_blocks_are_float32_whatever_they_came_in(tmp_path):
  job = make(tmp_path)
  block = job.block('block_1')
  assert {leaf.dtype.name for leaf in jax.tree.leaves(block)} == {'float32'}
  jax.tree.map(np.testing.assert_array_equal, block, job.params['block_1'])


def test_scales_divide_a_gain_and_multiply_the_rows_that_read_it(tmp_path):
  job = make(tmp_path)
  plain = job.block('block_0')
  scale_K = np.linspace(0.5, 2, 32).astype(np.float32)
  job.scales = {'block_0/ffn/norm': scale_K}
  block = job.block('block_0')
  norm, before = block['ffn']['norm']['scale'], plain['ffn']['norm']['scale']
  np.testing.assert_array_equal(norm, before / scale_K)
  for name in ('gate', 'up'):
    np.testing.assert_array_equal(
      block['ffn'][name]['kernel'],
      plain['ffn'][name]['kernel'] * scale_K[:, None],
    )
  jax.tree.map(np.testing.assert_array_equal, block['attn'], plain['attn'])
  down = (b['ffn']['down']['kernel'] for b in (block, plain))
  np.testing.assert_array_equal(*down)
  jax.tree.map(
    np.testing.assert_array_equal,
    job.block('block_1'),
    make(tmp_path).block('block_1'),
  )


def test_steps_are_counted(tmp_path):
  shown = []
  job = make(tmp_path, 'tacq', lambda *step: shown.append(step))
  job.step('a')
  job.step('b', 4)
  # 14 matrices twice, and 2 batches of gradients up and down 2 blocks.
  assert shown == [(1, 28 + 8, 'a'), (5, 28 + 8, 'b')]
