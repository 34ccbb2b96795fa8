"""Tests of qat.finish; what it writes is looked at in train_test."""

import pytest

from configs import bitnet
from configs import bitnet_b158
from configs import fp
from configs import integer
from configs import lsq
from configs import onebit
from configs import paretoq
from configs import pquant
from qat import finish
from qat.nn import transformer


@pytest.mark.parametrize(
  ('module', 'size', 'bits'),
  [
    (fp, 'tiny', 16.0),
    (bitnet, 'tiny', 1.0),
    (bitnet_b158, 'tiny', 1.58),
    (onebit, 'tiny', 1.0),
    (lsq, 'tiny', 4.0),
    (paretoq, 'tiny', 2.0),
    (integer, 'tiny', 4.0),
    # The exact shares of 8-bit weights are 3.40 %, 4.17 % and 4.69 %; the
    # paper's 1.28, 1.28 and 1.35 use rounded ones.
    (pquant, '300m', 1.24),
    (pquant, '700m', 1.29),
    (pquant, '1.3b', 1.33),
  ],
)
def test_bits_per_weight(module, size, bits):
  model = transformer.build(module.get_config(size), 'cpu', 1)
  params = transformer.abstract_params(model)
  assert finish.bits_per_weight(params, model.rules) == pytest.approx(
    bits, abs=0.005
  )
