"""Causal prefill attention over bf16 keys and values.

The kernel of the unquantised model: `prefill_attention` without codes, scales
and sums that need care. Scores, maxima and sums are f32, probabilities bf16.

Who does what in a CTA, each consumer with 64 rows of its own; t is a tile of kv
tokens, taken in order:

  producer    | q | k0 | k1 v0 | k2 v1 | k3 v2 | ...      TMA into rings
  tensor core |      QK0 |       QK1 PV0 |       QK2 PV1 |
  consumer    |          softmax 0       softmax 1       softmax 2

The two consumers take turns: one's exponentials run while the tensor core works
for the other.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from fireq_jax.pallas import prefill_fragments as fragments
from fireq_jax.pallas.inline import fence_async_proxy, swizzled
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
_STAGES = 2  # tiles of k and of v in flight or in use


def supported(q: jax.Array, k: jax.Array) -> None:
  """Returns if the kernel can run this.

  Raises:
    NotImplementedError: it cannot, with the reason.
  """
  for ok, reason in (
    (q.shape[-1] in (64, 128), f"head_dim {q.shape[-1]}"),
    (
      q.dtype == k.dtype == jnp.bfloat16,
      f"queries of {q.dtype}, keys of {k.dtype}",
    ),
  ):
    if not ok:
      raise NotImplementedError(f"this kernel does not handle {reason}")


def prefill_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  starts: jax.Array,
  counts: jax.Array,
) -> jax.Array:
  """Attends many queries to tokens that include their own.

  Args:
    q: bf16 [B, T, N, H]; query t of row b sees tokens up to `starts[b] + t`.
    k: bf16 [B, K, S, H]. What lies beyond the last visible token must be
      finite.
    v: bf16 [B, K, S, H], the same.
    starts: i32 [B], the position of each row's first query.
    counts: i32 [B], how many of the T queries are real; others give zeros.

  Returns:
    bf16 [B, T, N, H].

  Raises:
    NotImplementedError: see `supported`.
  """
  supported(q, k)
  length = q.shape[1]
  # TMA copies eight rows at a time.
  pad = lambda x, axis: jnp.pad(
    x, [(0, -n % 8 if i == axis else 0) for i, n in enumerate(x.shape)]
  )
  out = _kernel(pad(q, 1), pad(k, 2), pad(v, 2), counts, starts + counts)
  return out[:, :length]


def _kernel(q, k, v, q_lengths, kv_lengths):
  batch, t, n, h = q.shape
  group = n // k.shape[1]
  tile = size_of_tile(k.shape[2])
  tiles = -(-t // ROWS)

  def kernel(
    q_gmem, k_gmem, v_gmem, ql_gmem, kl_gmem, o_gmem, *, q_smem, k_smem, v_smem,
    q_full, k_full, k_empty, v_full, v_empty, turn,
  ):  # fmt: skip
    wg = lax.axis_index("wg")
    head, b = lax.axis_index("head"), lax.axis_index("b")
    row = (tiles - 1 - lax.axis_index("tile")) * ROWS  # longest first
    ql, kl = ql_gmem[b], kl_gmem[b]
    total = tiles_seen(row, ROWS, ql, kl, tile)
    stage_of = lambda j: lax.rem(j, _STAGES)

    @pl.when(wg == 2)
    def produce():
      # Even without tiles: consumers wait for the registers.
      plgpu.set_max_registers(24, action="decrease")
      kv_head = lax.div(head, group)

      @pl.when(total > 0)
      def _():
        for w in range(2):
          plgpu.copy_gmem_to_smem(
            q_gmem.at[b, pl.ds(row + 64 * w, 64), head], q_smem.at[w], q_full
          )

      def step(j, _):
        stage = stage_of(j)
        tokens = pl.ds(j * tile, tile)
        for source, ring, full, empty in (
          (k_gmem, k_smem, k_full, k_empty),
          (v_gmem, v_smem, v_full, v_empty),
        ):

          @pl.when(j >= _STAGES)
          def _(empty=empty):
            plgpu.barrier_wait(empty.at[stage])
            fence_async_proxy()

          plgpu.copy_gmem_to_smem(
            source.at[b, kv_head, tokens], ring.at[stage], full.at[stage]
          )

      lax.fori_loop(0, total, step, None)
      wait_until_empty(total, _STAGES, k_empty, v_empty)

    @pl.when(wg < 2)
    def consume():
      plgpu.set_max_registers(240, action="increase")
      mine_row = row + 64 * wg
      mine = tiles_seen(mine_row, 64, ql, kl, tile)
      first = kl - ql + mine_row  # the last token that the first row sees
      # tiles before the diagonal, seen whole by every row
      whole = lax.min(mine, lax.div(lax.max(first + 1, 0), tile))
      by_row = lambda x, like: lax.broadcast_in_dim(x, like.shape, (0,))
      row_of = plgpu.broadcasted_iota(jnp.int32, (64,), 0, layout=_ROW)
      zeros = lambda shape, layout, dtype=jnp.float32: plgpu.layout_cast(
        jnp.zeros(shape, dtype), layout
      )

      @pl.when((wg == 1) & (total > 0))
      def _():
        plgpu.barrier_arrive(turn.at[0])

      @pl.when(total > 0)
      def _():
        plgpu.barrier_wait(q_full)

      @pl.when(mine > 0)
      def _():
        def attend(o_ref, s_ref):
          def qk(j):
            s_ref[...] = zeros((64, tile), _L.WGMMA)
            plgpu.wgmma(s_ref, q_smem.at[wg], k_smem.at[stage_of(j)].T)

          def pv(p, j):
            plgpu.wgmma(o_ref, p, v_smem.at[stage_of(j)])

          def scores(x, j, masked):
            plgpu.barrier_arrive(k_empty.at[stage_of(j)])
            x = x * (math.log2(math.e) * h**-0.5)
            if masked:
              x = fragments.masked(x, row_of + first - j * tile)
            return x

          def body(j, carry, masked):
            p, peak, weight = carry
            plgpu.barrier_wait(k_full.at[stage_of(j)])
            plgpu.barrier_wait(v_full.at[stage_of(j - 1)])
            plgpu.barrier_wait(turn.at[wg])
            qk(j)
            pv(p, j - 1)
            x = scores(plgpu.wgmma_accumulator_load(s_ref, wait_n=1), j, masked)
            plgpu.barrier_arrive(turn.at[1 - wg])
            new_peak = jnp.maximum(peak, x.max(axis=1))
            shrink = jnp.exp2(peak - new_peak)
            p = jnp.exp2(x - by_row(new_peak, x))
            weight = weight * shrink + p.sum(axis=1)
            o = plgpu.wgmma_accumulator_load(o_ref, wait_n=0)
            plgpu.barrier_arrive(v_empty.at[stage_of(j - 1)])
            o_ref[...] = o * by_row(shrink, o)
            return p.astype(jnp.bfloat16), new_peak, weight

          # Every row sees the first token, so its first peak is a number.
          plgpu.barrier_wait(k_full.at[0])
          plgpu.barrier_wait(turn.at[wg])
          qk(0)
          plgpu.barrier_arrive(turn.at[1 - wg])
          x = scores(plgpu.wgmma_accumulator_load(s_ref, wait_n=0), 0, True)
          peak = x.max(axis=1)
          p = jnp.exp2(x - by_row(peak, x))
          carry = p.astype(jnp.bfloat16), peak, p.sum(axis=1)
          for low, high, masked in ((1, whole, False), (whole, mine, True)):
            carry = lax.fori_loop(
              lax.max(low, 1),
              high,
              functools.partial(body, masked=masked),
              carry,
            )
          p, _, weight = carry
          plgpu.barrier_wait(v_full.at[stage_of(mine - 1)])
          pv(p, mine - 1)
          o = plgpu.wgmma_accumulator_load(o_ref, wait_n=0)
          plgpu.barrier_arrive(v_empty.at[stage_of(mine - 1)])
          real = row_of < ql - mine_row
          factor = jnp.where(real, 1 / weight, 0.0)
          # Nothing reads the queries any more.
          q_smem.at[wg][...] = (o * by_row(factor, o)).astype(jnp.bfloat16)

        pl.run_scoped(
          attend,
          plgpu.ACC((64, h), jnp.float32),
          plgpu.ACC((64, tile), jnp.float32),
        )

      rings = (k_full, k_empty), (v_full, v_empty)
      pass_over(mine, total, wg, turn, rings, stage_of)

      @pl.when((wg == 0) & (total > 0))
      def _():
        plgpu.barrier_wait(turn.at[0])

      @pl.when(mine == 0)
      def _():
        q_smem.at[wg][...] = zeros((64, h), _L.WGMMA, jnp.bfloat16)

      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(
        q_smem.at[wg], o_gmem.at[b, pl.ds(mine_row, 64), head]
      )
      plgpu.wait_smem_to_gmem(0)

  bf16 = jnp.bfloat16
  return launch(
    kernel,
    out=jax.ShapeDtypeStruct((batch, t, n, h), bf16),
    grid={"head": n, "b": batch, "tile": tiles},
    stages=_STAGES,
    copies=1,
    scratch=dict(
      q_smem=swizzled((2, 64, h), bf16),
      k_smem=swizzled((_STAGES, tile, h), bf16),
      v_smem=swizzled((_STAGES, tile, h), bf16),
    ),
    name="prefill_bf16",
  )(q, k, v, q_lengths, kv_lengths)
