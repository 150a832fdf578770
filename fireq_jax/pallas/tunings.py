"""Which tuning of the INT4 matmul to use, by measured speed of its tiles."""

import functools
import json
import math
from importlib import resources
from typing import Literal

import jax.numpy as jnp

from fireq_jax.pallas.int4_matmul import Tuning
from fireq_jax.pallas.layouts import ROWS, PackedInt4

Mode = Literal["e4m3", "exact", "bf16"]


@functools.cache
def table() -> list[tuple[Tuning, dict[Mode, float]]]:
  """Tunings, and the ns that a step of 128 along C takes with each."""
  text = (
    resources.files("fireq_jax.pallas").joinpath("tunings.json").read_text()
  )
  return [
    (Tuning(**{k: v for k, v in row.items() if k != "ns"}), row["ns"])
    for row in json.loads(text)["rows"]
  ]


def choose(t: int, w: PackedInt4) -> Tuning:
  """The fastest tuning for `t` tokens.

  A kernel takes as long as the CTA with the most tiles, so this weighs waves
  against the cost of a tile. All steps of all shapes cost the same, so the
  input size does not matter. Of equals, the tile of fewer tokens is best.
  """
  n = w.shape[0]
  mode: Mode = "e4m3" if w.scale.dtype == jnp.float8_e4m3fn else "exact"
  if w.activation == "bf16":
    mode = "bf16"

  def cost(tuning, ns):
    tiles = math.ceil(n / tuning.rows) * math.ceil(t / tuning.tile_t)
    return math.ceil(tiles / tuning.ctas) * ns[mode], tuning.tile_t

  return min(
    (
      (tuning, ns)
      for tuning, ns in table()
      if mode in ns
      and (n % tuning.rows == 0 or tuning.rows >= ROWS)
      and not (w.gated and (tuning.row_groups % 2 or tuning.tile_t < 16))
    ),
    key=lambda entry: cost(*entry),
  )[0]
