"""Scripts that end before they are done leave nothing partial."""

import os
import random
import shutil
import signal
import time

import numpy as np
import pytest
import quantize
import write_calibration
from command_line import arguments, digests, script, start

from fireq_jax import checkpoint, pipeline
from fireq_jax.errors import CheckpointError


@pytest.mark.parametrize(
  "error, code",
  [
    (KeyboardInterrupt(), 130),
    (MemoryError(), 3),
    (OSError(28, "No space left on device", "/x"), 3),
    (ZeroDivisionError("a bug"), 1),
  ],
)
def test_what_happens_midway(
  error, code, source, calib, tmp_path, monkeypatch, capsys
):
  def fail(*args, **kwargs):
    raise error

  monkeypatch.setattr(pipeline, "quantize_model", fail)
  before = digests(tmp_path)
  assert quantize.main(arguments(source, tmp_path / "out", calib)) == code
  printed = capsys.readouterr().err
  assert ("Traceback" in printed) == (code == 1)
  assert digests(tmp_path) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
  "module, name",
  [
    (pipeline, "quantize_model"),
    (checkpoint.ocp, "save"),
    (checkpoint.ocp, "metadata"),
    (checkpoint.ocp, "load"),
  ],
)
def test_a_library_cannot_swallow_a_signal(
  module, name, number, source, calib, tmp_path, monkeypatch, capsys
):
  work = getattr(module, name)

  def swallow(*args, **kwargs):
    monkeypatch.setattr(module, name, work)
    try:
      os.kill(os.getpid(), number)
      time.sleep(0.1)
    except BaseException as error:
      raise RuntimeError("something went wrong") from error
    return work(*args, **kwargs)

  monkeypatch.setattr(module, name, swallow)
  before = digests(tmp_path)
  handler = signal.signal(number, signal.default_int_handler)
  code = quantize.main(arguments(source, tmp_path / "out", calib))
  signal.signal(number, handler)
  assert code == 128 + number
  assert capsys.readouterr().err == "interrupted\n"
  assert digests(tmp_path) == before and not list(tmp_path.glob(".out*"))


def test_an_ignored_signal_stays_ignored(
  source, calib, tmp_path, monkeypatch, capsys
):
  convert = pipeline.quantize_model

  def interrupted(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGINT)
    return convert(*args, **kwargs)

  monkeypatch.setattr(pipeline, "quantize_model", interrupted)
  handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
  code = quantize.main(arguments(source, tmp_path / "out", calib))
  signal.signal(signal.SIGINT, handler)
  assert code == 0 and capsys.readouterr().err == ""


def test_calibration_is_written_whole_or_not(source, tmp_path, monkeypatch):
  written = tmp_path / "written.npy"
  command = ["x.py", f"--ckpt={source}", f"--out={written}", "--seq_len=16"]

  def fill_the_disk(stream, windows):
    stream.write(b"some of it")
    raise OSError(28, "No space left on device")

  def come_second(stream, windows):
    written.write_text("another's")

  monkeypatch.setattr(
    write_calibration,
    "write_windows",
    lambda model, **options: np.zeros((1, 16), np.int32),
  )
  monkeypatch.setattr(np, "save", fill_the_disk)
  before = digests(tmp_path)
  assert write_calibration.main(command) == 3
  assert digests(tmp_path) == before
  monkeypatch.setattr(np, "save", come_second)
  assert write_calibration.main(command) == 3
  assert written.read_text() == "another's"


@pytest.mark.slow
def test_interrupted_processes_leave_nothing_partial(source, calib, tmp_path):
  """Signals at random moments: no output or a complete one."""
  out = tmp_path / "out"
  command = arguments(source, out, calib)
  process = [script(command[0]), *command[1:]]
  rng = random.Random(2)
  for number, code in (
    (signal.SIGINT, 130),
    (signal.SIGTERM, 143),
    (signal.SIGKILL, -9),
    (signal.SIGKILL, -9),
  ):
    child = start(process)
    assert child.stdout is not None
    child.stdout.readline()  # the plan: signals are handled from here on
    time.sleep(rng.uniform(0, 3))
    child.send_signal(number)
    said = child.communicate(timeout=300)
    assert child.returncode in (0, code), (number, child.returncode, said)
    if out.exists():
      checkpoint.inspect(out, verify=True)
      shutil.rmtree(out)
    if number != signal.SIGKILL:
      assert not list(tmp_path.glob(".out*"))
  with pytest.raises(CheckpointError):
    checkpoint.load(out)
  assert quantize.main(command) == 0
  assert not list(tmp_path.glob(".out*"))
