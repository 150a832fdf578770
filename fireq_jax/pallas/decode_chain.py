"""The INT4 matmuls of a decode step, chained in one kernel for up to 4 tokens.

Stages run one after another on a residual stream x [T, D] and an activation a:

  stage with a gain:  a = rms_norm(x) * gain @ w.T    (gated: silu(g) * u)
  stage without:      x = x + a @ w.T

so that o_proj, gate_up_proj, down_proj and the next layer's qkv_proj are one
call. Activations are rounded to e4m3 per token, as everywhere.

A decode step is bound by the bytes of weights, and a kernel of its own for
each matmul stops the stream of bytes at every boundary. Here the producer runs
ahead of the stages as far as its ring of shared memory reaches, through the
grid barriers between them:

  producer    | TMA: codes and scales, stage after stage, tile after tile ...
  consumer 0  | norm, e4m3 | k 0, 4, .. | k 0, 4, ..  | finish |  grid barrier
  consumer 1  | norm, e4m3 | k 1, 5, .. | k 1, 5, ..  |        |  and so on
  consumer 2  | norm, e4m3 | k 2, 6, .. | k 2, 6, ..  |        |
  consumer 3  | norm, e4m3 | k 3, 7, .. | k 3, 7, ..  |        |

Tiles. All SMs must pull equally many bytes, so a tile has only 16 rows of w.
wgmma multiplies 64: they are the 16 rows at 4 consecutive blocks of 128 along
C, which the TMA leaves in shared memory in just this order, and there are 4
columns per token, one for each block. Of the product [64, 4 T] only the block
diagonal means something: warp s of a consumer holds 16 rows at block s and
keeps column s of each token. The sums over blocks and consumers are finished
through shared memory, in a fixed order, by the consumers in turn.

Consumers are what all wait for, so they convert codes by e4m3 tables of all
scales, which lie in shared memory.

The activations of a whole row, e4m3, stay in shared memory. Each consumer
quantises just the channels it will multiply; thread t of a quad loads the 16
bytes of codes of chunk t of a block, so channels are stored in that order.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from fireq_jax.pallas import chain_pieces as pieces
from fireq_jax.pallas import chain_rows, grid, mbarrier
from fireq_jax.pallas.dequant import CODES
from fireq_jax.pallas.device import one_by_one
from fireq_jax.pallas.grid import CONSUMERS
from fireq_jax.pallas.inline import fence_async_proxy
from fireq_jax.pallas.layouts import BLOCK, Encoding, PackedInt4

Stage = tuple[PackedInt4, jax.Array | None]

MAX_TOKENS = 4
FASTER = 3  # most tokens for which this is faster than a kernel a matmul
_ROWS = 16  # of a tile
_STEP = 4 * CONSUMERS  # blocks of a slot of the ring: 4 for each consumer
_FINISHERS = 4  # tiles whose sums wait to be finished, a consumer each
_UNDERWAY = 2  # slots that are being copied at most
CTAS = 132  # one a multiprocessor: they must all run at a time
_SHARED_BYTES = 227 * 1024
_REGISTERS = {"consumer": 112, "producer": 32}
_F8 = jnp.float8_e4m3fn


def supported(
  x: jax.Array, a: jax.Array | None, stages: Sequence[Stage]
) -> None:
  """Returns if the kernel can run this.

  Raises:
    NotImplementedError: it cannot, with the reason.
  """
  for ok, reason in (
    (0 < x.shape[0] <= MAX_TOKENS, f"{x.shape[0]} tokens"),
    (x.dtype == jnp.bfloat16, f"x of {x.dtype}"),
    (a is None or a.dtype == jnp.bfloat16, "activations that are not bf16"),
    (
      a is not None or stages[0][1] is not None,
      "a first stage that reads activations where there are none",
    ),
    (
      all(w.activation == "e4m3" for w, _ in stages),
      "weights for bf16 activations",
    ),
    (
      all(w.scale.dtype == _F8 and w.group == BLOCK for w, _ in stages),
      "scales that are not e4m3, one for each 128 channels",
    ),
    (
      all(w.shape[1] % BLOCK == 0 for w, _ in stages),
      f"input sizes that are not multiples of {BLOCK}",
    ),
    (
      all(w.shape[0] % (BLOCK * _halves(w)) == 0 for w, _ in stages),
      f"output sizes that are not multiples of {BLOCK}",
    ),
    (
      all(gain is not None or not w.gated for w, gain in stages),
      "a gated projection without a norm",
    ),
    (_ring_slots(x.shape[0], stages) >= 3, "rows too long for shared memory"),
  ):
    if not ok:
      raise NotImplementedError(f"the decode chain does not handle {reason}")


@functools.partial(jax.jit, static_argnames="eps")
def decode_chain(
  x: jax.Array,
  a: jax.Array | None,
  stages: Sequence[Stage],
  counters: jax.Array,
  *,
  eps: float,
) -> tuple[jax.Array, jax.Array | None]:
  """Runs the stages; see the module docstring.

  Args:
    x: bf16 [T, D], the residual stream, T <= 4.
    a: bf16 [T, C] that a first stage without a gain reads, else None.
    stages: packed weights, each with the gain [D] of the norm before it, or
      None for one that adds to the residual stream.
    counters: i32 [2], zeros; counted up during the call, and zeros after it.
    eps: of the norms.

  Returns:
    x and the last activation, bf16.

  Raises:
    NotImplementedError: the kernel cannot run this; see `supported`.
  """
  supported(x, a, stages)
  call = one_by_one(functools.partial(_call, eps=eps))
  return call(x, a, tuple(stages), counters)


def _call(x, a, stages, counters, *, eps):
  tokens = x.shape[0]
  padded = _padded(tokens)
  slots = _ring_slots(tokens, stages)
  halves = max(_halves(w) for w, _ in stages)
  blocks = max(_steps(w) for w, _ in stages) * _STEP
  # The longer table begins with the shorter.
  encoding = max((w.encoding for w, _ in stages), key=lambda e: len(CODES[e]))
  tables = len(CODES[encoding])
  out_type, inputs = [], [counters, _by_block(x)]
  if a is not None:
    inputs.append(_by_block(a))
  for w, gain in stages:
    n = w.shape[0] // _halves(w)
    out_type.append(jax.ShapeDtypeStruct((tokens, n // BLOCK, BLOCK), x.dtype))
    # TMA is fast on rows of 256 bytes; they lie in the same order.
    codes = w.codes.reshape(w.codes.shape[0], -1, 256)
    inputs += [codes, w.scale, w.row_scale]
    if gain is not None:
      inputs.append(_by_block(gain[None]))

  def kernel(counters_gmem, *refs, **smem):
    cta, wg = lax.axis_index("cta"), lax.axis_index("warpgroup")
    plan = _plan(stages, refs, reads_a=a is not None)

    def tiles(stage):
      """Row tiles of this CTA."""
      return lax.div(stage.tiles - cta + CTAS - 1, CTAS)

    def first_row(tile):
      return (cta + tile * CTAS) * _ROWS

    def copy(stage, done):
      """Fills slots with the tiles of a stage; returns those ever filled."""

      def step(i, _):
        slot = lax.rem(done + i, slots)

        @pl.when(done + i >= slots)
        def _():
          turns = lax.div(done + i, slots)
          mbarrier.wait(smem["empty"], slot, turns - 1)
          fence_async_proxy()

        # Grid barriers wait behind what is on its way from memory.
        @pl.when(done + i >= _UNDERWAY)
        def _():
          before = lax.rem(done + i - _UNDERWAY, slots)
          plgpu.barrier_wait(smem["full"].at[before])

        part, k = lax.div(i, stage.steps), lax.rem(i, stage.steps)
        row = first_row(lax.div(part, stage.halves))
        row += lax.rem(part, stage.halves) * stage.n
        k = pl.ds(k * _STEP, _STEP)
        for source, target in (
          (stage.codes.at[k, pl.ds(lax.div(row, 4), 4)], smem["codes"]),
          (stage.scale.at[k, pl.ds(row, _ROWS)], smem["scale"]),
        ):
          plgpu.copy_gmem_to_smem(
            source, target.at[slot], smem["full"].at[slot]
          )

      count = tiles(stage) * (stage.halves * stage.steps)
      lax.fori_loop(0, count, step, None)
      return done + count

    @pl.when(wg == CONSUMERS)
    def _():
      plgpu.set_max_registers(_REGISTERS["producer"], action="decrease")

      @plgpu.warp_map
      def _(warp):
        @pl.when(warp == 0)
        def _():
          # Others use them once something has been copied.
          mbarrier.init(smem["empty"], CONSUMERS)
          functools.reduce(lambda done, s: copy(s, done), plan, jnp.int32(0))

    def load_slot(slot, encoding):
      mine = pl.ds(wg * 4, 4)
      plgpu.barrier_wait(smem["full"].at[slot])
      loaded = pieces.load_weights(
        smem["codes"].at[slot, mine],
        smem["scale"].at[slot, mine],
        smem["tables"],
        encoding,
      )
      mbarrier.arrive(smem["empty"], slot)
      return loaded

    def multiply(stage, slot, *accs):
      """Products of a tile, one for each half, from `slot` on."""
      parts = [(acc, k) for acc in accs for k in range(stage.steps)]
      loaded = load_slot(slot, stage.encoding)
      # In one body, so that codes are loaded and converted while wgmma runs.
      for i, (acc, k) in enumerate(parts):
        this = loaded
        if i + 1 < len(parts):
          slot = lax.select(slot == slots - 1, 0, slot + 1)
          loaded = load_slot(slot, stage.encoding)
        weights = pieces.weights(this, stage.encoding)
        plgpu.wgmma(acc, weights, smem["a"].at[k * CONSUMERS + wg].T)
        plgpu.wgmma_wait(1)
      plgpu.wgmma_wait(0)
      return [acc[...] for acc in accs]

    def fetch(stage, row):
      halves = range(stage.halves)
      scales = [stage.row_scale.at[pl.ds(i * stage.n, stage.n)] for i in halves]
      return pieces.fetch(scales, stage.residual, row, tokens=tokens)

    def finish(stage, tile, number, fetched):
      buffer = lax.rem(number, _FINISHERS)

      @pl.when(wg == buffer)
      def _():
        turns = lax.div(number, _FINISHERS)
        mbarrier.wait(smem["sums_full"], buffer, turns)
        pieces.finish(
          smem["sums"].at[buffer],
          smem["a_scale"].at[wg],
          fetched,
          stage.out,
          first_row(tile),
          halves=stage.halves,
          tokens=tokens,
          padded=padded,
        )
        mbarrier.arrive(smem["sums_free"], buffer)

    def consume(stage, tiles_done, slots_done):
      """Computes a stage; returns tiles and slots ever used."""
      slots_of_tile = stage.halves * stage.steps

      def tile(i, before):
        number = tiles_done + i
        buffer = lax.rem(number, _FINISHERS)
        fetched = fetch(stage, first_row(i))

        @pl.when(number >= _FINISHERS)
        def _():
          turns = lax.div(number, _FINISHERS)
          mbarrier.wait(smem["sums_free"], buffer, turns - 1)

        slot = lax.rem(slots_done + i * slots_of_tile, slots)
        products = pl.run_scoped(
          functools.partial(multiply, stage, slot),
          *[plgpu.ACC((64, 4 * padded), jnp.float32)] * stage.halves,
        )
        for half, product in enumerate(products):
          target = smem["sums"].at[buffer, half, pl.ds(wg * 4, 4)]
          pieces.store_sums(product, target, padded)
        mbarrier.arrive(smem["sums_full"], buffer)

        # A tile is finished after the next one is computed: by then all
        # consumers are through with it, and what it needs has arrived.
        @pl.when(i > 0)
        def _():
          finish(stage, i - 1, number - 1, before)

        return fetched

      count = tiles(stage)
      nothing = pieces.nothing_fetched(stage.halves, stage.residual)
      fetched = lax.fori_loop(0, count, tile, nothing)

      @pl.when(count > 0)
      def _():
        finish(stage, count - 1, tiles_done + count - 1, fetched)

      return tiles_done + count, slots_done + count * slots_of_tile

    @pl.when(wg < CONSUMERS)
    def _():
      plgpu.set_max_registers(_REGISTERS["consumer"], action="increase")

      @pl.when(wg == 0)
      def _():
        mbarrier.init(smem["sums_full"], CONSUMERS)
        mbarrier.init(smem["sums_free"], 1)

      pieces.fill_tables(smem["tables"], encoding)
      done, passed = (jnp.int32(0), jnp.int32(0)), None
      for i, stage in enumerate(plan):
        if i:
          wait = lambda i=i: grid.grid_barrier(counters_gmem, i * CTAS)
        else:
          wait = lambda: None
        memory = [smem[name] for name in ("a", "a_scale", "squares", "peaks")]
        chain_rows.quantize(
          stage.source, stage.gain, wg, wait, *memory, eps=eps
        )
        if i == len(plan) - 1:
          passed = grid.count_passed(counters_gmem)
        done = consume(stage, *done)
      grid.leave(counters_gmem, passed, CTAS)

  scratch = dict(
    codes=plgpu.SMEM((slots, _STEP, 4, 256), jnp.uint8),
    scale=plgpu.SMEM((slots, _STEP, _ROWS), _F8),
    tables=plgpu.SMEM((128, 2 * tables), jnp.int32),
    a=plgpu.SMEM(
      (blocks // 4, 4 * padded, BLOCK), _F8, transforms=pieces.SWIZZLED
    ),
    a_scale=plgpu.SMEM((CONSUMERS, MAX_TOKENS), jnp.float32),
    squares=plgpu.SMEM((tokens, 4 * CONSUMERS), jnp.float32),
    peaks=plgpu.SMEM((tokens, 4 * CONSUMERS), jnp.float32),
    sums=plgpu.SMEM(
      (_FINISHERS, halves, 4 * CONSUMERS, padded, _ROWS), jnp.float32
    ),
    full=plgpu.Barrier(num_arrivals=2, num_barriers=slots),
    empty=mbarrier.barriers(slots),
    sums_full=mbarrier.barriers(_FINISHERS),
    sums_free=mbarrier.barriers(_FINISHERS),
  )
  outs = plgpu.kernel(
    kernel,
    out_type=out_type,
    grid=(CTAS,),
    grid_names=("cta",),
    num_threads=CONSUMERS + 1,
    thread_name="warpgroup",
    scratch_types=scratch,
    compiler_params=plgpu.CompilerParams(
      approx_math=True,
      unsafe_no_auto_barriers=True,
      reduction_scratch_bytes=0,
      lowering_semantics=plgpu.LoweringSemantics.Lane,
    ),
    kernel_name="decode_chain",
  )(*inputs)
  for (_, gain), out in zip(stages, outs):
    out = out.reshape(tokens, -1)
    x, a = (out, a) if gain is None else (x, out)
  return x, a


class _Stage(NamedTuple):
  """A stage in the kernel: its sizes, and where things lie in global memory.

  Attributes:
    n: rows of the output.
    halves: 2 for a gate and an up projection, else 1.
    steps: slots of the ring a tile takes, of one half.
    encoding: of the codes.
    codes: uint8 [C / 128, N / 4, 256].
    scale: e4m3 [C / 128, N].
    row_scale: f32 [N].
    gain: bf16 [1, C / 128, 128] or None.
    source: bf16 [T, C / 128, 128], what is quantised.
    residual: bf16 [T, n / 128, 128], added to the output, or None.
    out: the same.
  """

  n: int
  halves: int
  steps: int
  encoding: Encoding
  codes: Any
  scale: Any
  row_scale: Any
  gain: Any
  source: Any
  residual: Any
  out: Any

  @property
  def tiles(self) -> int:
    return self.n // _ROWS


def _plan(stages, refs, *, reads_a):
  """The stages as the kernel sees them; each reads what others wrote."""
  refs, outs = iter(refs[: -len(stages)]), refs[-len(stages) :]
  x = next(refs)
  a = next(refs) if reads_a else None
  plan = []
  for (w, gain), out in zip(stages, outs):
    plan.append(
      _Stage(
        n=w.shape[0] // _halves(w),
        halves=_halves(w),
        steps=_steps(w),
        encoding=w.encoding,
        codes=next(refs),
        scale=next(refs),
        row_scale=next(refs),
        gain=None if gain is None else next(refs),
        source=a if gain is None else x,
        residual=x if gain is None else None,
        out=out,
      )
    )
    x, a = (out, a) if gain is None else (x, out)
  return plan


def _halves(w):
  return 2 if w.gated else 1


def _steps(w):
  """Slots that a row of w takes; what lies beyond its end reads as zeros."""
  return -(-w.shape[1] // (_STEP * BLOCK))


def _by_block(x):
  return x.reshape(x.shape[0], -1, BLOCK)


def _padded(tokens):
  """Tokens for which there are columns."""
  return 2 if tokens <= 2 else 4


def _ring_slots(tokens, stages):
  """Slots of the ring for which shared memory remains."""
  padded = _padded(tokens)
  longest = max(_steps(w) for w, _ in stages) * _STEP * BLOCK
  halves = max(_halves(w) for w, _ in stages)
  sums = _FINISHERS * halves * 4 * CONSUMERS * padded * _ROWS * 4
  used = padded * longest + sums + 12 * 1024
  slot = _STEP * _ROWS * (BLOCK // 2 + 1)
  return min(10, (_SHARED_BYTES - used) // slot)
