"""The program of a decoding step: shapes alone, and what it computes."""

import functools

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from configs import pquant
from pallas_kernels import dispatch
from pallas_kernels import native
from qat.infer import decode
from qat.infer import generate
from qat.infer import pack
from qat.interop import folder
from qat.nn import transformer
from qat.quant import dot
from tests import jaxprs
from tests import tiny

CPU = dispatch.Target('cpu')


def lowered(program, platform):
  traced = jax.jit(program.function, donate_argnums=program.donate).trace(
    *program.arguments
  )
  return traced.lower(lowering_platforms=(platform,))


@pytest.mark.parametrize(
  ('target', 'kernel'),
  [
    (dispatch.Target('tpu', 'v5p'), 'packed_matmul_1bit'),
    (dispatch.Target('gpu', '9.0'), 'packed_matmul_1bit'),
  ],
)
def test_a_step_is_lowered_for_a_device_that_is_not_there(target, kernel):
  config = pquant.get_config('300m').copy_and_resolve_references().unlock()
  config.model.n_layers = 1
  program = decode.decode_program(
    config.lock(), target, batch=2, length=64, cache='int8'
  )
  made = lowered(program, {'gpu': 'cuda'}.get(target.platform, 'tpu'))
  logits_BV, caches = made.out_info
  assert logits_BV.shape == (2, 32_000)
  assert len(caches) == 1
  assert kernel in made.as_text()


@pytest.mark.skipif(
  not native.variants(), reason=f'the C++ extension is {native.status()}'
)
@pytest.mark.parametrize(
  ('method', 'calls'),
  # q, k and v; o; gate and up; down; of pQuant those of the narrow branch too.
  [('bitnet', 4), ('pquant', 6)],
)
def test_layers_that_read_one_input_are_multiplied_in_one_call(
  monkeypatch, method, calls
):
  config = tiny.config(method, tiny.EXACT)
  model = transformer.build(config, 'cpu', 1)
  program = decode.decode_program(config, CPU, batch=1, length=9)
  token_BT = jnp.array([[7]], jnp.int32)
  params = tiny.params(model)
  made = folder.nested(dict(pack.leaves(model, params, CPU)))
  caches = generate.empty_caches(model, 1, 9)
  arguments = made, token_BT, caches, jnp.int32(0)

  def step():
    # A new function each time: what was traced before is not what is asked.
    function = functools.partial(program.function)
    products = [
      e
      for e in jaxprs.equations(function, *arguments)
      if e.primitive.name == 'ffi_call'
      and e.params['target_name'].startswith('qat_packed_matmul')
    ]
    return len(products), jax.jit(function)(*arguments)[0]

  together, found = step()
  monkeypatch.setattr(
    *(dot, 'quantized_dots'),
    lambda pairs, method: [dot.quantized_dot(*pair, method) for pair in pairs],
  )
  alone, expected = step()
  assert together == calls < alone
  np.testing.assert_array_equal(found, expected)


def test_it_computes_what_generation_does():
  config = tiny.config('pquant', tiny.EXACT)
  model = transformer.build(config, 'cpu', 1)
  program = decode.decode_program(config, CPU, batch=1, length=9, tokens=3)
  tokens_BT = jnp.array([[3, 60, 7]], jnp.int32)
  params = tiny.params(model)
  made = folder.nested(dict(pack.leaves(model, params, CPU)))
  for a, b in zip(
    *map(jax.tree.leaves, (made, program.arguments[0])), strict=True
  ):
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
  caches = generate.empty_caches(model, 1, 9)
  assert jax.tree.map(jnp.shape, caches) == jax.tree.map(
    jnp.shape, program.arguments[2]
  )
  found, _ = jax.jit(program.function)(made, tokens_BT, caches, jnp.int32(0))
  logits, _ = jax.jit(
    lambda params: model.apply({'params': params}, tokens_BT, method='logits')
  )(params)
  np.testing.assert_allclose(found, logits[:, -1], rtol=1e-4, atol=1e-4)
