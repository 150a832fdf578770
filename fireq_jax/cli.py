"""What every script shares: flags, one-line errors, exit codes.

Exit codes: 0 done, 2 bad input, 3 the machine lacks something, 130 and 143
interrupted, 1 a bug of ours (the only case that prints a traceback).
"""

import contextlib
import inspect
import logging
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import jax
from absl import flags

from fireq_jax.errors import ConfigError, FireQError, ResourceError


def run(
  argv: Sequence[str] | None,
  define_flags: Callable[[flags.FlagValues], None],
  body: Callable[[flags.FlagValues], None],
) -> int:
  """Parses `argv` (None = the process's), calls `body`, returns the exit code.

  The flags live in a `FlagValues` of their own, so several scripts can run in
  one process. Errors become one line on stderr; `--debug` adds a traceback.
  """
  argv = list(sys.argv if argv is None else argv)
  values = flags.FlagValues()
  flags.DEFINE_bool(
    "debug", False, "Print the traceback of an error.", flag_values=values
  )
  define_flags(values)
  signals: list[int] = []
  try:
    if {"-h", "--help", "-help"} & set(argv[1:]):
      print(f"{inspect.getdoc(inspect.getmodule(body))}\n\nFlags:")
      print(values.get_help().split("\nabsl.flags:")[0], flush=True)
      return 0
    with _signals_as_exceptions(signals), _one_line_warnings():
      _parse(argv, values)
      with contextlib.nullcontext() if values.debug else _quiet_libraries():
        body(values)
      sys.stdout.flush()
    return 0
  except BrokenPipeError:  # the reader left, as in `... | head`
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
  except BaseException as error:
    # A library may have made another exception of the interrupt.
    if signals or isinstance(error, KeyboardInterrupt):
      print("interrupted", file=sys.stderr)
      return 128 + (signals or [signal.SIGINT])[0]
    known = _as_user_error(error)
    if known is None or "--debug" in argv:
      traceback.print_exc()
    print(f"error: {known or repr(error)}", file=sys.stderr)
    return known.exit_code if known else 1


def check_output_file(path: str) -> None:
  """Raises now what would keep a file from being written at `path` later.

  Raises:
    ConfigError: a folder, or there is none to hold it.
    ResourceError: no permission.
  """
  file = Path(path)
  if file.is_dir():
    raise ConfigError("a folder, not a file", where=path)
  if not file.parent.is_dir():
    raise ConfigError("no such folder", where=file.parent)
  if not os.access(file if file.exists() else file.parent, os.W_OK):
    raise ResourceError("no permission to write", where=path)


def leave(code: int) -> NoReturn:
  """Ends the process with what `run` returned; it is too late to interrupt it.

  After an interrupt the interpreter is not torn down: compilations that were
  cut short make XLA crash there, which would hide the exit code.
  """
  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
  if code in (130, 143):
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
  sys.exit(code)


def _parse(argv: list[str], values: flags.FlagValues) -> None:
  try:
    rest = values(argv)
  except flags.Error as error:
    raise ConfigError(str(error).replace("\n", " ")) from error
  if len(rest) > 1:
    raise ConfigError("unexpected argument", got=repr(rest[1]))


def _as_user_error(error: BaseException) -> FireQError | None:
  """Returns what the user is told, or None if the error is a bug of ours."""
  if isinstance(error, FireQError):
    return error
  if isinstance(error, OSError):
    return ResourceError(error.strerror or str(error), where=error.filename)
  out_of_memory = isinstance(error, MemoryError) or (
    isinstance(error, jax.errors.JaxRuntimeError)
    and "RESOURCE_EXHAUSTED" in str(error)
  )
  if out_of_memory:
    return ResourceError(
      "out of memory", got=str(error).split("\n")[0] or "MemoryError"
    )
  return None


@contextlib.contextmanager
def _one_line_warnings() -> Iterator[None]:
  def show(message, category, filename, lineno, file=None, line=None):
    print(f"warning: {message}", file=sys.stderr)

  with warnings.catch_warnings():
    warnings.showwarning = show
    yield


@contextlib.contextmanager
def _quiet_libraries() -> Iterator[None]:
  """Leaves errors to their one line.

  When a disk is full, orbax also logs a traceback, and the event loop that it
  abandons causes one for every array not yet written.
  """
  loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
  levels, hook = [logger.level for logger in loggers], sys.unraisablehook
  for logger in loggers:
    logger.setLevel(logging.CRITICAL)
  sys.unraisablehook = lambda _: None
  try:
    yield
  finally:
    for logger, level in zip(loggers, levels):
      logger.setLevel(level)
    sys.unraisablehook = hook


@contextlib.contextmanager
def _signals_as_exceptions(received: list[int]) -> Iterator[None]:
  """Lets SIGINT and SIGTERM unwind the stack, so that temporary files go.

  Args:
    received: gets the number of every signal that comes.
  """
  if threading.current_thread() is not threading.main_thread():
    yield
    return

  def stop(number, frame):
    received.append(number)
    raise KeyboardInterrupt

  before = {
    number: signal.signal(number, stop)
    for number in (signal.SIGINT, signal.SIGTERM)
    if signal.getsignal(number) != signal.SIG_IGN  # as in the background
  }
  try:
    yield
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)
