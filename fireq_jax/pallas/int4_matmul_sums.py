"""The sums of a tile of `int4_matmul`, of which its epilogue is made."""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from fireq_jax.pallas import dequant, exchange, gated, int4_quarters
from fireq_jax.pallas.inline import load, sync_warpgroup
from fireq_jax.pallas.int4_matmul_plan import FOLDED, MOST_TOKENS, Plan
from fireq_jax.pallas.layouts import BLOCK, ROWS

_WGMMA = plgpu.Layout.WGMMA
_BY_ROW = plgpu.Layout.WGMMA.reduce(1)


class Sums(Plan):
  """Multiplies codes by x, for a tile that CTAs may share.

  Attributes:
    smem: shared memory by name.
    part: of the parts of C that CTAs share, this CTA's.
    my_steps: steps of its part.
  """

  smem: dict[str, Any]
  part: Any
  my_steps: Any

  def main_loop(self, group, turn, before, width):
    """f32 sums [64, width] over the steps of a tile that have this turn."""
    smem, w, tuning = self.smem, self.w, self.tuning
    blocks, interleave = tuning.blocks, tuning.interleave
    acc_types = [plgpu.ACC((ROWS, width), jnp.float32)] * self.fold
    first = lax.rem(turn - lax.rem(before, interleave) + interleave, interleave)
    steps = pl.cdiv(self.my_steps - first, interleave)

    def slot_at(i):
      return lax.rem(before + first + i * interleave, tuning.stages)

    def slot_of(i):
      slot = slot_at(i)
      plgpu.barrier_wait(smem["full"].at[slot])
      return slot

    tokens = pl.ds(0, width)
    rows = pl.ds(group * self.held, self.span)

    def codes(slot, pair):
      if w.gated:
        return gated.load_codes(smem["codes"].at[slot, :, pair, rows])
      ref = smem["codes"].at[slot, 0, pair, rows]
      return load(ref, plgpu.Layout.WGMMA_8BIT, optimized=True)

    def scales(slot, pair):
      if self.fold > 1:
        groups, rows_of_group = pl.ds(2 * pair, 2), pl.ds(0, FOLDED)
        ref = smem["scale"].at[slot, 0, groups, rows_of_group]
        return [dequant.flatten_pair(load(ref, dequant.PAIR))]
      count = self.groups // blocks
      return [
        gated.load_by_row(smem["scale"].at[slot, :, pair * count + i, rows])
        for i in range(count)
      ]

    def operand(slot, step, block, columns):
      """x at a block of a step, [tokens, columns]."""
      if self.quantised:
        block += (first + step * interleave) * blocks
        return smem["quantised"]["x"].at[block, tokens, columns]
      columns = pl.ds(block * BLOCK + columns.start, columns.size)
      return smem["x"].at[slot, tokens, columns]

    def multiply(accs, weights, slot, step, pair, start=0):
      """Of a pair of blocks, each accumulator is right in its block's rows."""
      columns = pl.ds(start, weights.shape[1])
      for i, acc in enumerate(accs):
        x = operand(slot, step, self.fold * pair + i, columns)
        plgpu.wgmma(acc, weights, x.T)

    def result(accs):
      if self.fold == 1:
        return accs[0][...]
      row = plgpu.broadcasted_iota(jnp.int32, (ROWS, width), 0, layout=_WGMMA)
      return jnp.where(row < FOLDED, accs[0][...], accs[1][...])

    def release(i):
      if self.neighbours > 1:
        sync_warpgroup()  # one thread arrives at the barriers of a cluster
      plgpu.barrier_arrive(smem["empty"].at[slot_at(i)])

    def scaled(*accs):
      def finish(i):
        plgpu.wgmma_wait(0)
        release(i)

      def step(i, _):
        slot = slot_of(i)
        for pair in range(blocks // self.fold):
          words = codes(slot, pair)
          picked = dequant.pick(words, scales(slot, pair), w.encoding)
          if self.ahead and pair == 0:
            # In a branch, lest the compiler move the conversion behind it.
            pl.when(i > 0)(lambda: finish(i - 1))
          weights = dequant.join(words, picked, w.encoding)
          multiply(accs, weights, slot, i, pair)
        if not self.ahead:
          finish(i)

      lax.fori_loop(0, steps, step, None)
      if self.ahead:
        pl.when(steps > 0)(lambda: finish(steps - 1))
      return result(accs)

    def quarters():
      place = int4_quarters.place(self.halves)

      def weights(slot):
        groups = pl.ds(0, self.groups)
        return dict(
          place=place,
          codes=smem["codes"].at[slot, :, 0, rows],
          scales=smem["scale"].at[slot, :, groups, rows],
          encoding=w.encoding,
        )

      def begin(i):
        return int4_quarters.begin(**weights(slot_of(i)))

      def multiply(i, sums, begun):
        slot = slot_at(i)
        x = operand(slot, i, 0, pl.ds(0, BLOCK))
        return int4_quarters.multiply(sums, begun, x, **weights(slot))

      def step(i, carry):
        sums = multiply(i, *carry)
        begun = begin(i + 1)
        sums = int4_quarters.wait(sums)
        release(i)
        return sums, begun

      carry = int4_quarters.zeros(ROWS, width), begin(0)
      carry = lax.fori_loop(0, steps - 1, step, carry)
      sums = int4_quarters.wait(multiply(steps - 1, *carry))
      release(steps - 1)
      return int4_quarters.whole(sums)

    def exact(i, total):
      slot = slot_of(i)
      for pair in range(blocks // self.fold):
        if w.activation == "bf16":
          weights = dequant.exact_bf16(codes(slot, pair))
        else:
          weights = dequant.exact_e4m3(codes(slot, pair), w.encoding)

        for start, scale in zip(range(0, BLOCK, w.group), scales(slot, pair)):
          group = weights
          if w.group < BLOCK:
            end = start + w.group
            group = lax.slice(weights, (0, start), (ROWS, end))

          def product(*accs, group=group, pair=pair, start=start):
            multiply(accs, group, slot, i, pair, start)
            return result(accs)

          part = pl.run_scoped(product, *acc_types)
          scale = scale.astype(jnp.float32) / dequant.unit(w.encoding)
          total += part * across_tokens(scale, part)
      release(i)
      return total

    def exact_ahead(acc):
      """Adds a block's product when the codes of the next are in registers."""

      def added(total, scale):
        part = plgpu.wgmma_accumulator_load(acc, wait_n=None)
        return total + part * across_tokens(scale, part)

      def finish(i):
        plgpu.wgmma_wait(0)
        release(i)

      def step(i, carry):
        slot = slot_of(i)
        for block in range(blocks):
          words, [scale] = codes(slot, block), scales(slot, block)
          if block == 0:
            # In a branch, lest the compiler move the loads behind it.
            pl.when(i > 0)(lambda: finish(i - 1))
          plgpu.wgmma_wait(0)  # on every way here, as ptxas must see
          weights = dequant.exact_e4m3(words, w.encoding)
          total = added(*carry)
          acc[...] = zeros((ROWS, width))
          multiply([acc], weights, slot, i, block)
          carry = total, scale.astype(jnp.float32) / dequant.unit(w.encoding)
        return carry

      nothing = zeros((ROWS, width)), zeros((ROWS,), _BY_ROW)
      total, scale = lax.fori_loop(0, steps, step, nothing)
      pl.when(steps > 0)(lambda: finish(steps - 1))
      plgpu.wgmma_wait(0)
      return added(total, scale)

    if tuning.wide and width > MOST_TOKENS:
      return quarters()
    if w.scale.dtype == jnp.float8_e4m3fn:
      return pl.run_scoped(scaled, *acc_types)
    if self.ahead:
      return pl.run_scoped(exact_ahead, *acc_types)
    return lax.fori_loop(0, steps, exact, zeros((ROWS, width)))

  # Two CTAs that share a tile have its sums over halves of C. Each finishes half
  # of the tokens, of which it gets the other's sums.

  def expect_shares(self, warpgroup):
    @pl.when(warpgroup < self.tuning.row_groups)
    def _():
      size = ROWS * self.my_tokens * 4
      exchange.expect(self.smem["shares_full"].at[warpgroup], size)

    exchange.arrive()

  def share(self, sums, group, turn):
    """Sends what the other CTA finishes; returns [64, tile_t / 2] that stay.

    Where two consumers have sums of the same rows, the first adds those that
    stay and the second those that go.
    """
    smem, two = self.smem, self.tuning.interleave == 2
    exchange.join()
    mine, others = self.tokens_of(self.part, sums)
    if two:
      second = jnp.broadcast_to(turn == 1, mine.shape)
      added = jnp.where(second, others, mine)
      exchange.keep(
        jnp.where(second, mine, others), smem["halves"].at[group, 1 - turn]
      )
      plgpu.barrier_arrive(smem["halves_full"].at[2 * group + 1 - turn])
      plgpu.barrier_wait(smem["halves_full"].at[2 * group + turn])
      added += exchange.take(smem["halves"].at[group, turn], added.shape)
      mine = others = added

    @pl.when(turn == (1 if two else 0))
    def _():
      place = smem["shares"].at[group], smem["shares_full"].at[group]
      exchange.put(others, *place, 1 - self.part)

    return mine

  def total(self, mine, group):
    """With what the other CTA sends."""
    exchange.wait(self.smem["shares_full"].at[group])
    return mine + exchange.take(self.smem["shares"].at[group], mine.shape)

  def tokens_of(self, part, sums):
    """Of the two halves of the tokens, that of this part and the other."""
    first, second = (
      lax.slice(sums, (0, start), (ROWS, start + self.my_tokens))
      for start in (0, self.my_tokens)
    )
    is_first = jnp.broadcast_to(part == 0, first.shape)
    return jnp.where(is_first, first, second), jnp.where(
      is_first, second, first
    )


def zeros(shape, layout=_WGMMA):
  return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout)


def across_tokens(vector, like):
  """Broadcasts one value a row."""
  return lax.broadcast_in_dim(vector, like.shape, [0])
