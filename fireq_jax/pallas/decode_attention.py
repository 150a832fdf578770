"""Decode attention over an INT4 KV cache: few queries, many cached tokens.

For every sequence b and kv head, with query rows r (the queries of its G heads
for T tokens) and cached tokens s:

  score[r, s] = sm_scale * q_scale[r] * k_scale[s] * sum_h q[r, h] k[s, h]
  out[r, h]   = sum_s softmax(score)[r, s] * v_scale[s] * v[s, h]

k and v are the INT4 codes themselves. Operands of products are exact, e4m3
queries in f16 and others in bf16, but for P, which is rounded to bf16 after v's
scale; everything else is f32.

Who does what (one persistent CTA a multiprocessor), when consumers team up:

  producer     | K V K V K V ...  TMA, a ring of blocks that runs on from one
               |                  item (sequence, head, split) to the next
  consumer 0   |  block 0      block 3      block 6     | merge |
  consumer 1   |    block 1      block 4       ...      |       |
  consumer 2   |      block 2      block 5              |       |

With many short items each consumer is a team of its own: it has its own items,
its own ring, filled by a warp of the producer, and merges while others compute.

Each warp of a consumer takes a quarter of a block's tokens, keeps its own
maximum, sum and output, and meets the others only in the merge, through shared
memory. The bytes stream; the instruction count per block is what it must stay
above (`int4_fragments` says how words become operands).

With several splits, the last one of a sequence and head to end combines what
all have left in memory (`decode_rows.finish`). Queries are read and results
written where the rest of the model has them.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from fireq_jax.pallas import int4_fragments as frag
from fireq_jax.pallas.decode_plan import Tuning, plan
from fireq_jax.pallas.decode_rows import (
  ROWS,
  Rows,
  fill,
  finish,
  merged_layout,
  spread,
  write,
)
from fireq_jax.pallas.device import one_by_one
from fireq_jax.pallas.inline import fence_async_proxy, load, store

MAX_QUERIES = 8
# A maximum below every score, finite so that differences are, scaled or not.
_NEVER = -1e20
_REGISTERS = {1: 232, 2: 232, 3: 152}  # of a consumer, by their number


def supported(q: jax.Array, k_words: jax.Array) -> None:
  """Returns if the kernel can run this.

  Raises:
    NotImplementedError: it cannot, with the reason.
  """
  length, _, head_dim = q.shape[1:]
  for ok, reason in (
    (head_dim in (64, 128), f"head_dim {head_dim}"),
    (q.dtype in (jnp.float8_e4m3fn, jnp.bfloat16), f"queries of {q.dtype}"),
    (k_words.shape[2] % 16 == 0, f"a capacity of {k_words.shape[2]} tokens"),
    (length <= MAX_QUERIES, f"{length} query tokens"),
  ):
    if not ok:
      raise NotImplementedError(f"this kernel does not handle {reason}")


def decode_attention(
  q: jax.Array,
  q_scale: jax.Array | None,
  k_words: jax.Array,
  k_scale: jax.Array,
  v_words: jax.Array,
  v_scale: jax.Array,
  starts: jax.Array,
  counts: jax.Array,
  *,
  tuning: Tuning | None = None,
) -> jax.Array:
  """Attends the newest few tokens to a cache that already holds them.

  Args:
    q: e4m3 or bf16 [B, T, N, H], T <= 8; query t of row b sees the tokens up
      to `starts[b] + t`.
    q_scale: f32 [B, T, N] of e4m3 queries, else None.
    k_words: uint32 [B, K, S, H / 8], as `kv_layout` packs them.
    k_scale: bf16, e4m3 or f32 [B, K, S].
    v_words: uint32 [B, K, ceil(S / 32), H / 32, 128].
    v_scale: as `k_scale`.
    starts: i32 [B], the position of each row's first query.
    counts: i32 [B], how many of the T queries are real; others give zeros.
    tuning: the free choices.

  Returns:
    bf16 [B, T, N, H].

  Raises:
    NotImplementedError: see `supported`.
  """
  supported(q, k_words)
  tuning = tuning or Tuning()
  batch, length, n, head_dim = q.shape
  kv_heads, capacity = k_words.shape[1:3]
  group = n // kv_heads
  # Threads share heads evenly only where these are a power of two.
  padded = max(1 << (group - 1).bit_length(), 128 // head_dim)

  def pad(x):
    x = x.reshape(batch, length, kv_heads, group, -1)
    x = jnp.pad(x, ((0, 0),) * 3 + ((0, padded - group), (0, 0)))
    return x.reshape(batch, length, kv_heads * padded, -1)

  if padded != group:
    q = pad(q)
    q_scale = None if q_scale is None else pad(q_scale)[..., 0]
  rows = Rows.of(length, padded)
  tuning = plan(
    batch * kv_heads * rows.items, -(-capacity // tuning.block), tuning
  )
  operands = (q, q_scale, k_words, k_scale, v_words, v_scale, starts, counts)
  out = one_by_one(functools.partial(_kernel, rows=rows, tuning=tuning))(
    *operands
  )
  if padded != group:
    out = out.reshape(batch, length, kv_heads, padded, head_dim)
    out = out[:, :, :, :group].reshape(batch, length, n, head_dim)
  return out


def _kernel(
  q, q_scale, k_words, k_scale, v_words, v_scale, starts, counts, *, rows,
  tuning,
):  # fmt: skip
  """Runs the kernel.

  Operands are those of `decode_attention`; heads of a kv head are a power of
  two.
  """
  batch, queries, n, head_dim = q.shape
  kv_heads = k_words.shape[1]
  block, stages, nc = tuning.block, tuning.stages, tuning.consumers
  splits, team = tuning.splits, tuning.team
  rings = nc // team
  ring_stages = stages // rings
  # Rows of 128 words are copied faster than rows of one token.
  k_row = 1024 // head_dim
  k_words = k_words.reshape(*k_words.shape[:2], -1, 128)
  heads = kv_heads * rows.items  # items of a sequence
  items = batch * heads * splits
  ctas = min(tuning.ctas, items)
  merged = merged_layout(rows.heads, head_dim)
  # Longer by what a thread loads, so that a warp's stores hit different banks.
  o_row = head_dim + max(4, rows.heads * head_dim // 128)
  if rows.heads == 1 and jax.__version_info__ < (0, 11):
    o_row = head_dim  # JAX 0.10 cannot load one of longer rows
  partials = 4 * team
  stride = ctas * rings
  # Keys are multiplied in units of their own.
  q_dtype = jnp.bfloat16 if q.dtype == jnp.bfloat16 else jnp.float16
  log2_scale = math.log2(math.e) * head_dim**-0.5 * frag.key_unit(q_dtype)

  def kernel(
    q_gmem, k_gmem, ks_gmem, v_gmem, vs_gmem, start_gmem, count_gmem, *rest,
    q_smem, k_smem, ks_smem, v_smem, vs_smem, o_smem, m_smem, l_smem,
    full, empty, q_full, q_empty, merge_ready, merge_done,
  ):  # fmt: skip
    qs_gmem = None if q_scale is None else rest[0]
    out_gmem, *split_gmem = rest[0 if q_scale is None else 1 :]
    wg = lax.axis_index("wg")
    cta = lax.axis_index("cta")

    def items_of(ring):
      return lax.div(lax.max(items - ring * ctas - cta, 0) + stride - 1, stride)

    def span(ring, i):
      """Item i of a ring: its place, its blocks and its tokens."""
      item = ring * ctas + cta + i * stride
      split = lax.rem(item, splits)
      head = lax.rem(lax.div(item, splits), heads)
      b = lax.div(item, splits * heads)
      start, real = start_gmem[b], count_gmem[b]
      if splits == -(-k_scale.shape[2] // block):
        # One block, which nobody need know the length to load.
        return b, head, split, split, jnp.int32(1), start, real
      length = jnp.where(real > 0, start + real, 0)
      blocks = lax.div(length + (block - 1), block)
      share = lax.div(blocks + (splits - 1), splits)
      first = lax.min(split * share, blocks)
      count = lax.min(share, blocks - first)
      return b, head, split, first, count, start, real

    def merge_part(ring, b, head, split, token, part, real):
      """Adds up what a team's warps have of one token's heads."""
      rows_of = lambda ref, p: ref.at[
        ring * team + p // 4,
        pl.ds(p % 4 * ROWS + part * rows.heads, rows.heads),
      ]
      sums_of = lambda p: rows_of(o_smem, p).at[:, pl.ds(0, head_dim)]
      stat = lambda ref, p: load(rows_of(ref, p), merged.reduce(1))
      top = functools.reduce(
        jnp.maximum, [stat(m_smem, p) for p in range(partials)]
      )
      total = fill(0.0, (rows.heads,), merged.reduce(1))
      out = fill(0.0, (rows.heads, head_dim), merged)
      for p in range(partials):
        weight = jnp.exp2(stat(m_smem, p) - top)
        total = total + weight * stat(l_smem, p)
        out = out + load(sums_of(p), merged) * spread(
          weight, out.shape, 0, merged
        )
      share = jnp.where(token < real, 1.0, 0.0)
      if splits == 1:
        place = b, token, rows.place(head)[2]
        write(out, total, share, out_gmem, place, merged)
      else:
        number = (b * heads + head) * rows.parts + part
        out_at = (b * queries + token) * n + rows.place(head)[2]
        place = number, split, out_at * head_dim, token < queries
        refs = (*split_gmem, out_gmem)
        finish(
          out * share,
          top,
          total * share,
          place,
          refs,
          splits=splits,
          layout=merged,
        )

    def produce(ring):
      def item(i, issued):
        b, head, _, first, count, _, _ = span(ring, i)
        kv_head, token, query_head = rows.place(head)
        slot = 2 * ring + lax.rem(i, 2)

        @pl.when(i >= 2)
        def _():
          plgpu.barrier_wait(q_empty.at[slot])
          fence_async_proxy()

        for part in range(rows.parts):
          plgpu.copy_gmem_to_smem(
            q_gmem.at[
              b,
              lax.min(token + part, queries - 1),
              pl.ds(query_head, rows.heads),
            ],
            q_smem.at[slot, pl.ds(part * rows.heads, rows.heads)],
            q_full.at[slot],
          )

        def step(j, _):
          stage = ring * ring_stages + lax.rem(issued + j, ring_stages)

          @pl.when(issued + j >= ring_stages)
          def _():
            plgpu.barrier_wait(empty.at[stage])
            fence_async_proxy()

          token = (first + j) * block
          tokens = pl.ds(token, block)
          k_rows = pl.ds(lax.div(token, k_row), block // k_row)
          blocks = pl.ds(lax.div(token, 32), block // 32)
          for source, target in (
            (k_gmem.at[b, kv_head, k_rows], k_smem),
            (v_gmem.at[b, kv_head, blocks], v_smem),
            (ks_gmem.at[b, kv_head, tokens], ks_smem),
            (vs_gmem.at[b, kv_head, tokens], vs_smem),
          ):
            plgpu.copy_gmem_to_smem(source, target.at[stage], full.at[stage])

        lax.fori_loop(0, count, step, None)
        return issued + count

      count = items_of(ring)
      issued = lax.fori_loop(0, count, item, jnp.int32(0))
      for s in range(ring_stages):

        @pl.when(issued > s)
        def _(s=s):
          plgpu.barrier_wait(empty.at[ring * ring_stages + s])

      for s in range(2):

        @pl.when(count > s)
        def _(s=s):
          plgpu.barrier_wait(q_empty.at[2 * ring + s])

    @pl.when(wg == nc)
    def _():
      plgpu.set_max_registers(40, action="decrease")

      @plgpu.warp_map
      def _(warp):
        @pl.when(warp < rings)
        def _():
          produce(warp)

    @pl.when(wg < nc)
    def consume():
      plgpu.set_max_registers(_REGISTERS[nc], action="increase")

      ring, member = lax.div(wg, team), lax.rem(wg, team)

      def item(i, done):
        b, head, split, first, count, start, real = span(ring, i)
        _, first_token, query_head = rows.place(head)
        slot = 2 * ring + lax.rem(i, 2)
        # What scores are multiplied by; a number for each row of each warp.
        x_scale = fill(log2_scale, (4 * ROWS,), frag.STATS)
        if qs_gmem is not None:
          row = plgpu.broadcasted_iota(
            jnp.int32, (4 * ROWS,), 0, layout=frag.STATS
          )
          for r in range(rows.parts * rows.heads):
            token = lax.min(first_token + r // rows.heads, queries - 1)
            scale = qs_gmem[b, token, query_head + r % rows.heads]
            scale = fill(scale * log2_scale, (4 * ROWS,), frag.STATS)
            x_scale = jnp.where(lax.rem(row, ROWS) == r, scale, x_scale)
        plgpu.barrier_wait(q_full.at[slot])
        q = load(q_smem.at[slot], frag.queries(head_dim)).astype(q_dtype)
        plgpu.barrier_arrive(q_empty.at[slot])
        nothing = plgpu.layout_cast(
          jnp.zeros((block // k_row, 128), jnp.uint32),
          frag.key_words(head_dim),
        )
        # Every score is too large by the product with codes of zero.
        zeros = fill(0.0, (block, ROWS), frag.SCORES)
        bias = frag.key_products(nothing, q, zeros)
        to_scores = lambda x: frag.to_scores(x, block)

        def body(j, carry, masked):
          acc, m, l, p_sum = carry
          index = mine + j * team
          stage = ring * ring_stages + lax.rem(done + index, ring_stages)
          plgpu.barrier_wait(full.at[stage])
          keys = load(k_smem.at[stage], frag.key_words(head_dim))
          x = frag.key_products(keys, q, -bias)
          shape = x.shape
          per_token = lambda ref: spread(
            frag.scales(load(ref.at[stage], frag.PER_TOKEN)),
            shape, 0, frag.SCORES,
          )  # fmt: skip
          x = x * per_token(ks_smem)
          if masked:
            iota = functools.partial(
              plgpu.broadcasted_iota, jnp.int32, shape, layout=frag.SCORES
            )
            token = iota(0) + (first + index) * block
            last = start + first_token + lax.div(iota(1), rows.heads)
            x = jnp.where(token <= last, x, -jnp.inf)
          m_new = jnp.maximum(m, frag.warp_max(x))
          alpha = jnp.exp2((m - m_new) * x_scale)
          p = jnp.exp2(x * to_scores(x_scale) - to_scores(m_new * x_scale))
          l = l * to_scores(alpha) + p
          p = frag.to_bf16(p * per_token(vs_smem))
          p_sum = p_sum * alpha + frag.warp_total(p)
          acc = acc * spread(alpha, acc.shape, 0, frag.OUTPUTS)
          values = load(v_smem.at[stage], frag.value_words(head_dim))
          acc = frag.value_products(acc, p, values)
          plgpu.barrier_arrive(empty.at[stage])
          return acc, m_new, l, p_sum

        mine = lax.rem(member + team - lax.rem(done, team), team)
        of_mine = lambda n: lax.div(lax.max(n - mine, 0) + team - 1, team)
        n = of_mine(count)
        # Blocks whose tokens all queries may see come first.
        whole = lax.div(start + 1, block) - first
        n_whole = lax.min(n, of_mine(whole))
        carry = (
          fill(0.0, (4 * ROWS, head_dim), frag.OUTPUTS),
          fill(_NEVER, (4 * ROWS,), frag.STATS),
          zeros,
          fill(0.0, (4 * ROWS,), frag.STATS),
        )
        loop = lambda lo, hi, masked, c: lax.fori_loop(
          lo, hi, functools.partial(body, masked=masked), c
        )
        carry = loop(0, n_whole, False, carry)
        acc, m, l, p_sum = loop(n_whole, n, True, carry)

        # Merge the team's warps; its consumers take turns to do it.
        acc = acc - spread(frag.BIAS * p_sum, acc.shape, 0, frag.OUTPUTS)

        @pl.when(i > 0)
        def _():
          plgpu.barrier_wait(merge_done.at[ring])

        store(m_smem.at[wg], m * x_scale)
        store(l_smem.at[wg], frag.warp_sum(l))
        store(o_smem.at[wg, :, pl.ds(0, head_dim)], acc)
        plgpu.barrier_arrive(merge_ready.at[ring])
        plgpu.barrier_wait(merge_ready.at[ring])

        @pl.when(lax.rem(i, team) == member)
        def merge():
          for part in range(rows.parts):
            merge_part(ring, b, head, split, first_token + part, part, real)
          plgpu.barrier_arrive(merge_done.at[ring])

        return done + count

      count = items_of(ring)
      lax.fori_loop(0, count, item, jnp.int32(0))

      @pl.when(count > 0)
      def _():
        plgpu.barrier_wait(merge_done.at[ring])

  out_type = [jax.ShapeDtypeStruct(q.shape, jnp.bfloat16)]
  if splits > 1:
    shape = (batch * heads * rows.parts, splits)
    out_type += [
      jax.ShapeDtypeStruct((*shape, rows.heads, head_dim), jnp.float32),
      jax.ShapeDtypeStruct((*shape, max(rows.heads, 4), 2), jnp.float32),
    ]
  out = plgpu.kernel(
    kernel,
    out_type=out_type,
    grid=(ctas,),
    grid_names=("cta",),
    num_threads=nc + 1,
    thread_name="wg",
    scratch_types=dict(
      q_smem=plgpu.SMEM((2 * rings, ROWS, head_dim), q.dtype),
      k_smem=plgpu.SMEM((stages, block // k_row, 128), jnp.uint32),
      ks_smem=plgpu.SMEM((stages, block), k_scale.dtype),
      v_smem=plgpu.SMEM((stages, block // 32, head_dim // 32, 128), jnp.uint32),
      vs_smem=plgpu.SMEM((stages, block), v_scale.dtype),
      o_smem=plgpu.SMEM((nc, 4 * ROWS, o_row), jnp.float32),
      m_smem=plgpu.SMEM((nc, 4 * ROWS), jnp.float32),
      l_smem=plgpu.SMEM((nc, 4 * ROWS), jnp.float32),
      full=plgpu.Barrier(num_arrivals=4, num_barriers=stages),
      empty=plgpu.Barrier(num_arrivals=1, num_barriers=stages),
      q_full=plgpu.Barrier(num_arrivals=rows.parts, num_barriers=2 * rings),
      q_empty=plgpu.Barrier(num_arrivals=team, num_barriers=2 * rings),
      merge_ready=plgpu.Barrier(num_arrivals=team, num_barriers=rings),
      merge_done=plgpu.Barrier(num_barriers=rings),
    ),
    compiler_params=plgpu.CompilerParams(
      approx_math=True,
      unsafe_no_auto_barriers=True,
      lowering_semantics=plgpu.LoweringSemantics.Lane,
    ),
    kernel_name="decode_attention",
  )(
    *(q, k_words, k_scale, v_words, v_scale, starts, counts),
    *(() if q_scale is None else (q_scale,)),
  )
  return out[0]
