"""INT4 weights times FP8 (or bf16) activations on Hopper tensor cores.

  y[t, n] = act(x_scale[t] * row_scale[n] * sum_c x[t, c] * w[n, c] + bias[n])

The product is computed transposed: weights are the wgmma A operand, which may
come from registers, so INT4 codes go from shared memory to registers, become
e4m3 there (`dequant`), and meet x, the B operand, in shared memory. Tokens are
the N of wgmma, 8 to 256. A CTA takes tiles of `rows` rows of w by `tile_t`
tokens in steps of `blocks` blocks of 128 along C:

  producer     | TMA: codes, scales and x of the steps to come, in a ring ...
  consumer 0   | wait | codes -> e4m3 | wgmma | wait | ...    | epilogue |
  consumer 1   |   wait | codes -> e4m3 | wgmma | wait | ...  | epilogue |

A consumer is a warpgroup; it holds up to 64 rows. While one converts, another
keeps the tensor core busy. Two consumers share the rows of a tile; with
`interleave` 2 or 4, that many sets of consumers take turns at the steps and add
up their sums at the end of a tile. This hides the latency of the conversion
where memory sets the pace, with few tokens.

Scales. e4m3 group scales are part of the operand: the 16 possible products of
a group, rounded to e4m3, are a table in registers. bf16 group scales leave the
codes exact: each group's f32 partial sum is multiplied by its scale.

Few tokens. All SMs must pull the same number of bytes, and wgmma always works
on 64 rows, but it may work on rows that nobody loads or stores: `rows` is
chosen such that the tiles fill a whole number of waves.

Gate and up. Consumer 0 holds rows of the gate and consumer 1 the same rows of
the up projection; they swap half of their tokens through shared memory, and
each finishes silu(gate) * up of its half.
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from fireq_jax.config import check
from fireq_jax.pallas import dequant
from fireq_jax.pallas.layouts import BLOCK, PackedInt4

Epilogue = Literal["linear", "add", "mul", "silu"]

_WGMMA = plgpu.Layout.WGMMA
_TRANSPOSED = plgpu.Layout.WGMMA_TRANSPOSED
_BY_ROW = plgpu.Layout.WGMMA.reduce(1)
_BY_TOKEN = plgpu.Layout.WGMMA.reduce(0)
_ROWS = 64  # of a wgmma
_SCALE_ROWS = 2 * _ROWS  # copied for any tile, for the sake of alignment
_TMA_ALIGNMENT = 128
_SHARED_BYTES = 227 * 1024
_REGISTERS = {1: (232, 40), 2: (232, 40), 4: (112, 32)}  # by consumers


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
  """How the work is cut; it changes results only by rounding.

  Attributes:
    tile_t: tokens of a tile, a multiple of 8 up to 256.
    stages: steps the ring buffer holds, a multiple of `interleave`.
    rows: rows of a tile: 16, 32, 48 or 64 for one consumer, 128 for two. If
      it is not 64 or 128, it must divide the rows of the output.
    blocks: blocks of 128 along C in a step.
    interleave: sets of consumers that take turns at the steps: 1, 2 or 4.
    ctas: CTAs that run; CTA i takes every `ctas`-th tile.
    raster: token tiles that are swept together, for reuse in the L2 cache.
  """

  tile_t: int
  stages: int
  rows: int = 128
  blocks: int = 1
  interleave: int = 1
  ctas: int = 132
  raster: int = 16

  def __post_init__(self):
    for name, low, high, multiple in (
      ("tile_t", 8, 256, 8),
      ("rows", 16, 128, 16 if self.rows <= _ROWS else 2 * _ROWS),
      ("stages", 1, 32, self.interleave),
      ("blocks", 1, 8, 1),
    ):
      value = getattr(self, name)
      check(
        low <= value <= high and value % multiple == 0,
        f"{name} must be a multiple of {multiple} from {low} to {high}",
        got=value,
      )
    check(
      self.row_groups * self.interleave in _REGISTERS,
      "there are 1, 2 or 4 consumers",
      got=self.row_groups * self.interleave,
    )

  @property
  def row_groups(self) -> int:
    return pl.cdiv(self.rows, _ROWS)


def supported(
  x: jax.Array,
  w: PackedInt4,
  x_scale: jax.Array | None = None,
  *,
  bias: jax.Array | None = None,
  operand: jax.Array | None = None,
  epilogue: Epilogue = "linear",
  out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
) -> None:
  """Returns if the kernel can run this.

  Raises:
    NotImplementedError: it cannot, with the reason.
  """
  n, c = w.shape
  e4m3_scale = w.scale.dtype == jnp.float8_e4m3fn
  for ok, reason in (
    (x.ndim == 2 and x.shape[0] > 0, f"x of shape {x.shape}"),
    (x.dtype == w.activation_dtype, f"x of {x.dtype} with this weight"),
    (
      (x_scale is None) == (w.activation == "bf16"),
      "x_scale must come with e4m3 activations, and only with them",
    ),
    (
      n // (2 if w.gated else 1) % _ROWS == 0 and c % _ROWS == 0,
      f"sizes {n} and {c} that are not multiples of 64",
    ),
    (
      e4m3_scale or w.scale.dtype == jnp.bfloat16,
      f"group scales of {w.scale.dtype}",
    ),
    (
      not (w.activation == "bf16" and e4m3_scale),
      "e4m3 group scales with bf16 activations",
    ),
    (
      w.group == BLOCK or (e4m3_scale and w.group == BLOCK // 2),
      f"groups of {w.group} with scales of {w.scale.dtype}",
    ),
    (
      c % BLOCK == 0 or c < BLOCK,
      f"an input size of {c}, not a multiple of {BLOCK}",
    ),
    (
      jnp.dtype(out_dtype) in (jnp.bfloat16, jnp.float32),
      f"an output of {out_dtype}",
    ),
    (
      (operand is None) == (epilogue not in ("add", "mul")),
      f"epilogue {epilogue} with operand {operand is not None}",
    ),
    (
      not w.gated or epilogue == "linear",
      f"epilogue {epilogue} after a gated matmul",
    ),
  ):
    if not ok:
      raise NotImplementedError(f"the INT4 matmul does not handle {reason}")


def int4_matmul(
  x: jax.Array,
  w: PackedInt4,
  x_scale: jax.Array | None = None,
  *,
  bias: jax.Array | None = None,
  operand: jax.Array | None = None,
  epilogue: Epilogue = "linear",
  out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
  tuning: Tuning,
) -> jax.Array:
  """Multiplies x by INT4 weights on a Hopper GPU; see the module docstring.

  Args:
    x: [T, C] e4m3, or bf16 for weights packed for bf16.
    w: [N, C] weights of `layouts.pack_int4_weights`.
    x_scale: f32 [T], with e4m3 activations.
    bias: [N], added before the activation.
    operand: [T, N], added (epilogue "add") or multiplied ("mul") at the end.
    epilogue: "silu" applies SiLU. Gated weights always give silu(gate) * up.
    out_dtype: bf16 or f32; epilogues compute in f32.
    tuning: see `tunings.choose`; `stages` is lowered to what memory holds.

  Returns:
    [T, N], or [T, N / 2] of gated weights.

  Raises:
    NotImplementedError: the kernel cannot run this; see `supported`.
  """
  supported(
    x,
    w,
    x_scale,
    bias=bias,
    operand=operand,
    epilogue=epilogue,
    out_dtype=out_dtype,
  )
  t = x.shape[0]
  # A TMA descriptor wants whole tiles of 8 tokens, or fewer than 8 tokens.
  padding = -t % 8 if t > 8 else 0
  if padding:
    pad = lambda a: jnp.pad(a, [(0, padding)] + [(0, 0)] * (a.ndim - 1))
    x = pad(x)
    x_scale = None if x_scale is None else pad(x_scale)
    operand = None if operand is None else pad(operand)
  inputs = dict(
    x=x,
    codes=w.codes,
    scale=w.scale,
    row_scale=w.row_scale,
    x_scale=x_scale,
    bias=bias,
    operand=operand,
  )
  inputs = {name: value for name, value in inputs.items() if value is not None}
  kernel = _Kernel(inputs, w, epilogue, out_dtype, tuning)
  while kernel.shared_bytes() > _SHARED_BYTES and tuning.stages > 1:
    fewer = tuning.stages - tuning.interleave
    tuning = dataclasses.replace(tuning, stages=fewer)
    kernel = _Kernel(inputs, w, epilogue, out_dtype, tuning)
  if operand is not None:
    inputs["operand"] = operand.astype(out_dtype).reshape(kernel.out.shape)
  out = kernel().reshape(x.shape[0], -1)
  return out[:t] if padding else out


class _Kernel:
  """One kernel, by its static shape; `gmem` and `smem` hold its memory."""

  def __init__(self, inputs, w, epilogue, out_dtype, tuning):
    self.inputs, self.w, self.epilogue = inputs, w, epilogue
    self.tuning = tuning
    (t, c), n = inputs["x"].shape, w.shape[0]
    self.halves = 2 if w.gated else 1
    self.n_out = n // self.halves
    self.groups = tuning.blocks * max(1, BLOCK // w.group)  # of a step
    self.steps = pl.cdiv(c, BLOCK * tuning.blocks)  # of a tile
    self.held = tuning.rows // tuning.row_groups  # rows of a consumer
    # TMA leaves out what lies beyond the last dimension, here rows not held.
    self.out = jax.ShapeDtypeStruct(
      (t, pl.cdiv(self.n_out, self.held), self.held), out_dtype
    )
    # Consumers read 64 rows each, of which the last may lie beyond the copied.
    self.copied = tuning.rows // self.halves
    self.code_rows = max(self.copied, _ROWS)
    self.code_copies = 1 if self.copied == self.code_rows else tuning.blocks
    self.grid = pl.cdiv(n, tuning.rows), pl.cdiv(t, tuning.tile_t)
    self.tiles = math.prod(self.grid)
    self.ctas = min(tuning.ctas, self.tiles)
    self.consumers = tuning.row_groups * tuning.interleave
    # The epilogue handles at most so many tokens at a time, in buffers.
    piece, self.buffers = (64, 1) if w.gated else (32, 2)
    self.piece = math.gcd(piece, tuning.tile_t // self.halves)
    self.pieces = tuning.tile_t // (self.piece * self.halves)
    self.vectors = [v for v in ("row_scale", "bias", "x_scale") if v in inputs]

  def __call__(self):
    return plgpu.kernel(
      self.body,
      out_type=self.out,
      grid=(self.ctas,),
      grid_names=("cta",),
      num_threads=self.consumers + 1,
      thread_name="warpgroup",
      scratch_types=self.scratch(),
      compiler_params=plgpu.CompilerParams(
        approx_math=True,
        unsafe_no_auto_barriers=True,
        lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
      ),
      kernel_name="int4_matmul",
    )(*self.inputs.values())

  def scratch(self):
    tuning, inputs = self.tuning, self.inputs
    stages, blocks, tile_t = tuning.stages, tuning.blocks, tuning.tile_t
    row_groups = tuning.row_groups
    scratch = dict(
      codes=_swizzled(
        (stages, self.halves, blocks, self.code_rows, BLOCK // 2), jnp.uint8
      ),
      scale=plgpu.SMEM(
        (stages, self.halves, self.groups, _SCALE_ROWS), inputs["scale"].dtype
      ),
      x=_swizzled((stages, tile_t, blocks * BLOCK), inputs["x"].dtype, BLOCK),
      full=plgpu.Barrier(
        num_arrivals=1 + self.halves * (self.code_copies + 1),
        num_barriers=stages,
      ),
      empty=plgpu.Barrier(num_arrivals=row_groups, num_barriers=stages),
      out=_swizzled(
        (row_groups, self.buffers, self.piece, _ROWS), self.out.dtype
      ),
      vectors_full=plgpu.Barrier(
        num_arrivals=len(self.vectors), num_barriers=row_groups
      ),
    )
    for name in self.vectors:
      dtype = inputs[name].dtype
      unit = _TMA_ALIGNMENT // dtype.itemsize
      size = tile_t if name == "x_scale" else _ROWS
      shape = row_groups, pl.cdiv(size, unit) * unit
      scratch[name] = plgpu.SMEM(shape, dtype)
    if "operand" in inputs:
      scratch["operand_full"] = plgpu.Barrier(
        num_barriers=row_groups * self.buffers
      )
    if tuning.interleave > 1:
      others = tuning.interleave - 1
      scratch["sums"] = _swizzled(
        (others, row_groups, _ROWS, tile_t), jnp.float32, self.piece
      )
      scratch["sums_full"] = plgpu.Barrier(
        num_arrivals=others, num_barriers=row_groups
      )
      scratch["sums_free"] = plgpu.Barrier(num_barriers=row_groups)
    if self.w.gated:
      scratch["swap"] = _swizzled((2, _ROWS, self.piece), jnp.float32)
      scratch["swap_full"] = plgpu.Barrier(num_barriers=2)
      scratch["swap_free"] = plgpu.Barrier(num_barriers=2)
    return scratch

  def shared_bytes(self):
    """Shared memory in use: every array starts at a multiple of 1024."""
    total = 4096  # barriers, and what the compiler reserves for reductions
    for ref in self.scratch().values():
      if not isinstance(ref, plgpu.Barrier):
        size = math.prod(ref.shape) * jnp.dtype(ref.dtype).itemsize
        total += pl.cdiv(size, 1024) * 1024
    return total

  def body(self, *refs, **smem):
    names = [*self.inputs, "out"]
    self.gmem, self.smem = dict(zip(names, refs, strict=True)), smem
    self.cta = lax.axis_index("cta")
    self.my_tiles = pl.cdiv(self.tiles - self.cta, self.ctas)
    warpgroup = lax.axis_index("warpgroup")
    for_consumer, for_producer = _REGISTERS[self.consumers]

    @pl.when(warpgroup == self.consumers)
    def _():
      plgpu.set_max_registers(for_producer, action="decrease")
      self.produce()

    @pl.when(warpgroup < self.consumers)
    def _():
      plgpu.set_max_registers(for_consumer, action="increase")
      self.consume(
        lax.rem(warpgroup, self.tuning.row_groups),
        lax.div(warpgroup, self.tuning.row_groups),
      )

  def for_each_tile(self, body):
    """Calls body(row tile, first token, steps so far) for this CTA's tiles."""

    def tile(i, _):
      row_tile, token_tile = plgpu.planar_snake(
        self.cta + i * self.ctas, self.grid, 1, self.tuning.raster
      )
      body(row_tile, token_tile * self.tuning.tile_t, i * self.steps)

    lax.fori_loop(0, self.my_tiles, tile, None)

  def produce(self):
    gmem, smem, tuning = self.gmem, self.smem, self.tuning
    blocks, stages = tuning.blocks, tuning.stages

    def tile(row_tile, token, before):
      def step(i, _):
        slot = lax.rem(before + i, stages)
        copy = lambda source, to: plgpu.copy_gmem_to_smem(
          source, to, smem["full"].at[slot]
        )

        @pl.when(before + i >= stages)
        def _():
          plgpu.barrier_wait(smem["empty"].at[slot])
          dequant.fence_proxy_async()

        for half in range(self.halves):
          row = row_tile * self.copied + half * self.n_out
          rows = pl.ds(row, self.copied)
          for j in range(self.code_copies):
            count = blocks // self.code_copies
            copy(
              gmem["codes"].at[pl.ds(i * blocks + j, count), rows],
              smem["codes"].at[
                slot, half, pl.ds(j, count), pl.ds(0, self.copied)
              ],
            )
          copy(
            gmem["scale"].at[
              pl.ds(i * self.groups, self.groups), pl.ds(row, _SCALE_ROWS)
            ],
            smem["scale"].at[slot, half],
          )
        columns = pl.ds(i * blocks * BLOCK, blocks * BLOCK)
        copy(
          gmem["x"].at[pl.ds(token, tuning.tile_t), columns], smem["x"].at[slot]
        )

      @plgpu.warp_map
      def _(warp):
        @pl.when(warp == 0)
        def _():
          lax.fori_loop(0, self.steps, step, None)

    self.for_each_tile(tile)
    used = self.my_tiles * self.steps

    @plgpu.warp_map
    def _(warp):
      for slot in range(stages):

        @pl.when((warp == 0) & (used > slot))
        def _(slot=slot):
          plgpu.barrier_wait(smem["empty"].at[slot])

  def consume(self, group, turn):
    """Consumer of row group `group`, in the set that has turn `turn`."""
    smem, interleave = self.smem, self.tuning.interleave

    def tile(row_tile, token, before):
      if self.w.gated:
        row = row_tile * self.held + group * self.n_out
      else:
        row = row_tile * self.tuning.rows + group * self.held

      @pl.when(turn == 0)
      def _():
        self.fetch(group, row, token)

      sums = self.main_loop(group, turn, before)

      if interleave == 1:
        self.finish(sums, group, row_tile, row, token, before)
        return

      @pl.when((turn > 0) & (before > 0))
      def _():
        plgpu.barrier_wait(smem["sums_free"].at[group])

      @pl.when(turn > 0)
      def _():
        smem["sums"].at[turn - 1, group][...] = sums
        plgpu.barrier_arrive(smem["sums_full"].at[group])

      @pl.when(turn == 0)
      def _():
        plgpu.barrier_wait(smem["sums_full"].at[group])
        self.finish(sums, group, row_tile, row, token, before)
        plgpu.barrier_arrive(smem["sums_free"].at[group])

    self.for_each_tile(tile)

    if interleave > 1:

      @pl.when(turn > 0)
      def _():
        plgpu.barrier_wait(smem["sums_free"].at[group])

    @pl.when(turn == 0)
    def _():
      if self.w.gated:
        plgpu.barrier_wait(smem["swap_free"].at[1 - group])
      plgpu.wait_smem_to_gmem(0)

  def main_loop(self, group, turn, before):
    """f32 sums [64, tile_t] over the steps of a tile that have this turn."""
    smem, w, tuning = self.smem, self.w, self.tuning
    blocks, interleave = tuning.blocks, tuning.interleave
    acc_type = plgpu.ACC((_ROWS, tuning.tile_t), jnp.float32)
    first = lax.rem(turn - lax.rem(before, interleave) + interleave, interleave)
    steps = pl.cdiv(self.steps - first, interleave)

    def slot_of(i):
      slot = lax.rem(before + first + i * interleave, tuning.stages)
      plgpu.barrier_wait(smem["full"].at[slot])
      return slot

    half, rows = (group, 0) if w.gated else (0, group * self.held)
    rows = pl.ds(rows, _ROWS)

    def codes(slot, block):
      ref = smem["codes"].at[slot, half, block, rows]
      return _load(ref, plgpu.Layout.WGMMA_8BIT, optimized=True)

    def scales(slot, block):
      count = self.groups // blocks
      return [
        _load(smem["scale"].at[slot, half, block * count + i, rows], _BY_ROW)
        for i in range(count)
      ]

    def x(slot, block):
      return smem["x"].at[slot, :, pl.ds(block * BLOCK, BLOCK)].T

    def scaled(acc):
      def step(i, _):
        slot = slot_of(i)
        for block in range(blocks):
          weights = dequant.scaled_e4m3(
            codes(slot, block), scales(slot, block), w.encoding
          )
          plgpu.wgmma(acc, weights, x(slot, block))
        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(smem["empty"].at[slot])

      lax.fori_loop(0, steps, step, None)
      return acc[...]

    def exact(i, total):
      slot = slot_of(i)
      for block in range(blocks):
        if w.activation == "bf16":
          weights = dequant.exact_bf16(codes(slot, block))
        else:
          weights = dequant.exact_e4m3(codes(slot, block), w.encoding)

        def multiply(acc, weights=weights, block=block):
          plgpu.wgmma(acc, weights, x(slot, block))
          return acc[...]

        part = pl.run_scoped(multiply, acc_type)
        [scale] = scales(slot, block)
        total += part * _rows(scale.astype(jnp.float32), part)
      plgpu.barrier_arrive(smem["empty"].at[slot])
      return total

    if w.scale.dtype == jnp.float8_e4m3fn:
      return pl.run_scoped(scaled, acc_type)
    zeros = jnp.zeros((_ROWS, tuning.tile_t), jnp.float32)
    return lax.fori_loop(0, steps, exact, plgpu.layout_cast(zeros, _WGMMA))

  # The epilogue takes pieces of the tokens through the `out` buffers; an
  # operand is copied into the buffer that the result then overwrites.

  def fetch(self, group, row, token):
    """Starts the copies that the epilogue of a tile needs."""
    gmem, smem = self.gmem, self.smem
    for name in self.vectors:
      start, size = (
        (token, self.tuning.tile_t) if name == "x_scale" else (row, _ROWS)
      )
      plgpu.copy_gmem_to_smem(
        gmem[name].at[pl.ds(start, size)],
        smem[name].at[group, pl.ds(0, size)],
        smem["vectors_full"].at[group],
      )
    if "operand" in gmem:
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)
      for i in range(min(self.buffers, self.pieces)):
        self.fetch_operand(i, group, row, token)

  def fetch_operand(self, i, group, row, token):
    buffer = i % self.buffers
    plgpu.copy_gmem_to_smem(
      self.output_tile("operand", row, token + i * self.piece),
      self.smem["out"].at[group, buffer],
      self.smem["operand_full"].at[group * self.buffers + buffer],
    )

  def output_tile(self, name, row, token):
    return self.gmem[name].at[
      pl.ds(token, self.piece), lax.div(row, self.held), pl.ds(row * 0, _ROWS)
    ]

  def finish(self, sums, group, row_tile, row, token, before):
    """The epilogue of a tile: from f32 sums [64, tile_t] to the output."""
    gmem, smem, piece = self.gmem, self.smem, self.piece
    plgpu.barrier_wait(smem["vectors_full"].at[group])
    by_row = {
      name: _load(smem[name].at[group, pl.ds(0, _ROWS)], _BY_ROW)
      for name in self.vectors
      if name != "x_scale"
    }

    def scaled(i):
      """y of piece i, [64, piece] f32."""
      tokens = pl.ds(i * piece, piece)
      value = lax.slice(sums, (0, i * piece), (_ROWS, (i + 1) * piece))
      for j in range(self.tuning.interleave - 1):
        part = smem["sums"].at[j, group, :, tokens]
        value += _load(part, _WGMMA, optimized=True)
      value *= _rows(by_row["row_scale"], value)
      if "x_scale" in smem:
        x_scale = _load(smem["x_scale"].at[group, tokens], _BY_TOKEN)
        value *= lax.broadcast_in_dim(x_scale, value.shape, [1])
      if "bias" in smem:
        value += _rows(by_row["bias"].astype(jnp.float32), value)
      return value

    for i in range(self.pieces):
      buffer = i % self.buffers
      out_row, out_token = row, token + i * piece
      if self.w.gated:
        first_use = (before == 0) & (i == 0)
        value = self.swap(group, scaled(2 * i), scaled(2 * i + 1), first_use)
        out_row = row_tile * self.held
        out_token = token + (2 * i + group) * piece
      else:
        value = scaled(i)
      if "operand" in gmem:
        if 0 < i < self.pieces - 1:
          plgpu.wait_smem_to_gmem(0, wait_read_only=True)
          self.fetch_operand(i + 1, group, row, token)
        plgpu.barrier_wait(
          smem["operand_full"].at[group * self.buffers + buffer]
        )
        operand = _load(
          smem["out"].at[group, buffer].T, _TRANSPOSED, optimized=True
        )
        operand = plgpu.layout_cast(operand, _WGMMA).astype(jnp.float32)
        value = value * operand if self.epilogue == "mul" else value + operand
      else:
        plgpu.wait_smem_to_gmem(self.buffers - 1, wait_read_only=True)
      if self.epilogue == "silu":
        value = _silu(value)
      smem["out"].at[group, buffer].T[...] = plgpu.layout_cast(
        value.astype(self.out.dtype), _TRANSPOSED
      )
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(
        smem["out"].at[group, buffer],
        self.output_tile("out", out_row, out_token),
      )

  def swap(self, group, even, odd, first_use):
    """silu(gate) * up of the even (consumer 0) or odd (1) tokens."""
    smem = self.smem

    @pl.when(jnp.logical_not(first_use))
    def _():
      plgpu.barrier_wait(smem["swap_free"].at[1 - group])

    is_gate = jnp.broadcast_to(group == 0, even.shape)
    smem["swap"].at[1 - group][...] = jnp.where(is_gate, odd, even)
    plgpu.barrier_arrive(smem["swap_full"].at[1 - group])
    plgpu.barrier_wait(smem["swap_full"].at[group])
    theirs = _load(smem["swap"].at[group], _WGMMA, optimized=True)
    plgpu.barrier_arrive(smem["swap_free"].at[group])
    mine = jnp.where(is_gate, even, odd)
    gate = jnp.where(is_gate, mine, theirs)
    up = jnp.where(is_gate, theirs, mine)
    return _silu(gate) * up


def _silu(x):
  return x / (1 + jnp.exp(-x))


def _rows(vector, like):
  """Broadcasts one value a row."""
  return lax.broadcast_in_dim(vector, like.shape, [0])


def _load(ref, layout, *, optimized=False):
  """`plgpu.load`; jax 0.10 requires an index, which jax 0.11 deprecates."""
  index = ((),) if jax.__version_info__ < (0, 11) else ()
  return plgpu.load(ref, *index, layout=layout, optimized=optimized)


def _swizzled(shape, dtype, columns=None):
  """Shared memory tiled and swizzled for TMA and wgmma, by `columns`."""
  bits = 8 * jnp.dtype(dtype).itemsize
  swizzle = plgpu.find_swizzle((columns or shape[-1]) * bits)
  transforms = (
    plgpu.TilingTransform((8, 8 * swizzle // bits)),
    plgpu.SwizzleTransform(swizzle),
  )
  return plgpu.SMEM(shape, dtype, transforms=transforms)
