"""Models that a run cannot start from."""

import pytest

from qat import config as config_lib
from qat import initial_checks
from qat.data import dataset as dataset_lib
from qat.interop import folder
from qat.nn import transformer
from qat.quant import weights
from tests import clean
from tests import starts
from tests import tiny

QV = r'.*/(q|v)/kernel'


@pytest.fixture(scope='module')
def data(tmp_path_factory) -> dataset_lib.Dataset:
  path = tiny.dataset(tmp_path_factory.mktemp('data'))
  return dataset_lib.open_dataset(path)


def test_rules_that_quantize_nothing_are_not_taken(data, tmp_path):
  plain = starts.full(tmp_path / 'plain', data)
  with pytest.raises(
    config_lib.ConfigError, match=f'{plain}.*init.quant=True.*quantize.py'
  ):
    starts.find(starts.get('fp', plain, data, init__quant=True), data)
  # Quantized matrices, and quantized inputs, are something.
  four = starts.quantized(tmp_path / 'four', data)
  fields = {'init__quant': True, 'optim__estimator': 'spsa'}
  assert starts.find(starts.get('fp', four, data, **fields), data).described
  config = starts.source_config(quant__specs__full__activation='int8')
  path = starts.save(tmp_path / 'inputs', config, clean.params(config), data)
  assert starts.find(starts.get('fp', path, data, init__quant=True), data)


def with_quantized(params):
  """All matrices but those of q and v, in codes."""
  leaves = folder.flat(params)
  for path, leaf in leaves.items():
    if path.endswith('kernel') and path.split('/')[-2] not in 'qv':
      leaves[path] = weights.QUANTIZERS['int4'](leaf, 'channel', 1)
  return folder.nested(leaves)


def test_what_is_neither_trained_nor_quantized_for_good_is_told():
  def check(params=None, method='integer', **fields):
    spsa = {'optim.estimator': 'spsa', 'zo.perturbed': QV}
    config = tiny.config(method, {**spsa, **fields})
    if params is None:
      model = transformer.build(config, 'cpu', 1)
      params = transformer.abstract_params(model)
    initial_checks.check_latent(config, params)

  with pytest.raises(
    config_lib.ConfigError, match=r'trains 2 of 7 matrices.* block_0/attn/k is'
  ):
    check()
  check(with_quantized(clean.params(clean.config())))
  check(method='fp')
  check(**{'optim.estimator': 'backprop'})
  for pattern in ('.*', '.*kernel', '.*norm/scale'):
    check(**{'zo.perturbed': pattern})


def test_a_fresh_run_is_checked_too(data):
  fields = {'optim__estimator': 'spsa', 'zo__perturbed': QV}
  with pytest.raises(config_lib.ConfigError, match='block_0/attn/k'):
    starts.find(starts.get('integer', '', data, **fields), data)
