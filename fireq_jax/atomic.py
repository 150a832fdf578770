"""Folders and files that appear, or are replaced, all at once.

Work happens in a locked temporary sibling; publishing is one rename. Where
the system can exchange two names in one step (Linux), an overwrite has no
instant without a complete folder under the final name; elsewhere the old one
is called `backup_path(target)` for that instant.
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from fireq_jax.errors import ResourceError


def backup_path(target: Path) -> Path:
  """Where an interrupted overwrite may have left the old folder."""
  return target.with_name(f".{target.name[:200]}.old")


def is_temporary(folder: Path) -> bool:
  """Whether `folder` is the work of an unfinished `staging`."""
  return folder.name == "new" and ".new-" in folder.parent.name


@contextlib.contextmanager
def staging(target: Path) -> Iterator[Path]:
  """Yields a path `.../new` beside `target` to create and then `publish`.

  It is removed on the way out. What killed processes left for the same
  target carries no lock, and is swept first.
  """
  target.parent.mkdir(parents=True, exist_ok=True)
  prefix = f".{target.name[:200]}.new-"
  for stale in target.parent.iterdir():
    if stale.name.startswith(prefix):
      with _lock(stale, fcntl.LOCK_EX | fcntl.LOCK_NB) as ours:
        if ours:
          shutil.rmtree(stale, ignore_errors=True)
  while True:
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
    with _lock(folder, fcntl.LOCK_EX) as ours:
      if not ours:  # swept by another process before the lock was taken
        continue
      try:
        yield folder / "new"
      except BaseException:
        _remove_for_good(folder)
        raise
      shutil.rmtree(folder, ignore_errors=True)
      return


def publish(folder: Path, target: Path, *, overwrite: bool) -> None:
  """Gives `folder` (or file), on disk to the last byte, the name `target`.

  Raises:
    ResourceError: `target` exists (and is not empty) without `overwrite`.
  """
  for path in [folder, *folder.rglob("*")]:
    _flush(path)
  replaced = False
  if overwrite and target.exists():
    replaced = _exchange(folder, target)
    if not replaced:
      os.rename(target, backup_path(target))
  if not replaced:
    try:
      if target.is_file():  # which a rename would replace
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
      os.rename(folder, target)
    except OSError as error:
      if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
        raise
      raise ResourceError(
        "another process wrote here meanwhile", where=target
      ) from error
  _flush(target.parent)
  shutil.rmtree(backup_path(target), ignore_errors=True)


def _remove_for_good(folder: Path) -> None:
  """Removes what threads that a failure abandoned may write to for a while."""
  absent = 0
  for _ in range(100):
    shutil.rmtree(folder, ignore_errors=True)
    absent = 0 if folder.exists() else absent + 1
    if absent == 7:
      return
    time.sleep(0.05)


@contextlib.contextmanager
def _lock(folder: Path, mode: int) -> Iterator[bool]:
  """Yields whether `folder` was locked and still exists."""
  try:
    handle = os.open(folder, os.O_RDONLY)
  except FileNotFoundError:
    yield False
    return
  try:
    try:
      fcntl.flock(handle, mode)
      held = folder.exists()
    except BlockingIOError:
      held = False
    yield held
  finally:
    os.close(handle)


def _flush(path: Path) -> None:
  handle = os.open(path, os.O_RDONLY)
  try:
    os.fsync(handle)
  finally:
    os.close(handle)


def _exchange(a: Path, b: Path) -> bool:
  """Swaps two names in one step; False where the system cannot."""
  renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
  if renameat2 is None:
    return False
  at_cwd, rename_exchange = -100, 2
  old, new = os.fsencode(a), os.fsencode(b)
  if renameat2(at_cwd, old, at_cwd, new, rename_exchange) == 0:
    return True
  code = ctypes.get_errno()
  if code in (errno.ENOSYS, errno.EINVAL):
    return False
  raise OSError(code, os.strerror(code), str(b))
