"""Frozen dataclasses as plain dicts, lists and scalars, and back, checked."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar

from fireq_jax.config import check
from fireq_jax.errors import ConfigError

T = TypeVar("T")


def to_plain(instance: Any) -> dict[str, Any]:
  """Returns a dataclass as nested dicts, lists and scalars."""
  return _plain(dataclasses.asdict(instance))


def from_plain(cls: type[T], values: Any, where: str) -> T:
  """Inverse of `to_plain`; `where` names the source in errors.

  Raises:
    ConfigError: an unknown or missing key, or an invalid value.
  """
  check(
    isinstance(values, Mapping),
    "not a mapping of names to values",
    where=where,
    got=repr(values),
  )
  fields = {f.name: f for f in dataclasses.fields(typing.cast(Any, cls))}
  for key in values:
    check(
      key in fields,
      f"unknown key {key!r}{near(str(key), fields)}",
      where=where,
      expected="one of " + ", ".join(fields),
    )
  for name, field in fields.items():
    required = (
      field.default is dataclasses.MISSING
      and field.default_factory is dataclasses.MISSING
    )
    check(not required or name in values, f"no {name!r}", where=where)
  hints = typing.get_type_hints(cls)
  arguments = {
    key: _convert(hints[key], value, f"{where}: {key}")
    for key, value in values.items()
  }
  try:
    return cls(**arguments)
  except ConfigError as error:
    raise ConfigError(str(error), where=where) from error


def near(name: str, known: Iterable[str]) -> str:
  """Returns ", did you mean 'x'?" or nothing, to end an error message."""
  matches = difflib.get_close_matches(name, list(known), n=1)
  return f", did you mean {matches[0]!r}?" if matches else ""


def _plain(value: Any) -> Any:
  if isinstance(value, dict):
    return {k: _plain(v) for k, v in value.items()}
  return [_plain(v) for v in value] if isinstance(value, tuple) else value


def _convert(hint: Any, value: Any, where: str) -> Any:
  """Returns `value` (from YAML or JSON) as the annotated type `hint`."""
  origin, inner = typing.get_origin(hint), typing.get_args(hint)
  if origin is types.UnionType:
    (other,) = (t for t in inner if t is not types.NoneType)
    return None if value is None else _convert(other, value, where)
  if origin is tuple:
    check(isinstance(value, list), "not a list", where=where, got=repr(value))
    return tuple(
      _convert(inner[0], v, f"{where}[{i}]") for i, v in enumerate(value)
    )
  if origin is Literal:
    return value
  if dataclasses.is_dataclass(hint):
    return from_plain(typing.cast(type, hint), value, where)
  number = isinstance(value, int | float) and not isinstance(value, bool)
  if hint is float and number:
    return float(value)
  check(
    type(value) is hint,
    "wrong type",
    where=where,
    expected=hint.__name__,
    got=repr(value),
    hint="YAML reads 1.0e-5 as a number, 1e-5 as text"
    if hint is float
    else None,
  )
  return value
