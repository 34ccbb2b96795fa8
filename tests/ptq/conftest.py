"""The model that most tests of quantization after training take."""

import pytest

from tests import clean


@pytest.fixture(scope='session')
def config():
  return clean.config()


@pytest.fixture(scope='session')
def params(config):
  return clean.params(config)
