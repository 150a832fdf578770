"""Query rows of decode attention: which they are, and how splits are combined.

The queries of a kv head, T tokens of G heads each, are taken eight at a time:
the columns of one product. Parts of a sequence give, for each row, a maximum,
a sum of weights and a weighted sum of values; they are added up in the units of
the largest maximum.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from fireq_jax.pallas import int4_fragments as frag
from fireq_jax.pallas.inline import load

ROWS = frag.ROWS


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
  """How the queries of a kv head become items of at most `ROWS` rows.

  An item has `parts` parts, each of `heads` neighbouring heads of one token.

  Attributes:
    heads: a power of two.
    parts: tokens of an item.
    per_token: items of a token; 1 where an item has several tokens.
    items: items of a kv head.
  """

  heads: int
  parts: int
  per_token: int
  items: int

  @classmethod
  def of(cls, length: int, group: int) -> "Rows":
    heads = min(group, ROWS)
    parts = min(ROWS // heads, length)
    per_token = group // heads
    items = per_token * -(-length // parts)
    return cls(heads=heads, parts=parts, per_token=per_token, items=items)

  def place(self, item: Any) -> tuple[Any, Any, Any]:
    """Kv head, first token and first query head of a sequence's item."""
    kv_head, i = lax.div(item, self.items), lax.rem(item, self.items)
    head = kv_head * self.per_token + lax.rem(i, self.per_token)
    return kv_head, lax.div(i, self.per_token) * self.parts, head * self.heads


def fill(value, shape, layout):
  return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def spread(x, shape, axis, layout):
  return plgpu.layout_cast(lax.broadcast_in_dim(x, shape, (axis,)), layout)


def merged_layout(rows, head_dim):
  """[rows, H], a power of two, equally many numbers a thread."""
  width = rows * head_dim // 128
  whole = (rows, head_dim)
  if rows == 8:
    tiling, warps, lanes = (whole, (2, head_dim), (width,)), (-5,), (-3, -2)
  elif rows == 4:
    tiling, warps, lanes = (whole, (width,)), (-3,), (-2,)
  else:
    warps = (-4, -3) if rows == 2 else (-3,)
    tiling, lanes = (whole, (32 * width,), (width,)), (-2,)
  return plgpu.Layout.TILED(
    plgpu.Tiling(tiling), warp_dims=warps, lane_dims=lanes, vector_dim=-1
  )


def combine(
  sums: jax.Array, stats: jax.Array, *, shape: tuple[int, ...], rows: Rows
) -> jax.Array:
  """Adds up the splits.

  Args:
    sums: f32 [B, items, splits, parts, heads, H].
    stats: f32 [B, items, splits, parts, 2, heads].
    shape: of the result, [B, T, N, H].
    rows: the items.

  Returns:
    bf16 [B, T, N, H].
  """
  batch, items, splits, parts, heads, head_dim = sums.shape
  layout = merged_layout(heads, head_dim)

  def kernel(sum_gmem, stat_gmem, out_gmem):
    b, item, part = (lax.axis_index(name) for name in ("b", "item", "part"))
    _, token, head = rows.place(item)
    stat = lambda i: [
      load(stat_gmem.at[b, item, i, part, which], layout.reduce(1))
      for which in range(2)
    ]
    stats = [stat(i) for i in range(splits)]
    sums = [load(sum_gmem.at[b, item, i, part], layout) for i in range(splits)]
    top = functools.reduce(jnp.maximum, [peak for peak, _ in stats])
    total = fill(0.0, (heads,), layout.reduce(1))
    out = fill(0.0, (heads, head_dim), layout)
    for (peak, partial), x in zip(stats, sums):
      weight = jnp.exp2(peak - top)
      total = total + weight * partial
      out = out + x * spread(weight, x.shape, 0, layout)
    place = b, token + part, head
    store(out, total, jnp.float32(1), out_gmem, place, layout)

  return plgpu.kernel(
    kernel,
    out_type=jax.ShapeDtypeStruct(shape, jnp.bfloat16),
    grid=(batch, items, parts),
    grid_names=("b", "item", "part"),
    compiler_params=plgpu.CompilerParams(
      approx_math=True,
      lowering_semantics=plgpu.LoweringSemantics.Lane,
    ),
    kernel_name="decode_attention_combine",
  )(sums, stats)


def store(out, total, real, out_gmem, place, layout):
  """Writes out / total, or zeros unless `real`, to the heads at `place`."""
  b, token, head = place
  share = jnp.where(total > 0, real / total, 0.0)
  out = (out * spread(share, out.shape, 0, layout)).astype(jnp.bfloat16)

  @pl.when(token < out_gmem.shape[1])
  def _():
    out_gmem.at[b, token, pl.ds(head, out.shape[0])][...] = out
