"""Config files and fields on the command line of a script."""

from collections.abc import Sequence

from absl import flags
from ml_collections import ConfigDict
from ml_collections import config_flags


def read(path: str, fields: Sequence[str]) -> ConfigDict:
  """The config at `path` with fields applied, as qat.main reads it.

  Args:
    path: 'configs/pquant.py:tiny'.
    fields: '--config.train.steps=10', ...

  Raises:
    ValueError: there is no such file or field, a value is of another type, or
      something else stands among the fields.
  """
  values = flags.FlagValues()
  words = ['script', f'--config={path}', *fields]
  config_flags.DEFINE_config_file('config', flag_values=values, sys_argv=words)
  try:
    rest = values(words)[1:]
    if rest:
      raise ValueError(f'unknown arguments {" ".join(rest)}')
    _ = values.config.to_dict()  # Where the file is missing, this says so.
  except Exception as error:  # What a config file raises is the user's too.
    raise ValueError(f'{problem(error)}; see --help.') from error
  return values.config


def problem(error: Exception) -> str:
  """What reading a config file raised, in the one line that says it."""
  text = str(error.args[0] if error.args else repr(error)).strip()
  # Of a traceback of the config file, the last line.
  text = text.splitlines()[-1]
  if 'get_config() takes 0' in text:
    text = 'this config file has no variants; leave out ":" and what follows'
  return text
