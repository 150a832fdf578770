"""The scripts as functions and as processes."""

import os
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

ROOT = Path(__file__).parent.parent


def digests(folder: Path) -> dict[str, str]:
  return {
    str(p.relative_to(folder)): sha256(p.read_bytes()).hexdigest()
    for p in sorted(folder.rglob("*"))
    if p.is_file()
  }


def arguments(source, out, calib, *more) -> list[str]:
  return [
    "quantize.py",
    f"--ckpt={source}",
    f"--out={out}",
    f"--calib={calib}",
    "--num_calib=2",
    "--seq_len=32",
    *more,
  ]


def start(command: list[str], cwd: Path | None = None) -> subprocess.Popen:
  return subprocess.Popen(
    [sys.executable, *command],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    cwd=cwd,
    env=os.environ
    | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "COLUMNS": "80"},
  )


def script(name: str) -> str:
  return str(ROOT / "scripts" / name)
