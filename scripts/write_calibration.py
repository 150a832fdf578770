"""Lets a model write calibration text for its own quantisation.

  python scripts/write_calibration.py --ckpt DIR --out written.npy
  python scripts/quantize.py --ckpt DIR --calib written.npy --num_calib 1000

--ckpt is a Hugging Face folder or one of our checkpoints: a model too large
to run in float may write with its own INT4 weights.
"""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import flags

from fireq_jax import atomic, cli
from fireq_jax.errors import ConfigError
from fireq_jax.loading import load_model
from fireq_jax.prepare import prepare
from fireq_jax.selftext import write_windows


def define_flags(values: flags.FlagValues) -> None:
  define = {"flag_values": values}
  flags.DEFINE_string("ckpt", None, "Model folder.", required=True, **define)
  flags.DEFINE_string("out", None, "New .npy file.", required=True, **define)
  flags.DEFINE_integer(
    "num_windows", 1000, "How many.", lower_bound=1, **define
  )
  flags.DEFINE_integer(
    "seq_len", 512, "Tokens of each.", lower_bound=2, **define
  )
  flags.DEFINE_integer("batch", 128, "At a time.", lower_bound=1, **define)
  flags.DEFINE_integer("seed", 0, "Of the sampling.", lower_bound=0, **define)


def run(values: flags.FlagValues) -> None:
  start = time.perf_counter()
  out = Path(values.out)
  if out.suffix != ".npy" or out.exists():
    raise ConfigError("--out must be a new .npy file", got=str(out))
  cli.check_output_file(values.out)
  model = load_model(values.ckpt)
  model = dataclasses.replace(model, params=prepare(model.params, donate=True))
  windows = write_windows(
    model,
    count=values.num_windows,
    length=values.seq_len,
    seed=values.seed,
    batch=values.batch,
  )
  with atomic.staging(out) as file:
    with open(file, "xb") as stream:
      np.save(stream, windows)
    atomic.publish(file, out, overwrite=False)
  print(f"wrote         {out}: {len(windows)} windows of {values.seq_len}")
  print(f"elapsed       {time.perf_counter() - start:.1f} s")


def main(argv: Sequence[str] | None = None) -> int:
  return cli.run(argv, define_flags, run)


if __name__ == "__main__":
  cli.leave(main())
