"""Which tuning of the INT4 matmul to use, by measured speed of its tiles."""

import functools
import json
import math
from importlib import resources
from typing import Literal

import jax.numpy as jnp

from fireq_jax.pallas.int4_matmul import Tuning
from fireq_jax.pallas.layouts import BLOCK, ROWS, PackedInt4

Mode = Literal["e4m3", "exact", "bf16"]
EXCHANGE_NS = 2000  # that a shared tile takes longer


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
  against the cost of a tile, and that against the cost of sharing it. Shared
  tiles must all be under way at once. Of equals, fewer tokens a tile are best.
  """
  n, c = w.shape
  mode: Mode = "e4m3" if w.scale.dtype == jnp.float8_e4m3fn else "exact"
  if w.activation == "bf16":
    mode = "bf16"

  def tiles(tuning):
    return math.ceil(n / tuning.rows) * math.ceil(t / tuning.tile_t)

  def fits(tuning):
    if w.gated and (tuning.row_groups % 2 or tuning.tile_t < 16):
      return False
    if tuning.split > 1:
      return not w.gated and tiles(tuning) * tuning.split <= tuning.ctas
    return n % tuning.rows == 0 or tuning.rows >= ROWS

  def cost(entry):
    tuning, ns = entry
    waves = math.ceil(tiles(tuning) * tuning.split / tuning.ctas)
    blocks = math.ceil(c / BLOCK / tuning.split)
    exchange = EXCHANGE_NS if tuning.split > 1 else 0
    return waves * blocks * ns[mode] + exchange, tuning.tile_t

  entries = [e for e in table() if mode in e[1] and fits(e[0])]
  return min(entries, key=cost)[0]
