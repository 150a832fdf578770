"""Says what a checkpoint is, and with --verify whether it is intact.

python scripts/inspect_ckpt.py --ckpt demo-fireq --verify
"""

import dataclasses
import re
from collections.abc import Sequence

from absl import flags

from fireq_jax import checkpoint, cli, recipe
from fireq_jax.kv_cache import bytes_per_token
from fireq_jax.plan import size


def define_flags(values: flags.FlagValues) -> None:
  flags.DEFINE_string(
    "ckpt", None, "A checkpoint of ours.", required=True, flag_values=values
  )
  flags.DEFINE_bool(
    "verify",
    False,
    "Read every value and compare its digest.",
    flag_values=values,
  )


def run(values: flags.FlagValues) -> None:
  manifest = checkpoint.inspect(values.ckpt, verify=values.verify)
  print("# model")
  for name, value in dataclasses.asdict(manifest.config).items():
    print(f"{name}: {value}")
  print("\n# recipe\n" + recipe.dumps(manifest.recipe).rstrip())
  print("\n# made from")
  for name, digest in manifest.source.items():
    print(f"{name} sha256 {digest}")
  print(f"calibration: {dict(manifest.calibration) or None}")
  print(f"written by: {dict(manifest.producer)}")
  print("\n# leaves (of layer 0 for all layers)")
  for name, leaf in manifest.leaves.items():
    if not re.match(r"model/layers/[1-9]", name):
      print(f"{name}: {leaf} {leaf.logical_dtype}")
  kv = bytes_per_token(manifest.config, manifest.recipe.kv)
  print(f"\n{len(manifest.leaves)} leaves, {size(manifest.total_bytes)}")
  print(f"KV cache {kv} bytes a token")
  if values.verify:
    print("verified: every value is what was written")


def main(argv: Sequence[str] | None = None) -> int:
  return cli.run(argv, define_flags, run)


if __name__ == "__main__":
  cli.leave(main())
