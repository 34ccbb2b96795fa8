"""What is refused of a config's estimator, before anything is compiled."""

from jax import numpy as jnp
import pytest

from qat import config as config_lib
from qat import estimators
from qat.quant import qtensor
from tests import tiny

SPSA = {
  'optim.estimator': 'spsa',
  'optim.optimizer': 'sgd',
  'optim.clip_norm': 0.0,
}
FORWARD = {'optim.estimator': 'forward'}
SCAN = {'model.scan_layers': True, 'model.n_layers': 2}


@pytest.mark.parametrize(
  'fields',
  [
    SPSA,
    {**SPSA, 'zo.master': 'bfloat16', 'optim.accumulate': 2},
    {**SPSA, 'zo.resolution': 2.0**-20, 'optim.weight_decay': 0.0},
    {**SPSA, 'zo.perturbed': r'.*/(q|v)/kernel', **SCAN},
    {**SPSA, 'optim.optimizer': 'adamw', 'optim.clip_norm': 1.0},
    FORWARD,
    {'optim.optimizer': 'sgd'},
  ],
)
def test_what_can_be_run_is_not_refused(fields):
  config_lib.check(tiny.config('pquant', fields), devices=1)


@pytest.mark.parametrize(
  ('fields', 'told'),
  [
    ({'optim.estimator': 'mezo'}, "estimator='mezo'; choose one of backprop"),
    ({'optim.optimizer': 'lion'}, "optimizer='lion'; choose one of adamw, sgd"),
    ({'zo.master': 'float16'}, "zo.master='float16'; choose one of"),
    ({'zo.eps': 0.0}, 'zo.eps=0.0 must be greater than 0'),
    ({'zo.directions': 0}, 'zo.directions=0; at least 1'),
    ({'zo.clip': -1.0}, 'zo.clip=-1.0 must be finite'),
    ({'zo.resolution': 0.3}, 'zo.resolution=0.3 is no power of two'),
    ({**SPSA, 'zo.perturbed': '('}, r"zo.perturbed='\(' is no regex"),
    ({**SPSA, 'zo.perturbed': 'x'}, "zo.perturbed='x' covers no parameter"),
    ({**SPSA, **SCAN, 'zo.perturbed': 'block_0/.*'}, 'covers only one of'),
    ({**SPSA, 'optim.clip_norm': 1.0}, 'clip_norm=1.0 .* set it to 0'),
    ({'zo.quantizer_eps': 0.01}, 'quantizer_eps=0.01 needs optim.estimator'),
    ({'zo.quantizer_eps': -1.0}, 'zo.quantizer_eps=-1.0 must be finite'),
    ({**SPSA, 'zo.quantizer_eps': 0.01}, 'no quantizer learns'),
    ({'zo.master': 'bfloat16'}, "zo.master='bfloat16' needs optim.estimator"),
    ({**SPSA, 'zo.resolution': 0.5}, 'zo.resolution=0.5 needs .* no weight'),
    (
      {'zo.resolution': 0.5, 'optim.weight_decay': 0.0},
      "zo.resolution=0.5 needs optim.estimator='spsa'",
    ),
    ({**SPSA, 'model.balance_coef': 0.1}, 'balance_coef=0.1 needs'),
    ({**FORWARD, 'model.activation': 'gelu'}, "model.activation='gelu' with"),
    ({**FORWARD, 'model.n_experts': 2}, 'model.n_experts=2 with'),
    (
      {**FORWARD, 'quant.specs.binary.output_norm': True},
      'quant.specs.binary.output_norm=True with',
    ),
    (
      {**FORWARD, 'quant.specs.binary.weight': 'lsq4'},
      "quant.specs.binary.weight='lsq4' with",
    ),
  ],
)
def test_what_cannot_be_run_is_told(fields, told):
  config = tiny.config('pquant', fields)
  with pytest.raises(config_lib.ConfigError, match=told):
    config_lib.check(config, devices=1)


def test_what_nothing_would_train_is_told():
  config = tiny.config('fp', {**SPSA, 'zo.perturbed': 'embed/embedding'})
  codes = qtensor.QTensor(jnp.ones((2, 2), jnp.int8), jnp.ones((1, 1)), 'int8')
  with pytest.raises(ValueError, match="zo.perturbed='embed/embedding'"):
    estimators.split(config, {'embed': {'embedding': codes}})
