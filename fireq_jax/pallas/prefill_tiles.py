"""What the kernels of prefill attention share: tiles of kv tokens, a launch.

Two consumers with 64 query rows each take the same tiles in turns, as far as
their last rows see.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

ROWS = 128  # query rows of both consumers


def launch(
  kernel: Callable[..., Any],
  *,
  out: jax.ShapeDtypeStruct,
  grid: dict[str, int],
  stages: int,
  copies: int,
  scratch: dict[str, Any],
  name: str,
) -> Callable[..., jax.Array]:
  """`kernel` with two consumers, a producer and the barriers between them.

  Args:
    kernel: what a warpgroup `wg` does with references to operands, to `out`,
      to `scratch` and to barriers `q_full`, `k_full`, `k_empty`, `v_full`,
      `v_empty`, the last four for each stage, and `turn` of each consumer.
    out: the result.
    grid: names and sizes of its axes.
    stages: tiles of k and of v in flight or in use.
    copies: that fill a stage.
    scratch: shared memory and more barriers.
    name: of the kernel.
  """
  full = plgpu.Barrier(num_arrivals=copies, num_barriers=stages)
  empty = plgpu.Barrier(num_arrivals=2, num_barriers=stages)
  return plgpu.kernel(
    kernel,
    out_type=out,
    grid=tuple(grid.values()),
    grid_names=tuple(grid),
    num_threads=3,
    thread_name="wg",
    scratch_types=dict(
      **scratch,
      q_full=plgpu.Barrier(num_arrivals=2),
      k_full=full,
      k_empty=empty,
      v_full=full,
      v_empty=empty,
      turn=plgpu.Barrier(num_barriers=2),
    ),
    compiler_params=plgpu.CompilerParams(
      approx_math=True,
      unsafe_no_auto_barriers=True,
      reduction_scratch_bytes=0,
      lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
    ),
    kernel_name=name,
  )


def wait_until_empty(issued: Any, stages: int, *empty: Any) -> None:
  """The producer waits for what still holds one of its `issued` tiles."""
  for stage in range(stages):

    @pl.when(issued > stage)
    def _(stage=stage):
      for ring in empty:
        plgpu.barrier_wait(ring.at[stage])


def size_of_tile(tokens: int) -> int:
  """The best for `tokens` kv tokens.

  192 are as many as registers can hold. Where there are few tiles, more are
  masked of the last than is gained.
  """
  return 128 if tokens <= 1024 else 192


def tiles_seen(
  row: Any, rows: int, q_length: Any, kv_length: Any, tile: int
) -> jax.Array:
  """How many tiles the query rows row .. row + rows - 1 see.

  Args:
    row: the first row.
    rows: how many; those from `q_length` on see nothing.
    q_length: query rows that are real.
    kv_length: tokens that the last of them sees.
    tile: tokens of a tile.
  """
  last = lax.min(row + rows, q_length) + kv_length - q_length
  return jnp.where(row < q_length, lax.div(last + tile - 1, tile), 0)


def pass_over(
  first: Any,
  last: Any,
  wg: Any,
  turn: Any,
  rings: Sequence[tuple[Any, Any]],
  stage_of: Callable[[Any], Any],
) -> None:
  """Consumer `wg` lets tiles first .. last - 1 pass that it does not see.

  Args:
    first: a tile.
    last: a tile.
    wg: 0 or 1.
    turn: barriers of the two consumers' turns.
    rings: barriers of full and of empty stages.
    stage_of: the stage of a tile.
  """

  def tile(j, _):
    stage = stage_of(j)
    plgpu.barrier_wait(turn.at[wg])
    plgpu.barrier_arrive(turn.at[1 - wg])
    for full, empty in rings:
      plgpu.barrier_wait(full.at[stage])
      plgpu.barrier_arrive(empty.at[stage])

  lax.fori_loop(first, last, tile, None)
