"""Both branches from one read, against float64 and against a model's layer."""

import functools

import hypothesis
from hypothesis import strategies as st
import jax
from jax import numpy as jnp
import numpy as np
import pytest

from pallas_kernels import packing
from pallas_kernels import slow
from pallas_kernels.decoupled_ffn_up import api
from pallas_kernels.decoupled_ffn_up import reference
from pallas_kernels.decoupled_ffn_up import tpu
from qat.quant import activations
from qat.quant import dot
from qat.quant import operand as operand_lib
from qat.quant import weights
from tests.pallas_kernels import forms

IMPLEMENTATIONS = forms.of(reference.decoupled_ffn_up, tpu.decoupled_ffn_up)
PACK = jax.jit(packing.pack, static_argnames='format')


def draw(seed, rows, inputs, wide, narrow):
  """Inputs, their scales, and for each branch its codes and packed form."""
  rng = np.random.default_rng(seed)
  x = rng.integers(-127, 128, (rows, inputs)).astype(np.int8)
  x_scale = rng.uniform(0.1, 1, (rows, 1)).astype(np.float32)
  branches = []
  for format, outputs in (('1bit', 2 * wide), ('int8', 2 * narrow)):
    codes = rng.integers(-127, 128, (inputs, outputs)).astype(np.int8)
    if format == '1bit':
      codes = np.where(codes > 0, 1, -1).astype(np.int8)
    scale = rng.uniform(0.1, 1, (1, outputs)).astype(np.float32)
    packed = PACK(jnp.asarray(codes), jnp.asarray(scale), format=format)
    branches.append((codes, packed))
  return jnp.asarray(x), jnp.asarray(x_scale), branches


@pytest.mark.parametrize('name', IMPLEMENTATIONS)
@hypothesis.settings(max_examples=2)
@hypothesis.given(
  st.integers(1, 200),
  st.integers(1, 1500),
  st.integers(1, 300),
  st.integers(1, 150),
  st.integers(0, 2**32 - 1),
)
@hypothesis.example(130, 1025, 300, 140, 0)
def test_both_branches(name, rows, inputs, wide, narrow, seed):
  x, x_scale, branches = draw(seed, rows, inputs, wide, narrow)
  (codes_wide, wide), (codes_narrow, narrow) = branches
  run = functools.partial(IMPLEMENTATIONS[name], out_dtype=jnp.float32)
  found = jax.jit(run)(x, wide, narrow, x_scale)
  for y, codes, packed in zip(
    found, (codes_wide, codes_narrow), (wide, narrow), strict=True
  ):
    want = slow.matmul(x, codes, x_scale, packed.scale)
    np.testing.assert_allclose(y, want, rtol=1e-6, atol=1e-30)


def test_the_simulator_of_a_tpu_finds_the_same():
  x, x_scale, branches = draw(0, 40, 1024, 200, 20)
  packed = [p for _, p in branches]
  found = forms.simulated(
    tpu.decoupled_ffn_up, x, *packed, x_scale, jnp.float32, forms.V5E
  )
  for y, (codes, p) in zip(found, branches, strict=True):
    want = slow.matmul(x, codes, x_scale, p.scale)
    np.testing.assert_allclose(y, want, rtol=1e-6)


def test_it_is_what_the_layer_of_a_model_multiplies():
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(7, 192)), jnp.float32)
  latent = [
    jnp.asarray(rng.normal(size=(192, n)), jnp.float32)
    for n in (80, 80, 16, 16)
  ]
  quantize = [weights.binary] * 2 + [weights.QUANTIZERS['int8']] * 2
  tensors = [q(w) for q, w in zip(quantize, latent, strict=True)]
  q_x = activations.absmax(x, bits=8)
  method = dot.Method(int8=True, dtype='float32')
  source = operand_lib.Operand(x, q_x)
  want = [
    dot.quantized_dot(source, operand_lib.Operand(w, q), method)
    for w, q in zip(latent, tensors, strict=True)
  ]
  branches = []
  for format, (gate, up) in (('1bit', tensors[:2]), ('int8', tensors[2:])):
    codes = jnp.concatenate([gate.codes, up.codes], 1)
    scale = [jnp.broadcast_to(q.scale, (1, q.shape[1])) for q in (gate, up)]
    branches.append(packing.pack(codes, jnp.concatenate(scale, 1), format))
  found = api.decoupled_ffn_up(q_x.codes, *branches, x_scale_M1=q_x.scale)
  for y, halves in zip(found, (want[:2], want[2:]), strict=True):
    np.testing.assert_allclose(y, jnp.concatenate(halves, 1), rtol=1e-6)


def test_what_does_not_fit_is_an_error():
  x, x_scale, ((_, wide), (_, narrow)) = draw(0, 2, 64, 8, 4)
  with pytest.raises(ValueError, match="is 'int8'; want '1bit'"):
    api.decoupled_ffn_up(x, narrow, wide)
  other = packing.repack(narrow, axis=-1)
  with pytest.raises(ValueError, match='along other axes'):
    api.decoupled_ffn_up(x, wide, other)
  with pytest.raises(ValueError, match='not on cpu'):
    api.decoupled_ffn_up(x, wide, narrow, implementation='tpu')
