"""Measures the tiles of fireq_jax/pallas/tunings.json again, on this card.

  python scripts/tune_int4_matmul.py

Replaces the file unless --out names another one. Each tuning runs on a weight
that gives every CTA the same number of tiles, so that its time is a constant
for the call, one for sharing a tile, and a cost for each block of 128 columns.
"""

import dataclasses
import datetime
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import flags
from benchmarks import common, gemm

from fireq_jax import cli
from fireq_jax.errors import ResourceError
from fireq_jax.pallas import tunings
from fireq_jax.pallas.device import require_hopper
from fireq_jax.pallas.int4_matmul import int4_matmul
from fireq_jax.qtensor import quantize_e4m3

MODES = {"e4m3": "e4m3", "exact": "bf16", "bf16": "w4a16"}
CALL_US = 2.5
WIDTH = 4096
TILES = 2  # of a CTA that shares none


def define_flags(values: flags.FlagValues) -> None:
  flags.DEFINE_string(
    "out",
    str(Path(tunings.__file__).with_name("tunings.json")),
    "Where the table goes.",
    flag_values=values,
  )


def run(values: flags.FlagValues) -> None:
  cli.check_output_file(values.out)
  try:
    require_hopper()
  except NotImplementedError as error:
    raise ResourceError(str(error)) from error
  rows = []
  for tuning, known in tunings.table():
    shared = tuning.split > 1
    tiles = 1 if shared else TILES
    n = tuning.rows * (tuning.ctas // tuning.split) * tiles
    ns = {}
    for mode in known:
      time = 1e3 * (_us(tuning, n, MODES[mode]) - CALL_US)
      time -= tunings.cluster_ns(tuning)
      ns[mode] = round(time / (tiles * WIDTH / 128 / tuning.split))
    rows.append(dataclasses.asdict(tuning) | {"ns": ns})
    print(rows[-1], file=sys.stderr)
  table = {
    "card": jax.devices()[0].device_kind,
    "date": datetime.date.today().isoformat(),
    "command": "python scripts/tune_int4_matmul.py",
    "rows": rows,
  }
  Path(values.out).write_text(json.dumps(table, indent=1) + "\n")
  print(f"wrote         {values.out}")


def _us(tuning, n, mode):
  scale = jnp.float8_e4m3fn if mode == "e4m3" else jnp.bfloat16
  weights = [
    gemm.weight(i, n, WIDTH, scale, mode)
    for i in range(gemm.copies(n * WIDTH / 2))
  ]
  x = jax.random.normal(jax.random.key(0), (tuning.tile_t, WIDTH), jnp.bfloat16)
  x_scale = None
  if mode != "w4a16":
    x, x_scale = quantize_e4m3(x)
  call = jax.jit(
    lambda w, x, x_scale: int4_matmul(x, w, x_scale, tuning=tuning)
  )
  return common.device_us(call, [(w, x, x_scale) for w in weights])


def main(argv: Sequence[str] | None = None) -> int:
  return cli.run(argv, define_flags, run)


if __name__ == "__main__":
  cli.leave(main())
