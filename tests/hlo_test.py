"""Collectives, found in texts as the compilers of TPUs and GPUs write them."""

import jax
from jax import numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from qat import hlo

SUM = """
%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %s = f32[] add(%a, %b)
}
"""


def module(body, computations=''):
  return (
    f'HloModule jit_step, is_scheduled=true\n{SUM}{computations}\n'
    'ENTRY %main (p: f32[8,128]) -> f32[8,128] {\n'
    '  %p = f32[8,128]{1,0:T(8,128)} parameter(0)\n'
    f'{body}\n  ROOT %copy.9 = f32[8,128]{{1,0}} copy(%p)\n}}\n'
  )


def one(line):
  (found,) = hlo.collectives(module(line)).items()
  return found[0], found[1].count, found[1].bytes


@pytest.mark.parametrize(
  ('line', 'expected'),
  [
    (
      '  %g = f32[32,128]{1,0} all-gather(%p), dimensions={0}',
      ('all-gather', 1, 32 * 128 * 4),
    ),
    (
      '  %r = f32[8,128]{1,0} all-reduce(%p), to_apply=%add',
      ('all-reduce', 1, 4096),
    ),
    (
      '  %r = f32[2,128]{1,0} reduce-scatter(f32[8,128]{1,0} %p),'
      ' dimensions={0}, to_apply=%add',
      ('reduce-scatter', 1, 4096),
    ),
    (
      '  %r = (f32[8,128]{1,0}, bf16[4]{0:T(128)(2,1)S(1)}, /*index=2*/pred[3])'
      ' all-reduce(%p, %p, %p), to_apply=%add',
      ('all-reduce', 1, 3 * 4096),
    ),
    (
      '  %t = s8[8,128]{1,0} all-to-all(%p), dimensions={0}',
      ('all-to-all', 1, 4096),
    ),
    (
      '  %s = (f32[8,128]{1,0}, s4[64,512]{1,0}) all-gather-start(%p)\n'
      '  %d = s4[64,512]{1,0} all-gather-done(%s)',
      ('all-gather', 1, 64 * 512 // 2),
    ),
    *(
      (
        f'  %g = {kind}[64,512]{{1,0}} all-gather(%p), dimensions={{0}}',
        ('all-gather', 1, 64 * 512 * size),
      )
      for kind, size in (('bf16', 2), ('s8', 1), ('pred', 1))
    ),
    (
      '  %s = f32[8,128]{1,0} all-reduce-start(%p), to_apply=%add\n'
      '  %d = f32[8,128]{1,0} all-reduce-done(%s)',
      ('all-reduce', 1, 4096),
    ),
    (
      '  %s = (f32[8,128], f32[8,128], u32[], u32[])'
      ' collective-permute-start(%p), source_target_pairs={{0,1}}\n'
      '  %d = f32[8,128]{1,0} collective-permute-done(%s)',
      ('collective-permute', 1, 4096),
    ),
    (
      '  %s = ((f32[8,128], f32[8,128]), (f32[2,128], f32[2,128]))'
      ' reduce-scatter-start(%p, %p), to_apply=%add',
      ('reduce-scatter', 1, 2 * 4096),
    ),
    (
      '  %f = f8e4m3fn[8,999]{1,0} all-gather(%p), dimensions={0}',
      ('all-gather', 1, 8 * 999),
    ),
  ],
)
def test_one_exchange(line, expected):
  assert one(line) == expected


def test_a_program_without_exchanges():
  assert hlo.collectives(module('  %q = f32[8,128]{1,0} negate(%p)')) == {}


LOOP = """
%body (t: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %t = (s32[], f32[8,128]{1,0}) parameter(0)
  %x = f32[8,128]{1,0} get-tuple-element(%t), index=1
  %r = f32[8,128]{1,0} all-reduce(%x), to_apply=%add
  ROOT %n = (s32[], f32[8,128]{1,0}) tuple(%x, %r)
}

%cond (t: (s32[], f32[8,128])) -> pred[] {
  %t = (s32[], f32[8,128]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %limit = s32[]{:T(128)} constant(24)
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%fused (t: pred[]) -> pred[] {
  ROOT %t = pred[] parameter(0)
}

%opaque (t: (s32[], f32[8,128])) -> pred[] {
  %t = (s32[], f32[8,128]{1,0}) parameter(0)
  ROOT %f = pred[] fusion(%t), kind=kLoop, calls=%fused
}
"""


def loop(condition, attributes=''):
  return module(
    '  %w = (s32[], f32[8,128]{1,0}) while(%p),'
    f' condition=%{condition}, body=%body{attributes}',
    LOOP,
  )


@pytest.mark.parametrize(
  ('text', 'turns', 'unknown'),
  [
    (loop('cond'), 24, 0),
    (
      loop('opaque', ', backend_config={"known_trip_count":{"n":"7"},"x":[]}'),
      7,
      0,
    ),
    (loop('opaque'), 1, 1),
  ],
)
def test_an_exchange_in_a_loop_counts_once_a_turn(text, turns, unknown):
  found = hlo.collectives(text)['all-reduce']
  assert found == hlo.Collective(turns, turns * 4096, unknown)


def test_loops_in_loops_multiply():
  outer = """
%outer (t: f32[8,128]) -> f32[8,128] {
  %t = f32[8,128]{1,0} parameter(0)
  ROOT %w = (s32[], f32[8,128]{1,0}) while(%t), condition=%cond, body=%body
}
"""
  text = module(
    '  %w = f32[8,128] while(%p), condition=%cond, body=%outer', LOOP + outer
  )
  assert hlo.collectives(text)['all-reduce'].count == 24 * 24


def test_exchanges_inside_calls_are_found_once():
  inner = """
%wrapped (x: f32[8,128]) -> f32[32,128] {
  %x = f32[8,128]{1,0} parameter(0)
  ROOT %g = f32[32,128]{1,0} all-gather(%x), dimensions={0}
}
"""
  text = module(
    '  %s = ((f32[8,128]), f32[32,128], s32[]) async-start(%p),'
    ' calls=%wrapped\n'
    '  %d = f32[32,128]{1,0} async-done(%s), calls=%wrapped\n'
    '  %c = f32[32,128] conditional(%p, %p, %p),'
    ' branch_computations={%wrapped, %wrapped}',
    inner,
  )
  # One by the asynchronous call, and one for each branch.
  assert hlo.collectives(text)['all-gather'].count == 3


def test_another_text_is_refused():
  with pytest.raises(ValueError, match="begins 'module @jit_f'"):
    hlo.collectives('module @jit_f')


def test_of_a_program_that_was_compiled_here():
  mesh = jax.make_mesh((8,), ('x',), axis_types=(AxisType.Auto,))

  @jax.jit
  def f(x_LMD):
    def turn(total, x_MD):
      return total + jnp.sum(jnp.sin(x_MD * total[None]), axis=0), None

    return jax.lax.scan(turn, jnp.zeros(x_LMD.shape[-1]), x_LMD)[0]

  x = jax.ShapeDtypeStruct(
    (5, 16, 32), np.float32, sharding=NamedSharding(mesh, P(None, 'x'))
  )
  found = hlo.collectives(f.lower(x).compile().as_text())
  assert found == {'all-reduce': hlo.Collective(5, 5 * 32 * 4, 0)}
