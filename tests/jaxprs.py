"""What a function does, equation by equation, before XLA sees it."""

from collections.abc import Callable
from collections.abc import Iterator
from typing import Any

import jax


def equations(f: Callable[..., Any], *args: Any) -> Iterator[Any]:
  """Every equation of the jaxpr of `f(*args)`, those of inner jaxprs too.

  What only a derivative rule would do is not among them.
  """
  yield from _inside(jax.make_jaxpr(f)(*args))


def _inside(value: Any) -> Iterator[Any]:
  value = getattr(value, 'jaxpr', value)
  if isinstance(value, list | tuple):
    for part in value:
      yield from _inside(part)
  for equation in getattr(value, 'eqns', ()):
    yield equation
    for parameter in equation.params.values():
      yield from _inside(parameter)


def count(primitive: str, f: Callable[..., Any], *args: Any) -> int:
  """How many equations of one primitive there are."""
  return sum(e.primitive.name == primitive for e in equations(f, *args))


def largest(f: Callable[..., Any], *args: Any) -> int:
  """The number of elements of the largest array that is made on the way."""
  return max(out.aval.size for e in equations(f, *args) for out in e.outvars)
