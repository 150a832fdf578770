"""The kernel of `int4_matmul`, which describes it."""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from fireq_jax.pallas import gated
from fireq_jax.pallas.inline import fence_async_proxy, load
from fireq_jax.pallas.int4_matmul_plan import REGISTERS
from fireq_jax.pallas.int4_matmul_sums import Sums, across_tokens
from fireq_jax.pallas.layouts import BLOCK, ROWS

_WGMMA = plgpu.Layout.WGMMA
_TRANSPOSED = plgpu.Layout.WGMMA_TRANSPOSED
_BY_TOKEN = plgpu.Layout.WGMMA.reduce(0)


class Kernel(Sums):
  """What the threads of a plan do; `gmem` and `smem` hold their memory."""

  def __call__(self):
    return plgpu.kernel(
      self.body,
      out_type=self.out,
      grid=(self.clusters,),
      grid_names=("cta",),
      cluster=(self.cluster,),
      cluster_names=("part",),
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

  def body(self, *refs, **smem):
    names = [*self.inputs, "out"]
    self.gmem, self.smem = dict(zip(names, refs, strict=True)), smem
    self.cta = lax.axis_index("cta")
    warpgroup = lax.axis_index("warpgroup")
    if self.quantised:
      rank = lax.axis_index("part")
      self.cta = self.cta * self.cluster + rank
      self.quantised.start(self.gmem["x"], warpgroup, rank, smem["quantised"])
    self.my_tiles = pl.cdiv(self.tiles - self.cta, self.ctas)
    if self.cut > 1:
      self.my_tiles = self.tiles // self.ctas
      self.my_tiles += (self.cta < self.last * self.cut).astype(jnp.int32)
    self.part, self.first_step, self.my_steps = 0, 0, self.steps
    if self.tuning.split > 1:
      self.part = lax.axis_index("part")
      begin = lambda part: lax.div(part * self.steps, self.tuning.split)
      self.first_step = begin(self.part)
      self.my_steps = begin(self.part + 1) - self.first_step
      self.expect_shares(warpgroup)
    for_consumer, for_producer = REGISTERS[self.consumers]

    @pl.when(warpgroup == self.consumers)
    def _():
      plgpu.set_max_registers(for_producer, action="decrease")
      self.produce()

    @pl.when(warpgroup < self.consumers)
    def _():
      plgpu.set_max_registers(for_consumer, action="increase")
      if self.quantised:
        self.quantised.quantise(
          self.gmem["x"],
          self.gmem.get("norm_weight"),
          warpgroup,
          rank,
          smem["quantised"],
        )
      group = lax.rem(warpgroup, self.tuning.row_groups)
      turn = lax.div(warpgroup, self.tuning.row_groups)
      self.consume(group, turn)

  def for_each_tile(self, body):
    """Calls body(row tile, first token, steps so far, tokens) for each tile.

    Those of a last wave that has been cut have fewer tokens.
    """
    tile_t, cut = self.tuning.tile_t, self.cut

    def tile(index, i, token, width):
      row_tile, token_tile = plgpu.planar_snake(
        index, self.grid, 1, self.tuning.raster
      )
      if self.neighbours > 1:
        row_tile = self.neighbours * row_tile + lax.axis_index("part")
      body(row_tile, token_tile * tile_t + token, i * self.my_steps, width)

    def whole(i, _):
      tile(self.cta + i * self.ctas, i, 0, tile_t)

    if self.tiles == self.ctas:
      whole(0, None)
      return
    if cut == 1:
      lax.fori_loop(0, self.my_tiles, whole, None)
      return
    waves = self.tiles // self.ctas
    lax.fori_loop(0, waves, whole, None)

    @pl.when(self.my_tiles > waves)
    def _():
      index = waves * self.ctas + lax.div(self.cta, cut)
      width = tile_t // cut
      tile(index, waves, lax.rem(self.cta, cut) * width, width)

  def produce(self):
    gmem, smem, tuning = self.gmem, self.smem, self.tuning
    blocks, stages = tuning.blocks, tuning.stages

    def tile(row_tile, token, before, width):
      def step(i, _):
        slot = lax.rem(before + i, stages)
        k = self.first_step + i
        copy = lambda source, to, **options: plgpu.copy_gmem_to_smem(
          source, to, smem["full"].at[slot], **options
        )

        if self.quantised:
          # Weights on their way would be before them.
          wait = lambda: self.quantised.wait_fetched(smem["quantised"])
          pl.when(before + i == 1)(wait)

        @pl.when(before + i >= stages)
        def _():
          plgpu.barrier_wait(smem["empty"].at[slot])
          fence_async_proxy()

        for half in range(self.halves):
          row = row_tile * self.copied + half * self.n_out
          rows = pl.ds(row, self.copied)
          for j in range(self.code_copies):
            count = blocks // self.code_copies
            copy(
              gmem["codes"].at[pl.ds(k * blocks + j, count), rows],
              smem["codes"].at[
                slot,
                half,
                pl.ds(j // self.fold, count),
                pl.ds(j % self.fold * self.copied, self.copied),
              ],
            )
          copy(
            gmem["scale"].at[
              pl.ds(k * self.groups, self.groups), pl.ds(row, self.scale_rows)
            ],
            smem["scale"].at[slot, half],
          )

        if not self.quantised:
          # Rows beyond the last token would be filled with zeros, slowly; but
          # copies are of 8 rows, for each of the neighbours.
          unit = 8 * self.neighbours
          tokens = pl.cdiv(gmem["x"].shape[0], unit) * unit
          tokens = min(width, tokens)
          copy(
            gmem["x"].at[
              pl.ds(token, tokens), pl.ds(k * blocks * BLOCK, blocks * BLOCK)
            ],
            smem["x"].at[slot, pl.ds(0, tokens)],
            **(dict(collective_axes="part") if self.neighbours > 1 else {}),
          )

      @plgpu.warp_map
      def _(warp):
        @pl.when(warp == 0)
        def _():
          lax.fori_loop(0, self.my_steps, step, None)

    self.for_each_tile(tile)
    used = self.my_tiles * self.my_steps

    @plgpu.warp_map
    def _(warp):
      for slot in range(stages):

        @pl.when((warp == 0) & (used > slot))
        def _(slot=slot):
          plgpu.barrier_wait(smem["empty"].at[slot])

  def consume(self, group, turn):
    """Consumer of row group `group`, in the set that has turn `turn`."""
    smem, tuning = self.smem, self.tuning
    interleave = tuning.interleave

    def tile(row_tile, token, before, width):
      row = row_tile * self.copied + group * self.held
      out_token = token + self.part * self.my_tokens

      @pl.when(turn == 0)
      def _():
        self.fetch(group, row, out_token, width // tuning.split)

      sums = self.main_loop(group, turn, before, width)

      if tuning.split > 1:
        mine = self.share(sums, group, turn)

        @pl.when(turn == 0)
        def _():
          total = self.total(mine, group)
          self.finish(total, group, row, out_token)

        return

      if not self.parts:
        self.finish(sums, group, row, out_token)
        return

      first = interleave - self.parts  # of those that store their sums

      @pl.when((turn >= first) & (before > 0))
      def _():
        plgpu.barrier_wait(smem["sums_free"].at[group])

      @pl.when(turn >= first)
      def _():
        part = pl.ds((turn - first) * ROWS, ROWS)
        smem["sums"].at[group, part, pl.ds(0, width)][...] = sums
        plgpu.barrier_arrive(smem["sums_full"].at[group])

      @pl.when(turn == 0)
      def _():
        plgpu.barrier_wait(smem["sums_full"].at[group])
        self.finish(sums, group, row, out_token)
        plgpu.barrier_arrive(smem["sums_free"].at[group])

    self.for_each_tile(tile)

    if self.parts:

      @pl.when(turn >= interleave - self.parts)
      def _():
        plgpu.barrier_wait(smem["sums_free"].at[group])

    @pl.when(turn == 0)
    def _():
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)

  # The epilogue takes pieces of the tokens through the `out` buffers; an
  # operand is copied into the buffer that the result then overwrites.

  def fetch(self, group, row, token, tokens):
    """Starts the copies that the epilogue of a tile needs."""
    gmem, smem = self.gmem, self.smem
    for name, copies in self.vectors.items():
      start, size = (token, tokens) if name == "x_scale" else (row, self.span)
      for i in range(copies):
        plgpu.copy_gmem_to_smem(
          gmem[name].at[pl.ds(start + i * self.n_out, size)],
          smem[name].at[group, i, pl.ds(0, size)],
          smem["vectors_full"].at[group],
        )
    if "operand" in gmem:
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)
      for i in range(min(self.buffers, tokens // self.piece)):
        self.fetch_operand(i, group, row, token)

  def fetch_operand(self, i, group, row, token):
    buffer = i % self.buffers
    plgpu.copy_gmem_to_smem(
      self.output_tile("operand", row, token + i * self.piece),
      self.smem["out"].at[group, buffer],
      self.smem["operand_full"].at[group * self.buffers + buffer],
    )

  def output_tile(self, name, row, token):
    # Rows of which TMA takes those held; a static slice would be refused.
    rows = pl.ds(row * 0, self.span)
    return self.gmem[name].at[
      pl.ds(token, self.piece), lax.div(row, self.held), rows
    ]

  def finish(self, sums, group, row, token):
    """The epilogue of a tile: from f32 sums [64, tokens] to the output."""
    gmem, smem, piece = self.gmem, self.smem, self.piece
    pieces = sums.shape[1] // piece
    plgpu.barrier_wait(smem["vectors_full"].at[group])
    by_row = {
      name: gated.load_by_row(smem[name].at[group, :, pl.ds(0, self.span)])
      for name in self.vectors
      if name != "x_scale"
    }

    def scaled(i):
      """y of piece i, [64, piece] f32."""
      tokens = pl.ds(i * piece, piece)
      value = lax.slice(sums, (0, i * piece), (ROWS, (i + 1) * piece))
      parts = [
        load(
          smem["sums"].at[group, pl.ds(j * ROWS + below, ROWS), tokens],
          _WGMMA,
          optimized=True,
        )
        for j in range(self.parts)
        for below in range(0, ROWS, ROWS // self.fold)
      ]
      value = sum(parts, value if self.fold == 1 else jnp.float32(0))
      value *= across_tokens(by_row["row_scale"], value)
      x_scale = None
      if self.quantised:
        x_scale = load(smem["quantised"]["x_scale"].at[tokens], _BY_TOKEN)
      elif "x_scale" in smem:
        x_scale = load(smem["x_scale"].at[group, 0, tokens], _BY_TOKEN)
      if x_scale is not None:
        value *= lax.broadcast_in_dim(x_scale, value.shape, [1])
      if "bias" in smem:
        value += across_tokens(by_row["bias"].astype(jnp.float32), value)
      return value

    for i in range(pieces):
      buffer = i % self.buffers
      out = smem["out"].at[group, buffer]
      value = scaled(i)
      if "operand" in gmem:
        if 0 < i < pieces - 1:
          plgpu.wait_smem_to_gmem(0, wait_read_only=True)
          self.fetch_operand(i + 1, group, row, token)
        plgpu.barrier_wait(
          smem["operand_full"].at[group * self.buffers + buffer]
        )
        operand = load(out.T, _TRANSPOSED, optimized=True)
        operand = plgpu.layout_cast(operand, _WGMMA).astype(jnp.float32)
        value = value * operand if self.epilogue == "mul" else value + operand
      else:
        # The last piece of the tile before may have used any buffer.
        pending = self.buffers - 1 if i else 0
        plgpu.wait_smem_to_gmem(pending, wait_read_only=True)
      if self.epilogue == "silu":
        value = _silu(value)
      if self.w.gated:
        gate, up = gated.apart(value)
        out[...] = (_silu(gate) * up).astype(out.dtype)
      else:
        out.T[...] = plgpu.layout_cast(value.astype(out.dtype), _TRANSPOSED)
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(
        out, self.output_tile("out", row, token + i * piece)
      )


def _silu(x):
  return x / (1 + jnp.exp(-x))
