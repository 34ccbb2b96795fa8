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
from absl import logging
import jax
from ml_collections import config_flags

from qat import checkpoint
from qat import config as config_lib
from qat import config_file
from qat import lock
from qat import manifest
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

# One message, no traceback: 2 for what a user can mend, 1 for a run gone wrong.
_USER_ERRORS = (config_lib.ConfigError, lock.LockedError, FileNotFoundError)
_RUN_ERRORS = (
  train.NonFiniteError,
  checkpoint.SaveError,
  manifest.CorruptError,
)


def parse(argv: list[str]) -> list[str]:
  """Parses the flags; a wrong one ends the program with a message."""
  try:
    rest = flags.FLAGS(argv)
    if len(rest) > 1:
      raise ValueError(f'unknown arguments {" ".join(rest[1:])}')
    _ = _CONFIG.value.name  # Where the file is missing, this says so.
    return rest
  except Exception as error:  # What a config file raises is the user's too.
    print(f'Error: {config_file.problem(error)}\nSee --help.', file=sys.stderr)
    sys.exit(2)


def main(argv: list[str]) -> int:
  """Runs; returns the exit code."""
  del argv
  logging.set_verbosity(logging.WARNING)  # orbax tells of each array.
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
  app.run(main, flags_parser=parse)
