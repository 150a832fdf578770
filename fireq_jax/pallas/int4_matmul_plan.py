"""The plan of `int4_matmul_kernel`: its static shape and the memory it takes."""

import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from fireq_jax.pallas.inline import swizzled
from fireq_jax.pallas.layouts import BLOCK, ROWS
from fireq_jax.pallas.quantised_operand import QuantisedOperand

_SCALE_ROWS = 2 * ROWS  # copied together, for the sake of alignment
_TMA_ALIGNMENT = 128
FOLDED = ROWS // 2
MOST_TOKENS = 192  # of a tile of three consumers, or `int4_quarters` has it
# Of a consumer's and the producer's threads, by consumers. Together they may
# not exceed what a CTA starts with, 504, 512 or 480 a lane: it would hang.
REGISTERS = {1: (232, 40), 2: (240, 24), 3: (160, 32), 4: (112, 32)}


def rows_of(tokens: int) -> int:
  """Rows the kernel runs on: TMA copies 8 at once, or fewer if those are all."""
  return tokens if tokens <= 8 else pl.cdiv(tokens, 8) * 8


class Plan:
  """What a kernel is made of; `__init__` names the parts.

  Args:
    inputs: its arguments by name, in order.
    w: the weight.
    epilogue, out_dtype, eps, tuning: see `int4_matmul`.
  """

  def __init__(self, inputs, w, epilogue, out_dtype, eps, tuning):
    self.inputs, self.w, self.epilogue = inputs, w, epilogue
    self.tuning = tuning
    n, c = w.shape
    t = rows_of(inputs["x"].shape[0])
    self.halves = 2 if w.gated else 1
    self.n_out = n // self.halves
    self.groups = tuning.blocks * max(1, BLOCK // w.group)  # of a step
    self.steps = pl.cdiv(c, BLOCK * tuning.blocks)  # of a tile
    # Rows of a consumer, of each projection, and of those it reads.
    self.held = tuning.rows // tuning.row_groups // self.halves
    self.span = ROWS // self.halves
    # TMA leaves out what lies beyond the last dimension, here rows not held.
    self.out = jax.ShapeDtypeStruct(
      (t, pl.cdiv(self.n_out, self.held), self.held), out_dtype
    )
    # What a consumer reads may lie beyond the copied, or are the rows of another
    # block: `fold` blocks lie below each other.
    folds = tuning.rows == FOLDED and tuning.blocks % 2 == 0
    self.fold = 2 if folds and w.group == BLOCK else 1
    self.copied = tuning.rows // self.halves
    self.code_rows = max(self.copied, self.span)
    self.scale_rows = pl.cdiv(self.copied, _SCALE_ROWS) * _SCALE_ROWS
    self.code_copies = 1 if self.copied == self.code_rows else tuning.blocks
    # Of CTAs, or of pairs of them if x is copied to two at once.
    quantises = w.quantises(inputs.get("x_scale"))
    self.neighbours = 2 if tuning.multicast and not quantises else 1
    rows = tuning.rows * self.neighbours
    self.grid = pl.cdiv(n, rows), pl.cdiv(t, tuning.tile_t)
    self.tiles = math.prod(self.grid)
    self.ctas = min(tuning.ctas // self.neighbours, self.tiles)
    self.consumers = tuning.row_groups * tuning.interleave
    # Sums that reach the epilogue through shared memory: those of others, or
    # all, because folded ones lie in rows of other threads.
    self.parts = tuning.interleave - (0 if self.fold > 1 else 1)
    if tuning.split > 1:
      self.ctas, self.parts = self.tiles, 0
    # A consumer then holds two slots.
    enough = tuning.stages >= 2 * tuning.interleave
    exact = w.encoding == "subnormal" and w.group == BLOCK and self.fold == 1
    scaled = w.scale.dtype == jnp.float8_e4m3fn
    self.ahead = tuning.ahead and enough and (scaled or exact)
    self.cluster, self.clusters = tuning.split * self.neighbours, self.ctas
    self.quantised = None
    if quantises:
      # All CTAs of a cluster must have work.
      self.cluster = tuning.cluster if self.tiles % tuning.cluster == 0 else 1
      self.clusters = self.ctas // self.cluster
      self.ctas = self.clusters * self.cluster
      self.quantised = QuantisedOperand(
        inputs["x"].shape[0],
        c,
        eps if "norm_weight" in inputs else None,
        tile_t=tuning.tile_t,
        consumers=self.consumers,
        cluster=self.cluster,
      )
    self.last = self.tiles % self.ctas
    self.cut = tuning.cut if 0 < self.last * tuning.cut <= self.ctas else 1
    # Tokens of a tile, that has not been cut, that this CTA finishes.
    self.my_tokens = tuning.tile_t // tuning.split
    # The epilogue handles at most so many tokens at a time, in buffers.
    self.piece, self.buffers = math.gcd(32, self.my_tokens // self.cut), 2
    # What it needs of each row or token, and in how many copies.
    self.vectors = {
      name: 1 if name == "x_scale" else self.halves
      for name in ("row_scale", "bias", "x_scale")
      if name in inputs
    }

  def scratch(self):
    tuning, inputs = self.tuning, self.inputs
    stages, blocks, tile_t = tuning.stages, tuning.blocks, tuning.tile_t
    row_groups = tuning.row_groups
    scratch = dict(
      codes=swizzled(
        (stages, self.halves, blocks // self.fold, self.code_rows, BLOCK // 2),
        jnp.uint8,
      ),
      scale=plgpu.SMEM(
        (stages, self.halves, self.groups, self.scale_rows),
        inputs["scale"].dtype,
      ),
      # wgmma multiplies whole rows of a swizzle, here one group at least.
      x=swizzled(
        (stages, tile_t, blocks * BLOCK),
        inputs["x"].dtype,
        BLOCK if self.w.scale.dtype == jnp.float8_e4m3fn else self.w.group,
      ),
      full=plgpu.Barrier(
        num_arrivals=self.halves * (self.code_copies + 1)
        + (self.quantised is None),
        num_barriers=stages,
      ),
      empty=self.slots_empty(),
      out=swizzled(
        (row_groups, self.buffers, self.piece, self.span),
        self.out.dtype,
        # Tiles of a copy hold all rows held, or divide them.
        self.span
        if self.out.dtype.itemsize == 2
        else math.gcd(self.held, self.span),
      ),
      vectors_full=plgpu.Barrier(
        num_arrivals=sum(self.vectors.values()), num_barriers=row_groups
      ),
    )
    if self.quantised:
      del scratch["x"]
      scratch["quantised"] = self.quantised.scratch()
    for name, copies in self.vectors.items():
      dtype = inputs[name].dtype
      unit = _TMA_ALIGNMENT // dtype.itemsize
      size = self.my_tokens if name == "x_scale" else self.span
      shape = row_groups, copies, pl.cdiv(size, unit) * unit
      scratch[name] = plgpu.SMEM(shape, dtype)
    if "operand" in inputs:
      scratch["operand_full"] = plgpu.Barrier(
        num_barriers=row_groups * self.buffers
      )
    if self.parts:
      # What is added to the last rows of the last part is never stored.
      rows = self.parts * ROWS + (FOLDED if self.fold > 1 else 0)
      scratch["sums"] = swizzled(
        (row_groups, rows, tile_t), jnp.float32, self.piece
      )
      scratch["sums_full"] = plgpu.Barrier(
        num_arrivals=self.parts, num_barriers=row_groups
      )
      scratch["sums_free"] = plgpu.Barrier(num_barriers=row_groups)
    if tuning.split > 1:
      sums = ROWS * self.my_tokens
      scratch["shares"] = plgpu.SMEM((row_groups, sums), jnp.float32)
      scratch["shares_full"] = plgpu.SMEM((row_groups, 2), jnp.int32)
      if tuning.interleave > 1:
        scratch["halves"] = plgpu.SMEM((row_groups, 2, sums), jnp.float32)
        scratch["halves_full"] = plgpu.Barrier(num_barriers=2 * row_groups)
    return scratch

  def slots_empty(self):
    arrivals = dict(
      num_arrivals=self.tuning.row_groups, num_barriers=self.tuning.stages
    )
    if self.neighbours == 1:
      return plgpu.Barrier(**arrivals)
    return plgpu.ClusterBarrier(collective_axes=("part",), **arrivals)

  def shared_bytes(self):
    """Shared memory in use: every array starts at a multiple of 1024."""
    total = 4096  # barriers, and what the compiler reserves for reductions
    for ref in jax.tree.leaves(self.scratch()):
      if not isinstance(ref, plgpu.Barrier | plgpu.ClusterBarrier):
        size = math.prod(ref.shape) * jnp.dtype(ref.dtype).itemsize
        total += pl.cdiv(size, 1024) * 1024
    return total
