"""Round to nearest against the slow reference."""

import itertools

from jax import numpy as jnp
import numpy as np
import pytest

from qat.ptq import rtn
from qat.quant import blocks
from qat.quant import grid
from qat.quant import qtensor
from qat.quant import weights
from tests import slow_gptq

ALL = list(itertools.product(blocks.AXES, (False, True), (False, True)))


def matrix(seed=0):
  rng = np.random.default_rng(seed)
  w_KN = 0.02 * rng.standard_t(3, size=(24, 5))
  w_KN[:, 3] = 0
  return w_KN.astype(np.float32)


@pytest.mark.parametrize(('granularity', 'symmetric', 'mse'), ALL)
def test_codes_and_scales_are_the_slow_ones(granularity, symmetric, mse):
  w_KN = matrix()
  found = rtn.quantize(
    jnp.asarray(w_KN), rtn.Options(3, granularity, 8, symmetric, mse)
  )
  assert found.alphabet == 'int3' and found.codes.dtype == jnp.int8
  assert found.exact is None and (found.zero is None) == symmetric
  parts = {
    'tensor': w_KN.reshape(1, 1, -1),
    'channel': w_KN.T[None],
    'group': w_KN.reshape(3, 8, 5).transpose(0, 2, 1),
  }[granularity]
  scale, zero = np.stack(
    [slow_gptq.fit(np.float64(part), 3, symmetric, mse) for part in parts], 1
  )
  np.testing.assert_allclose(found.scale, scale, rtol=1e-6)
  if not symmetric:
    assert found.zero.dtype == jnp.int8
    np.testing.assert_array_equal(found.zero, zero)
  scale_KN, zero_KN = (
    np.array(np.broadcast_to(qtensor.spread(jnp.asarray(a), (24, 5)), (24, 5)))
    for a in (scale, zero)
  )
  codes_KN = slow_gptq.encode(np.float64(w_KN), scale_KN, zero_KN, 3)
  assert np.mean(found.codes == codes_KN) == 1


@pytest.mark.parametrize('bits', grid.BITS)
def test_it_is_the_quantizer_of_training_but_for_the_scale(bits):
  w_KN = jnp.asarray(matrix()[:, :3])
  found = rtn.quantize(w_KN, rtn.Options(bits, 'channel', 0, False, False))
  other = weights.asymmetric(w_KN, 'channel', bits=bits)
  np.testing.assert_allclose(found.scale, other.scale, rtol=2**-11)
  if bits < 8:  # 8 bits tell scales apart that differ by a float16's error.
    np.testing.assert_array_equal(found.codes, other.codes)


def test_bad_options_are_refused():
  w_KN = jnp.asarray(matrix())
  with pytest.raises(ValueError, match='bits=5'):
    rtn.quantize(w_KN, rtn.Options(5, 'channel', 0, False, False))
  with pytest.raises(ValueError, match='group_size=7 does not divide the 24'):
    rtn.quantize(w_KN, rtn.Options(4, 'group', 7, False, False))
  with pytest.raises(ValueError, match='row'):
    rtn.quantize(w_KN, rtn.Options(4, 'row', 0, False, False))
