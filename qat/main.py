"""The command line: trains what a config file describes.

  python -m qat.main --config=configs/pquant.py:tiny --workdir=runs/pquant

Any field of the config can be set: --config.optim.peak_lr=2e-3. The same
command, given again, goes on where the run was stopped.
"""

import sys

from qat import launch

if __name__ == '__main__':
  launch.tune_malloc()

import pathlib

from absl import app
from absl import flags
import jax
from ml_collections import config_flags

from qat import checkpoint
from qat import config as config_lib
from qat import guard
from qat import train

_CONFIG = config_flags.DEFINE_config_file(
  'config', help_string='Config file, with a size: configs/pquant.py:tiny.'
)
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Folder of the run: log, checkpoints, report.'
)
_DISTRIBUTED = flags.DEFINE_bool(
  'distributed', False, 'Join the other hosts of a pod or cluster first.'
)

# What a user can mend: one message, no traceback. EX_CONFIG and EX_TEMPFAIL
# have their own codes so that a scheduler knows whether to try again.
_USER_ERRORS = (config_lib.ConfigError, guard.LockedError, FileNotFoundError)
_RUN_ERRORS = (
  train.NonFiniteError,
  checkpoint.SaveError,
  checkpoint.CorruptError,
)


def main(argv: list[str]) -> int:
  """Runs; returns the exit code."""
  if len(argv) > 1:
    raise app.UsageError(f'Unknown arguments: {" ".join(argv[1:])}')
  if _DISTRIBUTED.value:
    jax.distributed.initialize()
  try:
    return train.run(_CONFIG.value, pathlib.Path(_WORKDIR.value))
  except _USER_ERRORS as error:
    print(f'Error: {error}', file=sys.stderr)
    return 2
  except _RUN_ERRORS as error:
    print(f'Error: {error}', file=sys.stderr)
    return 1


if __name__ == '__main__':
  flags.mark_flags_as_required(['config', 'workdir'])
  app.run(main)
