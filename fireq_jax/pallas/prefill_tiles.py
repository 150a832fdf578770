"""What the kernels of prefill attention share: tiles of kv tokens.

Two consumers with 64 query rows each take the same tiles in turns, as far as
their last rows see.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

ROWS = 128  # query rows of both consumers


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
