"""What can go wrong through no fault of ours, and what the user is told.

Every message is one line: what is wrong, where, what was expected, what was
found, and a hint. `exit_code` is what a script returns for the error.
"""

import contextlib
import errno
import os
from collections.abc import Iterator


class FireQError(Exception):
  """Base of every error a user can cause or meet.

  Attributes:
    exit_code: process status of a script that ends with this error.
  """

  exit_code = 2

  def __init__(
    self,
    what: str,
    *,
    where: object = None,
    expected: object = None,
    got: object = None,
    hint: str | None = None,
  ):
    parts = [f"{where}: {what}" if where is not None else what]
    if expected is not None:
      parts.append(f"expected {expected}")
    if got is not None:
      parts.append(f"got {got}")
    message = ", ".join(parts)
    message = f"{message} ({hint})" if hint else message
    printable = (c if c.isprintable() else " " for c in message)
    super().__init__("".join(printable))


class CheckpointError(FireQError):
  """A source or quantised checkpoint is damaged, incomplete or foreign."""


class ConfigError(FireQError):
  """A model configuration, recipe or option is invalid."""


class UnsupportedError(FireQError):
  """The input is valid, but of a kind this library does not handle."""


class DataError(FireQError):
  """Calibration or evaluation data, or a prompt, cannot be used."""


class QuantizationError(FireQError):
  """Values cannot be quantised: not finite, or already quantised."""


class ResourceError(FireQError):
  """The machine lacks something: disk, memory, permission or a device."""

  exit_code = 3


@contextlib.contextmanager
def disk_errors(where: str | os.PathLike) -> Iterator[None]:
  """Turns failures of the file system at `where` into ours."""
  try:
    yield
  except OSError as error:
    if error.errno in (errno.ENAMETOOLONG, errno.EINVAL):
      raise CheckpointError(
        "not a usable path", where=f"{where}"[:100], got=error.strerror
      ) from error
    raise ResourceError(
      error.strerror or str(error), where=error.filename or where
    ) from error
