"""Causal prefill attention in FP8 over INT4 codes.

For every query row r (token, head) and cached token s, with q, k and v of
dtype e4m3 (k and v hold INT4 codes, which e4m3 represents exactly):

  score[r, s] = sm_scale * q_scale[r] * k_scale[s] * sum_h q[r, h] k[s, h]
  p[r, s]     = e4m3(c * exp(score[r, s] - max) * v_scale[s])
  out[r, h]   = sum_s p[r, s] v[s, h] / (c * sum_s exp(score[r, s] - max))

c = 448 / max v_scale makes p fill the range of e4m3. Scores, maxima,
exponentials and sums are f32. A row sees tokens up to its own, the last row
the last token, so that a prefill can continue a cache.

Who does what in a persistent CTA, each consumer with 64 rows of its own; t is a
tile of kv tokens, taken from the diagonal down:

  producer    | q | k0 | k1 v0 | k2 v1 | k3 v2 | ...      TMA into rings
  tensor core |      QK0 |       QK1 PV0 |       QK2 PV1 |
  consumer    |          softmax 0       softmax 1       softmax 2

PV of tile t - 1 runs while the consumer's own softmax of tile t does, and the
other consumer's softmax covers QK.

P needs no movement between threads: its accumulator registers are an e4m3 A
operand if tokens are permuted inside blocks of 16 (`KV_ORDER`), so v is stored
transposed and in that order, which also is what 8-bit wgmma demands.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir

from fireq_jax.config import check
from fireq_jax.pallas.inline import (
  array,
  assembly,
  elements,
  fence_async_proxy,
  i32,
  inline,
  load,
)
from fireq_jax.pallas.kv_layout import KV_ORDER

_L = plgpu.Layout
_ROW = _L.WGMMA.reduce(1)
_COL = _L.WGMMA.reduce(0)
_F8 = jnp.float8_e4m3fn
_NEVER = -1e30  # a maximum below every score, finite so that differences are
_ROWS = 128  # query rows of an item: 64 a consumer


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
  """Free choices of the kernel.

  Attributes:
    block_kv: kv tokens of a tile, a multiple of 32.
    stages: tiles of k and of v in flight or in use.
    ctas: persistent CTAs, one a multiprocessor.
  """

  block_kv: int = 128
  stages: int = 3
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


def _transforms(bits, minor):
  swizzle = plgpu.find_swizzle(minor * bits)
  return (
    plgpu.TilingTransform((8, swizzle * 8 // bits)),
    plgpu.SwizzleTransform(swizzle),
  )


def _p_to_operand(p: jax.Array) -> jax.Array:
  """f32 accumulator [64, S] -> e4m3 A operand, tokens in `KV_ORDER`."""

  def emit(p):
    bytes_of = ir.VectorType.get((4,), ir.IntegerType.get_signless(8))
    e4m3 = ir.VectorType.get((4,), ir.Float8E4M3FNType.get())
    layout = mgpu.WGMMA_LAYOUT_8BIT
    out = np.empty(layout.registers_shape(p.shape), dtype=object)
    for index in np.ndindex(out.shape):
      pairs = [
        p.registers[(index[0], 2 * index[1] + half, *index[2:])]
        for half in range(2)
      ]
      word = assembly(
        i32(),
        [*elements(pairs[0]), *elements(pairs[1])],
        "{ .reg .b16 lo, hi;"
        " cvt.rn.satfinite.e4m3x2.f32 lo, $2, $1;"
        " cvt.rn.satfinite.e4m3x2.f32 hi, $4, $3;"
        " mov.b32 $0, {lo, hi}; }",
        "=r,f,f,f,f",
      )
      out[index] = mgpu.utils.bitcast(mgpu.utils.bitcast(word, bytes_of), e4m3)
    return array(out, layout)

  def model(p):
    blocks = p.reshape(p.shape[0], -1, 16)[..., KV_ORDER]
    return jnp.clip(blocks.reshape(p.shape), 0, 448).astype(_F8)

  return inline(
    emit,
    model,
    arg_types=(_L.WGMMA,),
    return_type=plgpu.ShapeDtypeStruct(p.shape, _F8, _L.WGMMA_8BIT),
  )(p)


def prefill_attention(
  q: jax.Array,
  q_scale: jax.Array,
  k: jax.Array,
  k_scale: jax.Array,
  v: jax.Array,
  v_scale: jax.Array,
  starts: jax.Array,
  counts: jax.Array,
  *,
  tuning: Tuning | None = None,
) -> jax.Array:
  """Attends many queries to tokens that include their own.

  Args:
    q: e4m3 [B, T, N, H]; query t of row b sees tokens up to `starts[b] + t`.
    q_scale: f32 [B, T, N].
    k: e4m3 [B, K, S, H], S a multiple of 128.
    k_scale: f32 [B, K, S].
    v: e4m3 [B, K, H, S], tokens of each 16 in `KV_ORDER`.
    v_scale: f32 [B, K, S].
    starts: i32 [B], the position of each row's first query.
    counts: i32 [B], how many of the T queries are real; others give zeros.
    tuning: the free choices.

  Returns:
    bf16 [B, T, N, H].

  Raises:
    NotImplementedError: see `unsupported`.
  """
  if reason := unsupported(q, k):
    raise NotImplementedError(reason)
  length, head_dim = q.shape[1], q.shape[3]

  def pad(x, multiple):
    rows = (0, -length % multiple)
    return jnp.pad(x, ((0, 0), rows) + ((0, 0),) * (x.ndim - 2))

  log2_scale = q_scale * (math.log2(math.e) * head_dim**-0.5)
  lengths = starts + counts
  token = jnp.arange(v_scale.shape[2], dtype=jnp.int32)
  held = jnp.where(token < lengths[:, None, None], v_scale, 0.0)
  largest = jnp.maximum(jnp.max(held, axis=-1), jnp.finfo(jnp.float32).tiny)
  out = _kernel(
    pad(q, 8),  # TMA copies eight rows at a time
    jnp.swapaxes(pad(log2_scale, _ROWS), 1, 2),
    k,
    k_scale,
    v,
    v_scale,
    math.log2(448.0) - jnp.log2(largest),
    counts,
    lengths,
    tuning=tuning or Tuning(),
  )
  return out[:, :length]


def unsupported(q: jax.Array, k: jax.Array) -> str | None:
  """Why the kernel cannot attend with these operands, or None."""
  if q.shape[-1] not in (64, 128):
    return f"head_dim {q.shape[-1]} is neither 64 nor 128"
  if q.dtype != _F8 or k.dtype != _F8:
    return f"queries are {q.dtype} and keys {k.dtype}, not e4m3"
  if k.shape[2] % 128:
    return f"{k.shape[2]} kv tokens are not a multiple of 128"
  return None


def _kernel(
  q, q_scale, k, k_scale, v, v_scale, v_unit, q_lengths, kv_lengths, *, tuning
):
  """Runs the kernel.

  Operands are those of `prefill_attention`, but for q_scale f32 [B, N, T] in
  log2 units, v_unit f32 [B, K] (log2 of c) and kv_lengths i32 [B], the tokens
  that each row's last real query sees.
  """
  batch, t, n, h = q.shape
  kv_heads, s = k.shape[1:3]
  group = n // kv_heads
  bk, stages = tuning.block_kv, tuning.stages
  tiles = -(-t // _ROWS)
  items = batch * n * tiles
  ctas = min(tuning.ctas, items)
  rounds = -(-items // ctas)

  def kernel(
    q_gmem, qs_gmem, k_gmem, ks_gmem, v_gmem, vs_gmem, unit_gmem, ql_gmem,
    kl_gmem, o_gmem,
    *,
    q_smem, k_smem, v_smem, ks_smem, vs_smem, o_smem, q_full, q_empty, k_full,
    k_empty, v_full, v_empty, turn,
  ):  # fmt: skip
    wg = lax.axis_index("wg")
    cta = lax.axis_index("cta")

    def place(i):
      """Item of round i: longest first, every other round in reverse."""
      column = jnp.where(lax.rem(i, 2) == 0, cta, ctas - 1 - cta)
      item = i * ctas + column
      b = lax.rem(lax.div(item, n), batch)
      row = (tiles - 1 - lax.div(item, n * batch)) * _ROWS
      ql, kl = ql_gmem[lax.min(b, batch - 1)], kl_gmem[lax.min(b, batch - 1)]
      return item < items, b, lax.rem(item, n), row, ql, kl

    def count(row, rows, ql, kl):
      """kv tiles that rows row .. row + rows - 1 see."""
      last = lax.min(row + rows, ql) + kl - ql
      return jnp.where(row < ql, lax.div(last + bk - 1, bk), 0)

    @pl.when(wg == 2)
    def produce():
      plgpu.set_max_registers(24, action="decrease")

      def item(i, carry):
        issued, q_tiles = carry
        live, b, head, row, ql, kl = place(i)
        kv_head = lax.div(head, group)
        tiles_kv = jnp.where(live, count(row, _ROWS, ql, kl), 0)

        @pl.when(tiles_kv > 0)
        def _():
          @pl.when(q_tiles > 0)
          def _():
            plgpu.barrier_wait(q_empty)

          for w in range(2):
            plgpu.copy_gmem_to_smem(
              q_gmem.at[b, pl.ds(row + 64 * w, 64), head], q_smem.at[w], q_full
            )

        def step(j, _):
          tile = tiles_kv - 1 - j
          stage = lax.rem(issued + j, stages)
          tokens = pl.ds(tile * bk, bk)
          again = issued + j >= stages

          @pl.when(again)
          def _():
            plgpu.barrier_wait(k_empty.at[stage])
            fence_async_proxy()

          for source, target in (
            (k_gmem, k_smem), (ks_gmem, ks_smem), (vs_gmem, vs_smem)
          ):  # fmt: skip
            plgpu.copy_gmem_to_smem(
              source.at[b, kv_head, tokens], target.at[stage], k_full.at[stage]
            )

          @pl.when(again)
          def _():
            plgpu.barrier_wait(v_empty.at[stage])

          plgpu.copy_gmem_to_smem(
            v_gmem.at[b, kv_head, :, tokens], v_smem.at[stage], v_full.at[stage]
          )

        lax.fori_loop(0, tiles_kv, step, None)
        return issued + tiles_kv, q_tiles + jnp.where(tiles_kv > 0, 1, 0)

      issued, q_tiles = lax.fori_loop(
        0, rounds, item, (jnp.int32(0), jnp.int32(0))
      )
      for stage in range(stages):

        @pl.when(issued > stage)
        def _(stage=stage):
          plgpu.barrier_wait(k_empty.at[stage])
          plgpu.barrier_wait(v_empty.at[stage])

      @pl.when(q_tiles > 0)
      def _():
        plgpu.barrier_wait(q_empty)

    @pl.when(wg < 2)
    def consume():
      plgpu.set_max_registers(240, action="increase")

      def item(i, done):
        live, b, head, row, ql, kl = place(i)
        tiles_kv = jnp.where(live, count(row, _ROWS, ql, kl), 0)
        row = row + 64 * wg
        mine = jnp.where(live, count(row, 64, ql, kl), 0)
        skip = tiles_kv - mine
        first = kl - ql + row  # the last token that the first row sees
        # tiles before the diagonal, seen whole by every row
        whole = lax.min(mine, lax.div(lax.max(first + 1, 0), bk))
        stage_of = lambda j: lax.rem(done + j, stages)

        @pl.when(tiles_kv > 0)
        def _():
          plgpu.barrier_wait(q_full)

        def take_turn(action):
          """Lets the consumers issue their products one after the other."""
          plgpu.barrier_wait(turn.at[wg])
          result = action()
          plgpu.barrier_arrive(turn.at[1 - wg])
          return result

        def pass_over(j, _):
          stage = stage_of(j)
          take_turn(lambda: None)
          plgpu.barrier_wait(k_full.at[stage])
          plgpu.barrier_arrive(k_empty.at[stage])
          plgpu.barrier_wait(v_full.at[stage])
          plgpu.barrier_arrive(v_empty.at[stage])

        lax.fori_loop(0, skip, pass_over, None)

        @pl.when(mine > 0)
        def _():
          unit = unit_gmem[b, lax.div(head, group)]
          scale = load(qs_gmem.at[b, head, pl.ds(row, 64)], _ROW)
          by_row = lambda x, like: lax.broadcast_in_dim(x, like.shape, (0,))
          by_token = lambda x, like: lax.broadcast_in_dim(x, like.shape, (1,))

          def token_scales(stage):
            return load(ks_smem.at[stage], _COL), load(vs_smem.at[stage], _COL)

          def softmax(x, j, m, l, scales, masked):
            k_scale, v_scale = scales
            x = x * by_token(k_scale, x)
            if masked:
              row_limit = _iota((64,), 0, _ROW) + (first - (mine - 1 - j) * bk)
              token = _iota(x.shape, 1, _L.WGMMA)
              x = jnp.where(token <= by_row(row_limit, x), x, -jnp.inf)
            m_new = jnp.maximum(m, x.max(axis=1))
            alpha = jnp.exp2((m - m_new) * scale)
            peak = m_new * scale - unit
            p = jnp.exp2(x * by_row(scale, x) - by_row(peak, x))
            l = l * alpha + p.sum(axis=1)
            return p * by_token(v_scale, p), alpha, m_new, l

          def attend(o_ref, s_ref):
            def qk(j):
              s_ref[...] = plgpu.layout_cast(
                jnp.zeros((64, bk), jnp.float32), _L.WGMMA
              )
              plgpu.wgmma(s_ref, q_smem.at[wg], k_smem.at[stage_of(skip + j)].T)

            def pv(p, j):
              stage = stage_of(skip + j)
              plgpu.barrier_wait(v_full.at[stage])
              plgpu.wgmma(o_ref, p, v_smem.at[stage].T)

            def body(j, carry, masked):
              p, m, l = carry
              stage = stage_of(skip + j)
              plgpu.barrier_wait(k_full.at[stage])
              # Ahead of the products, where registers allow it.
              scales = None if masked else token_scales(stage)

              @take_turn
              def _():
                qk(j)
                pv(p, j - 1)

              x = plgpu.wgmma_accumulator_load(s_ref, wait_n=1)
              scales = scales or token_scales(stage)
              p, alpha, m, l = softmax(x, j, m, l, scales, masked)
              plgpu.barrier_arrive(k_empty.at[stage])
              o = plgpu.wgmma_accumulator_load(o_ref, wait_n=0)
              plgpu.barrier_arrive(v_empty.at[stage_of(skip + j - 1)])
              o_ref[...] = o * by_row(alpha, o)
              return _p_to_operand(p), m, l

            stage = stage_of(skip)
            plgpu.barrier_wait(k_full.at[stage])
            take_turn(lambda: qk(0))
            m = plgpu.layout_cast(jnp.full((64,), _NEVER, jnp.float32), _ROW)
            l = plgpu.layout_cast(jnp.zeros((64,), jnp.float32), _ROW)
            x = plgpu.wgmma_accumulator_load(s_ref, wait_n=0)
            p, _, m, l = softmax(x, 0, m, l, token_scales(stage), True)
            plgpu.barrier_arrive(k_empty.at[stage])
            carry = _p_to_operand(p), m, l

            diagonal = lax.max(mine - whole, 1)
            for lo, hi, masked in (
              (1, diagonal, True),
              (diagonal, mine, False),
            ):
              carry = lax.fori_loop(
                lo, hi, functools.partial(body, masked=masked), carry
              )
            p, m, l = carry
            pv(p, mine - 1)
            o = plgpu.wgmma_accumulator_load(o_ref, wait_n=0)
            plgpu.barrier_arrive(v_empty.at[stage_of(skip + mine - 1)])
            real = _iota((64,), 0, _ROW) < ql - row
            o = o * by_row(jnp.where(real, 1.0 / l, 0.0), o)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            o_smem.at[wg][...] = o.astype(jnp.bfloat16)

          pl.run_scoped(
            attend,
            plgpu.ACC((64, h), jnp.float32),
            plgpu.ACC((64, bk), jnp.float32),
          )

        @pl.when(tiles_kv > 0)
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

  return plgpu.kernel(
    kernel,
    out_type=jax.ShapeDtypeStruct((batch, t, n, h), jnp.bfloat16),
    grid=(ctas,),
    grid_names=("cta",),
    num_threads=3,
    thread_name="wg",
    scratch_types=dict(
      q_smem=plgpu.SMEM((2, 64, h), _F8, transforms=_transforms(8, h)),
      k_smem=plgpu.SMEM((stages, bk, h), _F8, transforms=_transforms(8, h)),
      v_smem=plgpu.SMEM((stages, h, bk), _F8, transforms=_transforms(8, bk)),
      ks_smem=plgpu.SMEM((stages, bk), jnp.float32),
      vs_smem=plgpu.SMEM((stages, bk), jnp.float32),
      o_smem=plgpu.SMEM(
        (2, 64, h), jnp.bfloat16, transforms=_transforms(16, h)
      ),
      q_full=plgpu.Barrier(num_arrivals=2),
      q_empty=plgpu.Barrier(num_arrivals=2),
      k_full=plgpu.Barrier(num_arrivals=3, num_barriers=stages),
      k_empty=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
      v_full=plgpu.Barrier(num_barriers=stages),
      v_empty=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
      turn=plgpu.Barrier(num_barriers=2),
    ),
    compiler_params=plgpu.CompilerParams(
      approx_math=True,
      unsafe_no_auto_barriers=True,
      reduction_scratch_bytes=0,
      lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
    ),
    kernel_name="prefill_attention",
  )(
    q, q_scale, k, k_scale, v, v_scale, v_unit, q_lengths, kv_lengths
  )  # fmt: skip
