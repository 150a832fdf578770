"""The e4m3 operand of a matmul of few tokens, quantised by the matmul itself.

The consumers of `int4_matmul_kernel` have nothing to do until the first weights
arrive. In this time they do the work of `act_quant`, with its functions and in
its order, so that the results are the same bit for bit, and leave the codes of
all tokens in shared memory. A warpgroup takes a token at a time.

If every CTA read all tokens, this would take longer than the weights do. So the
CTAs of a cluster share them out, and each stores the codes of its own tokens in
the memory of all:

  CTA 0, consumer 0 | copy token 0 | reduce | divide | store to CTA 0 and 1 |
         consumer 1 | copy token 1 | ...
         producer   | first weights | wait for tokens | more weights ...
  CTA 1, consumer 0 | copy token 2 | reduce | divide | store to CTA 0 and 1 |
         consumer 1 | copy token 3 | ...

Tokens come to shared memory by bulk copies, ahead of the weights, behind which
they would arrive last.
"""

import numpy as np
from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from fireq_jax.pallas import act_quant, exchange
from fireq_jax.pallas.inline import (
  Inlined,
  array,
  elements,
  fence_async_proxy,
  fixed_assembly,
  global_address,
  i32,
  load,
  shared_address,
  swizzled,
  sync_threads,
  vector,
)
from fireq_jax.pallas.layouts import BLOCK

WARPS = 4  # of a warpgroup, which share a token
_UNIT = 256  # channels that a warp loads at once
_MOST_CHANNELS = 8192  # of a token, for a thread's registers
_MOST_BYTES = 96 * 1024  # of the operand: weights need the rest
# Values that a thread holds at a time, by consumers.
_HELD = {1: 128, 2: 128, 3: 96, 4: 64}
_SWIZZLED = plgpu.RefType(
  (plgpu.TilingTransform((8, BLOCK)), plgpu.SwizzleTransform(BLOCK))
)


def fits(tokens: int, channels: int) -> bool:
  """Whether the kernel can quantise [tokens, channels]."""
  return (
    channels % (WARPS * _UNIT) == 0
    and channels <= _MOST_CHANNELS
    and pl.cdiv(tokens, 8) * 8 * channels <= _MOST_BYTES
  )


