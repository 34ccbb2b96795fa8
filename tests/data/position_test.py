"""The position of a loader; the loaders' own tests have the rest."""

import pytest

from qat.data import position

FINGERPRINT = {'seed': 1, 'dataset': 'a'}


def test_a_position_is_of_the_data_that_made_it():
  state = {'next_batch': 7, 'fingerprint': {'seed': 1, 'dataset': 'a'}}
  assert position.read(state, FINGERPRINT) == 7
  state['fingerprint'] = {'seed': 1, 'words': 'a'}
  with pytest.raises(ValueError, match='in other data') as caught:
    position.read(state, FINGERPRINT)
  text = str(caught.value)
  assert "dataset: None saved, 'a' now" in text
  assert "words: 'a' saved, None now" in text
  assert 'seed' not in text


@pytest.mark.parametrize('state', [{}, None, 3, {'next_batch': 1}, []])
def test_what_is_no_position_is_told(state):
  with pytest.raises(ValueError, match='Not a position'):
    position.read(state, FINGERPRINT)


@pytest.mark.parametrize('n', [-1, 1.0, True, '3'])
def test_a_position_counts_batches(n):
  with pytest.raises(ValueError, match='next_batch'):
    position.read({'next_batch': n, 'fingerprint': FINGERPRINT}, FINGERPRINT)


def test_processes_share_the_rows_of_a_batch():
  assert position.local_rows(12, 5, 2, 3) == 4
  for arguments, expected in (
    ((0, 5, 0, 1), 'batch_size 0'),
    ((4, 0, 0, 1), 'seq_len 0'),
    ((4, 5, 2, 2), 'process_index 2'),
    ((4, 5, 0, 3), 'multiple of 3'),
  ):
    with pytest.raises(ValueError, match=expected):
      position.local_rows(*arguments)
