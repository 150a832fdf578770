"""Query rows of decode attention: which they are, and how splits are combined.

The queries of a kv head, T tokens of G heads each, are taken eight at a time:
the columns of one product. Parts of a sequence give, for each row, a maximum,
a sum of weights and a weighted sum of values; they are added up in the units of
the largest maximum.
"""

import dataclasses
import functools
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from fireq_jax.pallas import int4_fragments as frag
from fireq_jax.pallas.inline import elements, store
from fireq_jax.pallas.threads import BLOCK, WARP, Register, Threads

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


def write(out, total, real, out_gmem, place, layout):
  """Writes out / total, or zeros unless `real`, to the heads at `place`."""
  b, token, head = place
  share = jnp.where(total > 0, real / total, 0.0)
  out = (out * spread(share, out.shape, 0, layout)).astype(jnp.bfloat16)

  @pl.when(token < out_gmem.shape[1])
  def _():
    store(out_gmem.at[b, token, pl.ds(head, out.shape[0])], out)


def finish(
  sums: jax.Array,
  top: jax.Array,
  total: jax.Array,
  place: tuple[Any, ...],
  refs: tuple[Any, ...],
  *,
  splits: int,
  layout: Any,
) -> None:
  """Leaves a split's part in memory; the last split to come adds up all.

  Args:
    sums: f32 [heads, H] of this split, in `layout`.
    top: f32 [heads].
    total: f32 [heads].
    place: i32 scalars: number of the part, the split, element of the result
      where the part's heads begin, and whether to write it.
    refs: sums f32 [parts, splits, heads, H] and stats f32 [parts, splits,
      max(heads, 4), 2] of all splits, and the result.
    splits: how many there are.
    layout: `merged_layout`.
  """
  per_row = layout.reduce(1)
  heads, head_dim = sums.shape
  spread_out = lambda x: plgpu.layout_cast(
    jnp.broadcast_to(x.astype(jnp.int32), (heads,)), per_row
  )

  def emit(_, sums, top, total, *rest):
    place = [_registers(x)[0] for x in rest[:4]]
    finish_program(
      Threads(),
      _registers(sums),
      _registers(top)[0],
      _registers(total)[0],
      place,
      rest[4:],
      shape=(refs[0].shape[0], splits, heads, head_dim),
    )

  plgpu.inline_mgpu(
    arg_types=(layout, *(per_row,) * 6, *(plgpu.RefType(),) * 3)
  )(emit)(sums, top, total, *map(spread_out, place), *refs)


def _registers(x):
  return [Register(e) for r in x.registers.flat for e in elements(r)]


def finish_program(
  t: Any,
  values: list[Any],
  top: Any,
  total: Any,
  place: Sequence[Any],
  refs: Sequence[Any],
  *,
  shape: tuple[int, int, int, int],
) -> None:
  """What a thread does in `finish`, with its registers of the arguments."""
  parts, splits, heads, head_dim = shape
  sums, stats, out = refs
  part, split, out_at, wanted = place
  width = len(values)
  warp = t.index // WARP
  per_row = BLOCK // heads  # threads
  row, column = t.index // per_row, t.index % per_row * width
  copies, copy = (heads, row) if heads >= 4 else (4, warp)
  at = lambda split: (part * splits + split) * heads + row
  step = min(width, 4)
  starts = range(0, width, step)

  # A warp reads only what its namesakes wrote, so each writes its rows' numbers.
  stat_at = lambda split: ((part * splits + split) * copies + copy) * 2
  first = t.lane % min(per_row, WARP) < 1
  t.store(stats, stat_at(split), [t.bits(top), t.bits(total)], first)
  words = [t.bits(x) for x in values]
  for i in starts:
    index = at(split) * head_dim + column + i
    t.store(sums, index, words[i : i + step])
  t.fence()
  arrived = t.arrive(part * 4 + warp, parts * 4, splits)
  with t.when(arrived >= splits - 1):
    t.fence()
    read = lambda ref, index, n: [t.as_f32(x) for x in t.load(ref, index, n)]
    stats = [read(stats, stat_at(s), 2) for s in range(splits)]
    columns = [
      [
        x
        for i in starts
        for x in read(sums, at(s) * head_dim + column + i, step)
      ]
      for s in range(splits)
    ]
    top = functools.reduce(t.maximum, [peak for peak, _ in stats])
    weights = [t.exp2(peak - top) for peak, _ in stats]
    add = lambda xs: functools.reduce(operator.add, xs)
    total = add([weight * x for weight, (_, x) in zip(weights, stats)])
    # Without tokens there are no values either.
    total = t.select(total < 1e-30, 1.0, total)
    out_values = [
      t.divide(add([w * x for w, x in zip(weights, xs)]), total)
      for xs in zip(*columns)
    ]
    index = out_at + row * head_dim + column
    wanted = wanted >= 1
    if width == 1:
      x = out_values[0]
      t.store(out, index, [t.pack_bf16(x, x)], wanted, 16)
      return
    words = [t.pack_bf16(*out_values[i : i + 2]) for i in range(0, width, 2)]
    t.store(out, index, words, wanted)
