"""Quantises a Llama: a Hugging Face folder becomes a checkpoint.

  python scripts/quantize.py --ckpt demo
  python scripts/quantize.py --ckpt DIR --out DIR --recipe fireq --calib FILE

Everything cheap is checked, and the plan printed, before a weight is read.
The source is never modified, and nothing appears at --out before it is whole.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import flags
from tqdm import tqdm

from fireq_jax import calibrate, checkpoint, cli, hf, pipeline, recipe
from fireq_jax.config import LlamaConfig
from fireq_jax.errors import ConfigError
from fireq_jax.loading import DEMO, resolve
from fireq_jax.models import llama_hf
from fireq_jax.plan import check_memory, make_plan, size
from fireq_jax.tokenizer import Tokenizer


def define_flags(values: flags.FlagValues) -> None:
  define = {"flag_values": values}
  flags.DEFINE_string(
    "ckpt", None, "Hugging Face folder, or `demo`.", required=True, **define
  )
  flags.DEFINE_string(
    "out", None, "New folder; default: NAME-RECIPE here.", **define
  )
  flags.DEFINE_string(
    "recipe",
    "fireq",
    f"One of {', '.join(recipe.presets())}, or a YAML file.",
    **define,
  )
  flags.DEFINE_multi_string(
    "calib",
    None,
    "Calibration data: text, .jsonl, or .npy of token ids; repeatable;"
    " default: a short text in the package.",
    **define,
  )
  flags.DEFINE_integer(
    "num_calib", 128, "Calibration windows.", lower_bound=1, **define
  )
  flags.DEFINE_integer(
    "seq_len", 512, "Tokens of a calibration window.", lower_bound=1, **define
  )
  flags.DEFINE_integer(
    "seed", 0, "Chooses the windows.", lower_bound=0, **define
  )
  flags.DEFINE_bool("overwrite", False, "Replace a checkpoint.", **define)
  flags.DEFINE_bool("dry_run", False, "Print the plan and stop.", **define)
  flags.DEFINE_bool("verify", True, "Read back what was written.", **define)


def run(values: flags.FlagValues) -> None:
  start = time.perf_counter()
  steps = recipe.load(values.recipe)
  folder = resolve(values.ckpt)
  source = hf.open_checkpoint(folder)
  config = LlamaConfig.from_hf(source.config, source.generation_config)
  llama_hf.check_complete(source, config)
  steps.check_model(config)
  out = values.out or f"{folder.name}-{steps.name}"
  tokens, calibration = None, {}
  if steps.needs_calibration:
    tokens, calibration = read_calibration(values, folder, config)
  plan = make_plan(
    config,
    steps,
    bytes_in=source.total_bytes,
    calibration_tokens=0 if tokens is None else tokens.size,
  )
  target = checkpoint.check_destination(
    out,
    overwrite=values.overwrite,
    needed_bytes=plan.disk_bytes,
    source=folder,
  )
  check_memory(plan.peak_bytes)
  print(f"model         {folder}\nrecipe        {steps.name}\n{plan}")
  print(f"output        {target}", flush=True)
  if values.dry_run:
    return
  errors, seconds = [], []
  with tqdm(total=plan.layers, unit="layer", disable=None) as bar:

    def on_layer(report: pipeline.LayerReport) -> None:
      errors.append(report.weight_error)
      seconds.append(report.seconds)
      bar.update()

    params = pipeline.quantize_model(
      pipeline.Source(
        embedding=lambda: llama_hf.load_embedding(source, config),
        layer=lambda i: llama_hf.load_layer(source, config, i),
        head=lambda: llama_hf.load_head(source, config),
      ),
      config,
      steps,
      tokens,
      on_layer=on_layer,
    )
  manifest = checkpoint.save(
    target,
    params,
    config=config,
    recipe=steps,
    source=checkpoint.Provenance(
      digests=source.sha256(),
      calibration=calibration,
      side_files=source.side_files,
    ),
    overwrite=values.overwrite,
    verify=values.verify,
  )
  ratio = plan.bytes_in / manifest.total_bytes
  print(f"wrote         {target}")
  print(f"size          {size(manifest.total_bytes)}, {ratio:.2f} x smaller")
  print(f"weight error  {np.mean(errors):.2%} root mean square, layers' mean")
  others = np.median(seconds[1:] or seconds)
  print(f"layers        {seconds[0]:.1f} s, then {others:.1f} s each")
  print(f"elapsed       {time.perf_counter() - start:.1f} s")


def read_calibration(
  values: flags.FlagValues, folder: Path, config: LlamaConfig
) -> tuple[np.ndarray, dict]:
  """Returns windows of tokens i32 [W, T], and how they were chosen."""
  if values.seq_len > config.max_position_embeddings:
    raise ConfigError(
      "seq_len is beyond the model's positions",
      expected=f"at most {config.max_position_embeddings}",
      got=values.seq_len,
    )
  calib = values.calib or [resolve(DEMO) / "calibration.txt"]
  paths = [Path(path) for path in calib]
  if not values.calib and values.ckpt != DEMO:
    print(
      "warning: calibrating on a short text in English; --calib names a better"
      " one",
      file=sys.stderr,
    )
  encode = None
  if any(path.suffix != ".npy" for path in paths):
    encode = Tokenizer(folder, config.vocab_size).encode
  texts = [
    calibrate.read_tokens(path, vocab_size=config.vocab_size, encode=encode)
    for path in paths
  ]
  windows = calibrate.cut_windows(
    *texts, count=values.num_calib, length=values.seq_len, seed=values.seed
  )
  return windows, {
    "file": " ".join(path.name for path in paths),
    "windows": len(windows),
    "seq_len": values.seq_len,
    "seed": values.seed,
  }


def main(argv: Sequence[str] | None = None) -> int:
  return cli.run(argv, define_flags, run)


if __name__ == "__main__":
  cli.leave(main())
