"""The rules of `architecture_test`, each applied to what breaks it."""

import pytest

from tests import architecture_test


@pytest.mark.parametrize(
  ('module', 'source', 'expected'),
  [
    ('qat.quant.dot', 'from qat.nn import ffn', ['qat.nn.ffn']),
    ('qat.quant.dot', 'from qat.quant import weights', []),
    ('qat.nn.ffn', 'import qat.optim', ['qat.optim']),
    ('qat.optim', 'from qat import train', ['qat.train']),
    ('qat.optim', 'from qat import metrics', []),
    ('qat.train', 'def f():\n  from qat import main', ['qat.main']),
    ('qat.train', 'from configs import common', ['configs.common']),
    ('qat.main', 'import tests.conftest', ['tests.conftest']),
    ('pallas_kernels.dot', 'import qat.quant', ['qat.quant']),
    ('configs.fp', 'from qat import optim', ['qat.optim']),
    ('configs.fp', 'from configs import common', []),
    ('scripts.bench', 'from qat import main\nimport configs.fp', []),
  ],
)
def test_the_rule_of_directions(module, source, expected):
  assert architecture_test.wrong_directions(module, source) == expected


@pytest.mark.parametrize(
  ('source', 'expected'),
  [
    ('import pickle', ['pickle']),
    ('from dill import load', ['dill']),
    ('x = eval(y)', ['eval']),
    ('jax.eval_shape(f); re.compile(r); f.lower(x).compile()', []),
    ('np.load(p, allow_pickle=True)', ['allow_pickle']),
    ('np.load(p, allow_pickle=flag)', ['allow_pickle']),
    ('np.load(p, allow_pickle=False)', []),
  ],
)
def test_the_rule_of_unsafe_code(source, expected):
  assert architecture_test.unsafe(source) == expected


@pytest.mark.parametrize(
  ('source', 'count'),
  [
    ('config.get("x", 1)', 1),
    ('self.config.model.get("x")', 1),
    ('run_config.get("x")', 1),
    ('SIZES.get(size)', 0),
    ('config.model.x', 0),
  ],
)
def test_the_rule_of_hidden_defaults(source, count):
  assert len(architecture_test.hidden_defaults(source)) == count


def test_the_rules_of_names_and_paths():
  assert architecture_test.imports('import a.b\nfrom c import d, e') == {
    'a.b',
    'c',
  }
  assert architecture_test.foreign_imports('import os\nimport flax.linen') == {
    'flax'
  }
  assert (
    architecture_test.layer('qat.nn')
    == architecture_test.layer('qat.nn.ffn')
    == 'qat.nn'
  )
  assert (
    architecture_test.layer('qat.nnx') == 'qat'
    and architecture_test.layer('configs.fp') is None
  )
  assert architecture_test.has_code('x = 1') and not architecture_test.has_code(
    '"""Doc."""\nimport os\n'
  )
  assert architecture_test.FOREIGN.search('see ' + '/home' + '/me/x')
  assert not architecture_test.FOREIGN.search(
    'https://a.org/home/x and data/work/x'
  )