class QuantisedOperand:
  """How a kernel's CTAs quantise x [tokens, channels].

  Args:
    tokens, channels: T and C.
    eps: of a norm, or None.
    tile_t: rows of the operand; those beyond T hold anything.
    consumers: warpgroups.
    cluster: CTAs that quantise for each other.
  """

  def __init__(self, tokens, channels, eps, *, tile_t, consumers, cluster):
    self.tokens, self.channels, self.eps = tokens, channels, eps
    self.tile_t, self.consumers, self.cluster = tile_t, consumers, cluster
    self.share = pl.cdiv(tokens, cluster)  # tokens of a CTA
    self.turns = pl.cdiv(self.share, consumers)  # tokens of a consumer
    # Of these, those that it holds at a time.
    self.held = max(1, _HELD[consumers] * 32 * WARPS // channels)

  def scratch(self):
    """Memory: `x`, `x_scale` and what is needed on the way."""
    partial = self.consumers, self.turns, WARPS
    scratch = dict(
      x=swizzled(
        (self.channels // BLOCK, self.tile_t, BLOCK), jnp.float8_e4m3fn
      ),
      x_scale=plgpu.SMEM((self.tile_t,), jnp.float32),
      sums=plgpu.SMEM(partial, jnp.float32),
      peaks=plgpu.SMEM(partial, jnp.float32),
      done=plgpu.Barrier(num_arrivals=self.consumers),
    )
    if self.cluster > 1:
      scratch["fetched"] = plgpu.SMEM(
        (self.consumers, self.turns, 2), jnp.int32
      )
      scratch["received"] = plgpu.SMEM((2,), jnp.int32)
    return scratch

  def start(self, x, warpgroup, rank, memory):
    """Comes first, in all threads of a CTA."""
    if self.cluster == 1:
      return

    @pl.when(warpgroup == 0)
    def _():
      tokens = (self.cluster - 1) * self.share
      exchange.expect(memory["received"], tokens * (self.channels + 4))

    @pl.when(warpgroup < self.consumers)
    def _():
      for turn in range(self.turns):
        fetched = memory["fetched"].at[warpgroup, turn]
        exchange.expect(fetched, 2 * self.channels)
        place = self._place(warpgroup, turn)
        row = lax.min(rank * self.share + place, self.tokens - 1)
        self._copy(x, row, place, memory["x"], fetched)

    @pl.when(warpgroup == self.consumers)
    def _():
      exchange.arrive()

    sync_threads(self.consumers + 1)

  def wait_fetched(self, memory):
    """Waits, in any thread, until the rows of the CTA are there."""
    if self.cluster > 1:
      for consumer in range(self.consumers):
        for turn in range(self.turns):
          exchange.wait(memory["fetched"].at[consumer, turn], "cta")

  def _place(self, consumer, turn):
    """Which of the CTA's tokens it is; there is one, were it the last again."""
    return lax.min(consumer + turn * self.consumers, self.share - 1)

  def quantise(self, x, gain, consumer, rank, memory):
    """Fills `x` and `x_scale`, in each consumer.

    Args:
      x: bf16 [T, 4, C / 4] in global memory.
      gain: bf16 or f32 [4, C / 4] of a norm, or None.
      consumer: index of the warpgroup.
      rank: of the CTA in its cluster.
      memory: that of `scratch`.
    """
    [(part, layout)] = parts = act_quant.row_parts(self.channels // WARPS)
    weight = [] if gain is None else [load(gain.at[:, part], layout)]
    step = self.held if self.cluster == 1 else self.turns
    for first in range(0, self.turns, step):
      # Several tokens at a time, for the sake of the latencies.
      turns = range(first, min(first + step, self.turns))
      partial = [
        [memory[name].at[consumer, turn] for name in ("sums", "peaks")]
        for turn in turns
      ]
      places = [self._place(consumer, turn) for turn in turns]
      if self.cluster == 1:
        y = [load(x.at[place, :, part], layout) for place in places]
      else:
        y = []
        for turn, place in zip(turns, places):
          exchange.wait(memory["fetched"].at[consumer, turn], "cta")
          y.append(self._read(memory["x"], place, layout))
        exchange.arrive(after_reads=True)
      y = [
        act_quant.reduce_row([value], weight, parts, sums, peaks)
        for value, (sums, peaks) in zip(y, partial)
      ]
      plgpu.commit_smem()
      if self.cluster > 1:
        exchange.join()
      for turn, place, value, (sums, peaks) in zip(turns, places, y, partial):

        @pl.when(consumer + turn * self.consumers < self.share)
        def _(place=place, value=value, sums=sums, peaks=peaks):
          [codes], scale = act_quant.round_row(
            value, parts, sums, peaks, self.eps
          )
          row = rank * self.share + place
          self._put(codes, layout, scale, row, rank, memory)

    plgpu.commit_smem()
    plgpu.barrier_arrive(memory["done"])
    plgpu.barrier_wait(memory["done"])
    if self.cluster > 1:
      exchange.wait(memory["received"])
      fence_async_proxy()

  # The rows that a CTA quantises take as much memory as the codes of all
  # tokens, and the same, before every consumer of the cluster has read them.

  def _copy(self, x, row, place, target, barrier):
    """Starts to copy a row of x [T, 4, C / 4]; in a warpgroup."""
    size = 2 * self.channels

    def emit(_, row, place, x, target, barrier):
      [row], [place] = row.registers.flat, place.registers.flat
      text = f"""{{
        .reg .pred p;
        .reg .b32 i, to;
        .reg .b64 from;
        mov.u32 i, %tid.x;
        and.b32 i, i, 127;
        setp.eq.u32 p, i, 0;
        mad.lo.u32 to, $1, {size}, $3;
        mad.wide.u32 from, $0, {size}, $2;
        @p cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes
          [to], [from], {size}, [$4];
        }}"""
      operands = [
        row,
        place,
        global_address(x),
        shared_address(target),
        shared_address(barrier),
      ]
      fixed_assembly(text, operands, "r,r,l,r,r")

    splat, ref = plgpu.Layout.WG_SPLAT(()), plgpu.RefType()
    plgpu.inline_mgpu(arg_types=(splat, splat, ref, _SWIZZLED, ref))(emit)(
      row, place, x, target, barrier
    )

  def _read(self, source, place, layout):
    """bf16 [4, C / 4], a row that has been copied."""
    shape = WARPS, self.channels // WARPS
    text = f"""{{
      .reg .b32 i, w;
      mov.u32 i, %tid.x;
      bfe.u32 w, i, 5, 2;
      and.b32 i, i, 31;
      mad.lo.u32 $0, $2, {2 * self.channels}, $1;
      mad.lo.u32 $0, w, {2 * shape[1]}, $0;
      mad.lo.u32 $0, i, 16, $0;
      }}"""

    def emit(_, place, source):
      operands = [shared_address(source), *place.registers.flat]
      start = fixed_assembly(text, operands, "=&r,r,r", i32())
      out = np.empty(layout.to_mgpu().registers_shape(shape), object)
      eight = ir.VectorType.get((8,), ir.BF16Type.get())
      quad = ir.Type.parse("!llvm.struct<(i32, i32, i32, i32)>")
      for i in range(out.size):
        loaded = fixed_assembly(
          f"ld.shared.v4.b32 {{$0, $1, $2, $3}}, [$4 + {2 * _UNIT * i}];",
          [start],
          "=r,=r,=r,=r,r",
          quad,
        )
        words = [llvm.extractvalue(i32(), loaded, (j,)) for j in range(4)]
        out.reshape(-1)[i] = mgpu.utils.bitcast(vector(words), eight)
      return array(out, layout.to_mgpu())

    return plgpu.inline_mgpu(
      arg_types=(plgpu.Layout.WG_SPLAT(()), _SWIZZLED),
      return_type=plgpu.ShapeDtypeStruct(shape, jnp.bfloat16, layout),
    )(emit)(place, source)

  def _put(self, codes, layout, scale, row, rank, memory):
    """Stores codes e4m3 [4, C / 4] and scale of a row in all CTAs."""
    block = self.tile_t * BLOCK  # bytes of a block of 128 channels
    step = _UNIT // BLOCK * block  # from a word of a thread to its next

    def emit(_, codes, scale, row, rank, target, scales, *received):
      [scale], [row], [rank] = (x.registers.flat for x in (scale, row, rank))
      words = ir.VectorType.get((2,), i32())
      words = [
        elements(mgpu.utils.bitcast(register, words))
        for register in codes.registers.flat
      ]
      start = fixed_assembly(
        place_ptx(self.channels // WARPS, block),
        [shared_address(target), row],
        "=&r,r,r",
        i32(),
      )
      place = fixed_assembly(
        "mad.lo.u32 $0, $2, 4, $1;",
        [shared_address(scales), row],
        "=r,r,r",
        i32(),
      )
      for i, pair in enumerate(words):
        text = f"st.shared.v2.b32 [$0 + {i * step}], {{$1, $2}};"
        fixed_assembly(text, [start, *pair], "r,r,r")
      once = _once("st.shared.f32 [$0], $1;")
      fixed_assembly(once, [place, scale], "r,f")
      send = "st.async.shared::cluster.mbarrier::complete_tx::bytes"
      for distance in range(1, self.cluster):
        to, scale_to, signal = (
          _of_other(address, rank, distance, self.cluster)
          for address in (start, place, shared_address(received[0]))
        )
        for i, pair in enumerate(words):
          text = f"{send}.v2.b32 [$0 + {i * step}], {{$2, $3}}, [$1];"
          fixed_assembly(text, [to, signal, *pair], "r,r,r,r")
        once = _once(f"{send}.f32 [$0], $2, [$1];")
        fixed_assembly(once, [scale_to, signal, scale], "r,r,f")

    splat, ref = plgpu.Layout.WG_SPLAT(()), plgpu.RefType()
    received = [memory["received"]] if self.cluster > 1 else []
    plgpu.inline_mgpu(
      arg_types=(
        layout,
        *[splat] * 3,
        _SWIZZLED,
        *[ref] * (1 + len(received)),
      )
    )(Inlined(emit, "put_row"))(
      codes, scale, row, rank, memory["x"], memory["x_scale"], *received
    )


def place_ptx(channels: int, block: int) -> str:
  """PTX of the address of a thread's first 8 codes of a row, in $0.

  $1 is the address of the operand, whose rows are swizzled, and $2 the row.

  Args:
    channels: of a warp; its lanes take 8 of every 256.
    block: bytes of a block.
  """
  return f"""{{
    .reg .b32 i, a, b;
    mov.u32 i, %tid.x;
    bfe.u32 a, i, 5, 2;
    bfe.u32 b, i, 4, 1;
    mad.lo.u32 a, a, {channels // BLOCK}, b;
    mad.lo.u32 $0, a, {block}, $1;
    mad.lo.u32 $0, $2, {BLOCK}, $0;
    bfe.u32 a, i, 1, 3;
    xor.b32 a, a, $2;
    and.b32 a, a, 7;
    mad.lo.u32 $0, a, 16, $0;
    and.b32 a, i, 1;
    mad.lo.u32 $0, a, 8, $0;
    }}"""


def _of_other(address, rank, distance, cluster):
  """The address in the CTA so many ranks further round the cluster."""
  text = f"""{{
    .reg .b32 r;
    add.u32 r, $2, {distance};
    and.b32 r, r, {cluster - 1};
    mapa.shared::cluster.u32 $0, $1, r;
    }}"""
  return fixed_assembly(text, [address, rank], "=&r,r,r", i32())


def _once(instruction):
  """In the first thread of a warpgroup."""
  return f"""{{
    .reg .pred p;
    .reg .b32 i;
    mov.u32 i, %tid.x;
    and.b32 i, i, 127;
    setp.eq.u32 p, i, 0;
    @p {instruction}
    }}"""
