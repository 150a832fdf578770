"""Which tuning of the INT4 matmul to use, by measured speed of its tiles."""

import dataclasses
import functools
import json
import math
from importlib import resources
from typing import Literal

import jax.numpy as jnp

from fireq_jax.pallas.int4_matmul import Tuning
from fireq_jax.pallas.layouts import BLOCK, ROWS, PackedInt4

Mode = Literal["e4m3", "exact", "bf16"]
_CUT_TOKENS = 64  # parts of tiles have so many, or a multiple
# Of a tile where the kernel quantises: 64 and 256 are faster then.
_SLOW_ROWS = 48, 192
_CUT_NS = 1500  # that the code for the parts takes longer


def cluster_ns(tuning: Tuning) -> float:
  """That a call takes longer with clusters of CTAs."""
  if tuning.split > 1:
    return 750 + 0.06 * tuning.rows * tuning.tile_t
  return 1700 if tuning.multicast else 0


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


def cuts(tuning: Tuning) -> list[int]:
  """Into how many parts a tile of the last wave may be cut."""
  if tuning.split > 1:
    return []
  return [cut for cut in (2, 3, 4) if tuning.tile_t % (cut * _CUT_TOKENS) == 0]


def choose(t: int, w: PackedInt4, *, quantises: bool = False) -> Tuning:
  """The fastest tuning for `t` tokens, which the kernel quantises or not.

  A kernel takes as long as the CTA with the most tiles, so this weighs waves
  against the cost of a tile, and that against the cost of sharing it. Shared
  tiles must all be under way at once, and so must the parts into which tiles of
  the last wave may be cut. Of equals, fewer tokens a tile are best.
  """
  n, c = w.shape
  mode: Mode = "e4m3" if w.scale.dtype == jnp.float8_e4m3fn else "exact"
  if w.activation == "bf16":
    mode = "bf16"

  blocks = math.ceil(c / BLOCK)
  entries = [(tuning, ns[mode]) for tuning, ns in table() if mode in ns]
  ns_of = {(x.rows, x.tile_t): ns for x, ns in entries if x.split == 1}

  def cost(entry):
    """ns of the busiest CTA, infinite if there is no such kernel; tokens."""
    tuning, ns = entry
    rows, tile_t, ctas = tuning.rows, tuning.tile_t, tuning.ctas
    split, cut = tuning.split, tuning.cut
    neighbours = 2 if tuning.multicast else 1
    tiles = math.ceil(n / rows / neighbours) * math.ceil(t / tile_t)
    ctas //= neighbours
    waves, last = divmod(tiles, ctas)
    if (
      (rows < ROWS and (w.gated or n % rows))
      or (split > 1 and (t <= 8 or tiles * split > ctas))
      or (cut > 1 and not (waves and 0 < last * cut <= ctas))
      or (tuning.wide and not _has_registers(w, cut))
      or (quantises and (t > tile_t or split * cut > 1 or rows in _SLOW_ROWS))
    ):
      return math.inf, tile_t
    if split > 1:
      return math.ceil(blocks / split) * ns + cluster_ns(tuning), tile_t
    if cut > 1:
      ns_last = ns_of.get((rows, tile_t // cut), math.inf) + _CUT_NS / blocks
    else:
      ns_last = ns if last else 0
    return blocks * (waves * ns + ns_last) + cluster_ns(tuning), tile_t

  cut = [
    (dataclasses.replace(tuning, cut=cut), ns)
    for tuning, ns in entries
    for cut in cuts(tuning)
  ]
  best = min(entries + cut, key=cost)[0]
  return _quantising(best, blocks) if quantises else best


def _has_registers(w, cut):
  """Whether a wide tile of this weight is compiled without a spill."""
  return w.encoding == "sign_magnitude" and not (w.gated and cut > 1)


def _quantising(tuning, blocks):
  """The same with four consumers to quantise, if that can be.

  The ring has smaller steps beside the activations, as many as memory holds.
  """
  step = min(tuning.blocks, 2 if tuning.row_groups == 4 else 4)
  sets = max(1, 4 // tuning.row_groups)
  stages = min(32 // sets, math.ceil(blocks / step / sets)) * sets
  return dataclasses.replace(
    tuning,
    blocks=step,
    stages=stages,
    interleave=sets,
    cluster=2,
    ahead=False,
  )
