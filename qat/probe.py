"""Asking a compiler, in a process of its own that it may end or never finish.

The process is Python with some arguments, `--target=` and `--probe=`: the
devices that it compiles for, and a file for its answer, JSON as of `result`.
"""

from collections.abc import Sequence
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
from typing import Any

from jax import errors as jax_errors

from qat import targets

_LINES = 8  # Of what a process printed last, told where it fails.


def result(target: targets.Target) -> dict[str, Any]:
  """An answer without figures: 'target', 'memory_bytes', and no 'error'."""
  memory = targets.MEMORY[target.kind]
  return {'target': target.name, 'memory_bytes': memory, 'error': None}


def ask(
  target: targets.Target, command: Sequence[str], seconds: float
) -> dict[str, Any]:
  """Runs a probe.

  Args:
    target: the devices.
    command: arguments of Python, without those above.
    seconds: how long it may take.

  Returns:
    Its answer; where there is none, 'error' says why.
  """
  with tempfile.TemporaryDirectory() as folder:
    answer = pathlib.Path(folder) / 'answer.json'
    own = (f'--target={target.name}', f'--probe={answer}')
    try:
      child = subprocess.run(
        [sys.executable, *command, *own],
        env=targets.environment(target, os.environ),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
      )
    except subprocess.TimeoutExpired:
      error = f'It did not end within {seconds:g} s; give it more by --limit.'
      return result(target) | {'error': error}
    if child.returncode == 0:
      return json.loads(answer.read_text('utf-8'))
  lines = (child.stdout + child.stderr).strip().splitlines()
  message = '\n'.join(lines[-_LINES:])
  if child.returncode < 0:
    name = signal.Signals(-child.returncode).name
    message = f'The compiler ended its process with {name}. {message}'
  return result(target) | {'error': message.removeprefix('Error: ')}


def answer(path: str, found: dict[str, Any]) -> None:
  """Leaves the answer of this process."""
  pathlib.Path(path).write_text(json.dumps(found), 'utf-8')


def refusal(error: jax_errors.JaxRuntimeError) -> str:
  """What a compiler says that found no room; raises any other error again."""
  if 'RESOURCE_EXHAUSTED' not in str(error):
    raise error
  return str(error).strip().splitlines()[0]
