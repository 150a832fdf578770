"""Rows of activations in `decode_chain`, rounded by all consumers of a CTA.

Each consumer rounds just the channels it will multiply.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from fireq_jax.pallas import chain_pieces as pieces
from fireq_jax.pallas import grid
from fireq_jax.pallas.inline import divide, load
from fireq_jax.pallas.layouts import BLOCK

_HELD = 14  # values a thread holds of rows, in units of 4
_LAYOUT = plgpu.Layout.TILED(
  plgpu.Tiling(((4, BLOCK), (4,))),
  warp_dims=(-3,),
  lane_dims=(-2,),
  vector_dim=-1,
)
_ALIKE = plgpu.Layout.TILED(  # the same in each thread
  plgpu.Tiling(((4 * grid.CONSUMERS,),)),
  warp_dims=(plgpu.Replicated(4),),
  lane_dims=(plgpu.Replicated(32),),
  vector_dim=-1,
)


def quantize(
  source: Any,
  gain: Any,
  wg: jax.Array,
  wait: Callable[[], None],
  a: Any,
  a_scale: Any,
  squares: Any,
  peaks: Any,
  *,
  eps: float,
) -> None:
  """Writes the codes of a consumer's channels, and the scales of rows.

  Args:
    source: bf16 [T, C / 128, 128] in global memory.
    gain: bf16 [1, C / 128, 128] of the norm that comes first, or None.
    wg: the consumer.
    wait: waits until `source` is there.
    a: e4m3 [.., 4 * padded, 128] in shared memory, the codes of 4 blocks each.
    a_scale: f32 [consumers, T] in shared memory, or longer.
    squares: f32 [T, 16] in shared memory.
    peaks: the same.
    eps: of the norm.
  """
  tokens, blocks, _ = source.shape
  padded = a.shape[1] // 4
  steps = -(-blocks // (4 * grid.CONSUMERS))
  mine = pl.ds(wg * 4, 4)
  parts = [k * grid.CONSUMERS + wg for k in range(steps)]
  gains = None
  if gain is not None:
    gains = [pieces.load_blocks(gain, 0, k * 4, _LAYOUT) for k in parts]
  wait()

  def rows(first):
    """The rows from one on that fit the registers, to be loaded at once."""
    return range(first, min(tokens, first + max(1, _HELD // steps)))

  def loaded(t):
    return [pieces.load_blocks(source, t, k * 4, _LAYOUT) for k in parts]

  def scaled(x):
    if gains is None:
      return x
    return [v * g.astype(jnp.float32) for v, g in zip(x, gains)]

  held = {}
  for first in range(0, tokens, len(rows(0))):
    held = {t: loaded(t) for t in rows(first)}
    for t, x in held.items():
      x = [v.astype(jnp.float32) for v in x]
      if gain is not None:
        squares.at[t, mine][...] = jnp.sum(sum(v * v for v in x), axis=1)
      peak = functools.reduce(jnp.maximum, map(jnp.abs, scaled(x)))
      peaks.at[t, mine][...] = jnp.max(peak, axis=1)
  grid.consumers_barrier()
  for t in range(tokens):
    if t not in held:
      held = {t: loaded(t) for t in rows(t)}
    y = scaled([v.astype(jnp.float32) for v in held[t]])
    scale = jnp.max(load(peaks.at[t], _ALIKE)) * (1 / 448)
    scale = jnp.where(scale < jnp.finfo(jnp.float32).tiny, 1.0, scale)
    for k, value in zip(parts, y):
      codes = divide(value, scale, _LAYOUT).astype(a.dtype)
      pieces.store_activations(codes, a.at[k], t, padded, _LAYOUT)
    if gain is not None:
      mean = jnp.sum(load(squares.at[t], _ALIKE)) / (blocks * BLOCK)
      scale *= lax.rsqrt(mean + eps)
    a_scale[wg, t] = scale
  plgpu.commit_smem()
