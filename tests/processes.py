"""Python code in processes of its own, for what a test cannot do to itself."""

import os
from pathlib import Path
import subprocess
import sys
import textwrap
import time

ROOT = Path(__file__).parents[1]


def start(body: str, *args: object, **environment: str) -> subprocess.Popen:
  """Runs code, with `args` in sys.argv[1:], from the repository's root."""
  return subprocess.Popen(
    [sys.executable, '-c', textwrap.dedent(body), *map(str, args)],
    cwd=ROOT,
    env=os.environ | environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def finish(process: subprocess.Popen) -> tuple[int, str, str, float]:
  """(exit code, stdout, stderr, seconds it took from here on)."""
  begin = time.monotonic()
  try:
    out, err = process.communicate(timeout=20)
  finally:
    process.kill()
  return process.returncode, out, err, time.monotonic() - begin


def wait_for_line(process: subprocess.Popen, line: str) -> None:
  """Reads one line of the process's output, which is `line`."""
  assert process.stdout.readline().strip() == line
