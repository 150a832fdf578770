"""Causal prefill attention in FP8 over INT4 codes.

For every query row r (token, head) and cached token s, with q, k and v of
dtype e4m3 (k and v hold INT4 codes, which e4m3 represents exactly):

  score[r, s] = sm_scale * q_scale[r] * k_scale[s] * sum_h q[r, h] k[s, h]
  p[r, s]     = e4m3(exp(score[r, s] - peak[r]) * v_scale[s])
  out[r, h]   = sum_s p[r, s] v[s, h] / sum_s p[r, s] / v_scale[s]

Both scales and the peak take two multiply-adds an element, in exponents of 2,
(qk * k_scale - peak) * q_scale + log2(v_scale). 1 / v_scale is more rows of v,
so tensor cores sum the same rounded p. The peak need not be the maximum: it
moves only where p would not fit e4m3. A row sees tokens up to its own, the last
row the last token, so that a prefill can continue a cache.

Who does what in a persistent CTA, each consumer with 64 rows of its own; t is a
tile of kv tokens, taken in order:

  producer    | q | k0 | k1 v0 | k2 v1 | k3 v2 | ...      TMA into rings
  tensor core |      QK0 |       QK1 PV0 |       QK2 PV1 |
  consumer    |          softmax 0       softmax 1       softmax 2

PV of tile t - 1 runs while the consumer's own softmax of tile t begins. The two
consumers take turns: one's exponentials run while the tensor core works for the
other. A turn ends when exponents are known, when PV is nearly done: where it
ended with the issue of products, those of both consumers came to be computed at
the same time, and then both computed exponentials.

FP8 products of Hopper keep 14 bits of a sum, so sums move to f32 in shared
memory after each `_CHUNK` tokens. Most is cut off where all terms are positive,
as those of denominators are: each of their four pairs of rows sums a quarter of
the tokens.

P needs no movement between threads: its accumulator registers are an e4m3 A
operand if tokens are permuted inside blocks of 16 (`KV_ORDER`), so v is stored
transposed and in that order, which also is what 8-bit wgmma demands.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from fireq_jax.config import check
from fireq_jax.pallas import prefill_fragments as fragments
from fireq_jax.pallas.inline import fence_async_proxy, load, swizzled
from fireq_jax.pallas.kv_layout import WEIGHT_ROWS
from fireq_jax.pallas.prefill_tiles import (
  ROWS,
  launch,
  pass_over,
  size_of_tile,
  tiles_seen,
  wait_until_empty,
)

_L = plgpu.Layout
_ROW = _L.WGMMA.reduce(1)
_F8 = jnp.float8_e4m3fn
_CHUNK = 1024  # tokens whose sums stay in tensor cores, which keep 14 bits


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
  """Free choices of the kernel.

  Attributes:
    block_kv: kv tokens of a tile, a multiple of 32.
    stages: tiles of k and of v in flight or in use.
    ctas: persistent CTAs, one a multiprocessor.
  """

  block_kv: int = 192
  stages: int = 2
  ctas: int = 132

  def __post_init__(self):
    check(
      self.block_kv > 0 and self.block_kv % 32 == 0,
      "prefill block_kv must be a positive multiple of 32",
      got=self.block_kv,
    )
    check(self.stages >= 2, "prefill needs two stages or more", got=self.stages)


def _iota(shape, axis, layout):
  return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=layout)


def prefill_attention(
  q: jax.Array,
  q_scale: jax.Array,
  k: jax.Array,
  v: jax.Array,
  weights: jax.Array,
  scales: jax.Array,
  unit: jax.Array,
  starts: jax.Array,
  counts: jax.Array,
  *,
  tuning: Tuning | None = None,
) -> jax.Array:
  """Attends many queries to tokens that include their own.

  Args:
    q: e4m3 [B, T, N, H]; query t of row b sees tokens up to `starts[b] + t`.
    q_scale: f32 [B, T, N].
    k: e4m3 [B, K, S, H], S a multiple of 128, and so on: see
      `kv_layout.prefill_operands`.
    v: e4m3 [B, K, H, S].
    weights: e4m3 [B, K, 8, S].
    scales: f32 [B, K, S / 2, 4].
    unit: f32 [B, K].
    starts: i32 [B], the position of each row's first query.
    counts: i32 [B], how many of the T queries are real; others give zeros.
    tuning: the free choices.

  Returns:
    bf16 [B, T, N, H].

  Raises:
    NotImplementedError: see `supported`.
  """
  supported(q, k)
  length = q.shape[1]
  if tuning is None:
    tuning = Tuning(block_kv=size_of_tile(k.shape[2]))

  def pad(x, multiple):
    rows = (0, -length % multiple)
    return jnp.pad(x, ((0, 0), rows) + ((0, 0),) * (x.ndim - 2))

  out = _kernel(
    pad(q, 8),  # TMA copies eight rows at a time
    pad(q_scale, ROWS),
    k,
    v,
    weights,
    scales,
    unit,
    counts,
    starts + counts,
    tuning=tuning,
  )
  return out[:, :length]


def supported(q: jax.Array, k: jax.Array) -> None:
  """Returns if the kernel can run this.

  Raises:
    NotImplementedError: it cannot, with the reason.
  """
  for ok, reason in (
    (q.shape[-1] in (64, 128), f"head_dim {q.shape[-1]}"),
    (q.dtype == k.dtype == _F8, f"queries of {q.dtype}, keys of {k.dtype}"),
    (k.shape[2] % 128 == 0, f"{k.shape[2]} tokens, no multiple of 128"),
  ):
    if not ok:
      raise NotImplementedError(f"this kernel does not handle {reason}")


def _kernel(
  q, q_scale, k, v, weights, scales, unit, q_lengths, kv_lengths, *, tuning
):
  """Runs the kernel.

  Operands are those of `prefill_attention`, but for kv_lengths i32 [B], the
  tokens that each row's last real query sees.
  """
  batch, t, n, h = q.shape
  kv_heads, s = k.shape[1:3]
  group = n // kv_heads
  bk, stages = tuning.block_kv, tuning.stages
  chunk_tiles = max(_CHUNK // bk, 1)
  tiles = -(-t // ROWS)
  items = batch * n * tiles
  ctas = min(tuning.ctas, items)
  rounds = -(-items // ctas)

  def kernel(
    q_gmem, qs_gmem, k_gmem, v_gmem, weights_gmem, scales_gmem, unit_gmem,
    ql_gmem, kl_gmem, o_gmem,
    *,
    q_smem, k_smem, v_smem, scales_smem, sums_smem, o_smem, q_full, q_empty,
    k_full, k_empty, v_full, v_empty, turn,
  ):  # fmt: skip
    wg = lax.axis_index("wg")
    cta = lax.axis_index("cta")

    def place(i):
      """Item of round i: longest first, every other round in reverse."""
      column = jnp.where(lax.rem(i, 2) == 0, cta, ctas - 1 - cta)
      item = i * ctas + column
      b = lax.rem(lax.div(item, n), batch)
      row = (tiles - 1 - lax.div(item, n * batch)) * ROWS
      ql, kl = ql_gmem[lax.min(b, batch - 1)], kl_gmem[lax.min(b, batch - 1)]
      return item < items, b, lax.rem(item, n), row, ql, kl

    @pl.when(wg == 2)
    def produce():
      plgpu.set_max_registers(24, action="decrease")

      def item(i, carry):
        issued, q_tiles = carry
        live, b, head, row, ql, kl = place(i)
        kv_head = lax.div(head, group)
        tiles_kv = jnp.where(live, tiles_seen(row, ROWS, ql, kl, bk), 0)

        @pl.when(tiles_kv > 0)
        def _():
          @pl.when(q_tiles > 0)
          def _():
            plgpu.barrier_wait(q_empty)
            fence_async_proxy()

          for w in range(2):
            plgpu.copy_gmem_to_smem(
              q_gmem.at[b, pl.ds(row + 64 * w, 64), head],
              q_smem.at[w],
              q_full,
            )

        def step(j, _):
          stage = lax.rem(issued + j, stages)
          tokens = pl.ds(j * bk, bk)
          again = issued + j >= stages

          @pl.when(again)
          def _():
            plgpu.barrier_wait(k_empty.at[stage])
            fence_async_proxy()

          plgpu.copy_gmem_to_smem(
            k_gmem.at[b, kv_head, tokens], k_smem.at[stage], k_full.at[stage]
          )
          plgpu.copy_gmem_to_smem(
            scales_gmem.at[b, kv_head, pl.ds(j * (bk // 2), bk // 2)],
            scales_smem.at[stage],
            k_full.at[stage],
          )

          @pl.when(again)
          def _():
            plgpu.barrier_wait(v_empty.at[stage])

          for rows, source in (
            (pl.ds(0, h), v_gmem),
            (pl.ds(h, WEIGHT_ROWS), weights_gmem),
          ):
            plgpu.copy_gmem_to_smem(
              source.at[b, kv_head, :, tokens],
              v_smem.at[stage, rows],
              v_full.at[stage],
            )

        lax.fori_loop(0, tiles_kv, step, None)
        return issued + tiles_kv, q_tiles + jnp.where(tiles_kv > 0, 1, 0)

      issued, q_tiles = lax.fori_loop(
        0, rounds, item, (jnp.int32(0), jnp.int32(0))
      )
      wait_until_empty(issued, stages, k_empty, v_empty)

      @pl.when(q_tiles > 0)
      def _():
        plgpu.barrier_wait(q_empty)

    @pl.when(wg < 2)
    def consume():
      plgpu.set_max_registers(240, action="increase")

      def item(i, done):
        live, b, head, row, ql, kl = place(i)
        tiles_kv = jnp.where(live, tiles_seen(row, ROWS, ql, kl, bk), 0)
        row = row + 64 * wg
        mine = jnp.where(live, tiles_seen(row, 64, ql, kl, bk), 0)
        first = kl - ql + row  # the last token that the first row sees
        # tiles before the diagonal, seen whole by every row
        whole = lax.min(mine, lax.div(lax.max(first + 1, 0), bk))
        stage_of = lambda j: lax.rem(done + j, stages)

        @pl.when(tiles_kv > 0)
        def _():
          plgpu.barrier_wait(q_full)

        @pl.when(mine > 0)
        def _():
          by_row = lambda x, like: lax.broadcast_in_dim(x, like.shape, (0,))
          scale = load(qs_gmem.at[b, pl.ds(row, 64), head], _ROW)
          # A row of zeros may have any scale; its peak is divided by it.
          scale = jnp.maximum(scale * (math.log2(math.e) * h**-0.5), 1e-30)

          def attend(o_ref, s_ref):
            queries = load(q_smem.at[wg], _L.WGMMA_8BIT)
            plgpu.barrier_arrive(q_empty)

            def qk(j):
              s_ref[...] = plgpu.layout_cast(
                jnp.zeros((64, bk), jnp.float32), _L.WGMMA
              )
              plgpu.wgmma(s_ref, queries, k_smem.at[stage_of(j)].T)

            def pv(p, j):
              stage = stage_of(j)
              plgpu.barrier_wait(v_full.at[stage])
              plgpu.wgmma(o_ref, p, v_smem.at[stage].T)

            def exponents(x, j, peak, masked):
              stage = stage_of(j)
              scales = load(scales_smem.at[stage], fragments.TOKEN_PAIRS)
              e = fragments.exponents(x, scales, peak, scale)
              plgpu.barrier_arrive(k_empty.at[stage])
              if masked:
                e = fragments.masked(e, _iota((64,), 0, _ROW) + first - j * bk)
              return e

            def body(j, carry, masked):
              p, peak = carry
              plgpu.barrier_wait(k_full.at[stage_of(j)])
              plgpu.barrier_wait(turn.at[wg])
              qk(j)
              pv(p, j - 1)
              x = plgpu.wgmma_accumulator_load(s_ref, wait_n=1)
              e = exponents(x, j, peak, masked)
              plgpu.barrier_arrive(turn.at[1 - wg])
              o = plgpu.wgmma_accumulator_load(o_ref, wait_n=0)
              plgpu.barrier_arrive(v_empty.at[stage_of(j - 1)])
              p = fragments.probabilities(e)
              p, o, peak = fragments.settle(p, e, o, peak, scale)
              o_ref[...] = o
              return p, peak

            # Every row sees the first token, so its first peak is a number.
            plgpu.barrier_wait(k_full.at[stage_of(0)])
            plgpu.barrier_wait(turn.at[wg])
            qk(0)
            plgpu.barrier_arrive(turn.at[1 - wg])
            x = plgpu.wgmma_accumulator_load(s_ref, wait_n=0)
            zero = plgpu.layout_cast(jnp.zeros((64,), jnp.float32), _ROW)
            e = exponents(x, 0, zero, True)
            rise = fragments.first_rise(e)
            p = fragments.probabilities(e - by_row(rise, e))
            peak = rise / scale
            sums = sums_smem.at[wg]
            sums[...] = plgpu.layout_cast(
              jnp.zeros((64, h + WEIGHT_ROWS), jnp.float32), _L.WGMMA
            )

            def promoted(o, peak, old_peak):
              """The sums in f32 of tensor core sums and of those before."""
              shrink = jnp.exp2((old_peak - peak) * scale)
              return o + sums[...] * by_row(shrink, o)

            def chunk(i, carry):
              carry, old_peak = carry
              lo = 1 + i * chunk_tiles
              carry = lax.fori_loop(
                lo,
                lax.min(lo + chunk_tiles, whole),
                functools.partial(body, masked=False),
                carry,
              )
              o = plgpu.wgmma_accumulator_load(o_ref, wait_n=0)
              sums[...] = promoted(o, carry[1], old_peak)
              o_ref[...] = o - o
              return carry, carry[1]

            carry, old_peak = lax.fori_loop(
              0,
              lax.div(whole + (chunk_tiles - 2), chunk_tiles),
              chunk,
              ((p, peak), peak),
            )
            p, peak = lax.fori_loop(
              lax.max(whole, 1),
              mine,
              functools.partial(body, masked=True),
              carry,
            )
            pv(p, mine - 1)
            o = plgpu.wgmma_accumulator_load(o_ref, wait_n=0)
            o = promoted(o, peak, old_peak)
            plgpu.barrier_arrive(v_empty.at[stage_of(mine - 1)])
            unit = unit_gmem[b, lax.div(head, group)]
            real = _iota((64,), 0, _ROW) < ql - row
            o = fragments.normalise(o, jnp.where(real, unit, 0.0))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            o_smem.at[wg][...] = o.astype(jnp.bfloat16)

          pl.run_scoped(
            attend,
            plgpu.ACC((64, h + WEIGHT_ROWS), jnp.float32),
            plgpu.ACC((64, bk), jnp.float32),
          )

        rings = (k_full, k_empty), (v_full, v_empty)
        pass_over(mine, tiles_kv, wg, turn, rings, stage_of)

        @pl.when((tiles_kv > 0) & (mine == 0))
        def _():
          plgpu.barrier_arrive(q_empty)

        @pl.when(live & (mine == 0))
        def _():
          plgpu.wait_smem_to_gmem(0, wait_read_only=True)
          o_smem.at[wg][...] = plgpu.layout_cast(
            jnp.zeros((64, h), jnp.bfloat16), _L.WGMMA
          )

        @pl.when(live)
        def _():
          plgpu.commit_smem()
          plgpu.copy_smem_to_gmem(
            o_smem.at[wg], o_gmem.at[b, pl.ds(row, 64), head]
          )

        return done + tiles_kv

      @pl.when(wg == 1)
      def _():
        plgpu.barrier_arrive(turn.at[0])

      lax.fori_loop(0, rounds, item, jnp.int32(0))

      @pl.when(wg == 0)
      def _():
        plgpu.barrier_wait(turn.at[0])

      plgpu.wait_smem_to_gmem(0)

  return launch(
    kernel,
    out=jax.ShapeDtypeStruct((batch, t, n, h), jnp.bfloat16),
    grid={"cta": ctas},
    stages=stages,
    copies=2,
    scratch=dict(
      q_smem=swizzled((2, 64, h), _F8),
      k_smem=swizzled((stages, bk, h), _F8),
      v_smem=swizzled((stages, h + WEIGHT_ROWS, bk), _F8),
      scales_smem=plgpu.SMEM((stages, bk // 2, 4), jnp.float32),
      sums_smem=plgpu.SMEM((2, 64, h + WEIGHT_ROWS), jnp.float32),
      o_smem=swizzled((2, 64, h), jnp.bfloat16),
      q_empty=plgpu.Barrier(num_arrivals=2),
    ),
    name="prefill_attention",
  )(q, q_scale, k, v, weights, scales, unit, q_lengths, kv_lengths)
