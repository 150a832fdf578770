"""Benchmarks: python scripts/bench.py NAME [flags].

NAME is a module of `scripts/benchmarks`; `bench.py NAME --help` lists its
flags. Each prints a table for people and a JSON report as the last line.
"""

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import common

from fireq_jax import cli


def main(argv: Sequence[str] | None = None) -> int:
  argv = list(sys.argv if argv is None else argv)
  folder = Path(__file__).parent / "benchmarks"
  names = sorted(
    {p.stem for p in folder.glob("*.py")}
    - {"__init__", "common", "attention_peers"}
  )
  if {"-h", "--help"} & set(argv[1:2]):
    print(f"{__doc__}\nNAME: {', '.join(names)}")
    return 0
  if len(argv) < 2 or argv[1] not in names:
    print(__doc__)
    print(f"error: expected one of {', '.join(names)}", file=sys.stderr)
    return 2
  module = importlib.import_module(f"benchmarks.{argv[1]}")
  return common.main(module, argv[1:])


if __name__ == "__main__":
  cli.leave(main())
