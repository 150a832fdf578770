"""Activations to e4m3 with a scale for each token, after RMSNorm or without.

  y[t, c]     = x[t, c] * weight[c]                (or x[t, c] without a norm)
  scale[t]    = max_c |y[t, c]| / 448
  codes[t, c] = e4m3(y[t, c] / scale[t])

A norm's 1 / rms(x) is the same for all channels, so it only multiplies the
scale at the end, and both reductions are done in one step.

A CTA takes one token, whose values stay in its registers:

  warp 0   | load x, weight | sum x x, max |y| |      | divide, store |
  warp 1   | load x, weight | sum x x, max |y| | sync | divide, store |
  ...                                            through shared memory

A CTA has as few warps as can hold a token: fewer are started and synchronised
sooner, and several CTAs fit on a multiprocessor, so that memory never rests.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from fireq_jax.pallas.inline import divide, load, store, sync_threads, widen

_F8 = jnp.float8_e4m3fn
_LANES = 32
_WARPS = 4  # of a warpgroup
_VECTORS = (8, 4, 2, 1)  # elements a thread may load at once
_MOST_ELEMENTS = 56  # of a thread
_MOST_WARPGROUPS = 8


def supported(x: jax.Array, norm_weight: jax.Array | None = None) -> None:
  """Returns if the kernel can run this.

  Raises:
    NotImplementedError: it cannot, with the reason.
  """
  for ok, reason in (
    (x.ndim == 2 and x.shape[0] > 0, f"x of shape {x.shape}"),
    (_float(x), f"x of {x.dtype}"),
    (
      norm_weight is None or _float(norm_weight),
      f"a norm weight of {norm_weight is not None and norm_weight.dtype}",
    ),
    (
      _warpgroups(x.shape[-1]) > 0,
      f"{x.shape[-1]} channels",
    ),
  ):
    if not ok:
      raise NotImplementedError(f"the quantisation does not handle {reason}")


@functools.partial(jax.jit, static_argnames=("eps", "rows"))
def act_quant(
  x: jax.Array,
  norm_weight: jax.Array | None = None,
  *,
  eps: float = 0.0,
  rows: int | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Rounds each row of norm(x) to e4m3 codes with a scale of its own.

  The codes are those of `qtensor.quantize_e4m3(x * norm_weight)`, as the law
  above says; a NaN or an infinity in a row makes NaNs of its codes.

  Args:
    x: bf16 or f32 [T, C].
    norm_weight: bf16 or f32 [C], gain of an RMSNorm; None for no norm.
    eps: of the norm; static.
    rows: rows of the result, T by default; those beyond T are zeros with scale
      1, which spare a matmul of whole tiles from padding its operand.

  Returns:
    codes e4m3 [rows, C] and scale f32 [rows].

  Raises:
    NotImplementedError: the kernel cannot run this; see `supported`.
  """
  supported(x, norm_weight)
  tokens, channels = x.shape
  rows = rows or tokens
  warpgroups = _warpgroups(channels)
  warps = _WARPS * warpgroups
  shape = warps, channels // warps
  parts = row_parts(shape[1])
  inputs = [x.reshape(tokens, *shape)]
  if norm_weight is not None:
    inputs.append(norm_weight.reshape(shape))

  def kernel(x_gmem, *refs, sums, peaks):
    *weight_gmem, codes_gmem, scale_gmem = refs
    token, warpgroup = lax.axis_index("token"), lax.axis_index("warpgroup")
    mine = pl.ds(warpgroup * _WARPS, _WARPS)

    @pl.when(token < tokens)
    def _():
      y = [load(x_gmem.at[token, mine, part], layout) for part, layout in parts]
      weight = [
        load(ref.at[mine, part], layout)
        for ref in weight_gmem
        for part, layout in parts
      ]
      # Nothing that waits for other threads stands between the loads.
      y = reduce_row(y, weight, parts, sums.at[mine], peaks.at[mine])
      sync_threads(warpgroups)
      codes, scale = round_row(y, parts, sums, peaks, eps if weight else None)
      for (part, _), values in zip(parts, codes):
        store(codes_gmem.at[token, mine, part], values)

      @pl.when(warpgroup == 0)
      def _():
        scale_gmem[token] = scale

    if rows > tokens:

      @pl.when(token >= tokens)
      def _():
        for part, layout in parts:
          zeros = jnp.zeros((_WARPS, part.size), _F8)
          zeros = plgpu.layout_cast(zeros, layout)
          store(codes_gmem.at[token, mine, part], zeros)

        @pl.when(warpgroup == 0)
        def _():
          scale_gmem[token] = jnp.float32(1)

  codes, scale = plgpu.kernel(
    kernel,
    out_type=(
      jax.ShapeDtypeStruct((rows, *shape), _F8),
      jax.ShapeDtypeStruct((rows,), jnp.float32),
    ),
    grid=(rows,),
    grid_names=("token",),
    num_threads=warpgroups,
    thread_name="warpgroup",
    scratch_types=dict(
      sums=plgpu.SMEM((warps,), jnp.float32),
      peaks=plgpu.SMEM((warps,), jnp.float32),
    ),
    compiler_params=plgpu.CompilerParams(
      approx_math=True,
      unsafe_no_auto_barriers=True,
      reduction_scratch_bytes=0,
      lowering_semantics=plgpu.LoweringSemantics.Lane,
    ),
    kernel_name="act_quant",
  )(*inputs)
  return codes.reshape(rows, channels), scale


def reduce_row(
  y: list, weight: list, parts: list, sums: Any, peaks: Any
) -> list:
  """First half of a row's way to codes, in each warp.

  Args:
    y: slices of the row.
    weight: the same of a norm's gain, or none.
    parts: of `row_parts`.
    sums: f32, one for each warp, which it sets to its sum of squares.
    peaks: the same, for the largest magnitude after the gain.

  Returns:
    f32 slices, after the gain.
  """
  widened = lambda x: [widen(v, layout) for (_, layout), v in zip(parts, x)]
  y = widened(y)
  if weight:
    store(sums, sum(jnp.sum(v * v, axis=1) for v in y))
    y = [v * gain for v, gain in zip(y, widened(weight))]
  peak = [jnp.max(jnp.abs(value), axis=1) for value in y]
  store(peaks, functools.reduce(jnp.maximum, peak))
  return y


def round_row(
  y: list, parts: list, sums: Any, peaks: Any, eps: float | None
) -> tuple[list, jax.Array]:
  """Second half, once sums and peaks of all warps of the row are there.

  Args:
    y: of `reduce_row`.
    parts: of `row_parts`.
    sums, peaks: of `reduce_row`, of all warps.
    eps: of the norm, or None.

  Returns:
    e4m3 slices and the scale.
  """
  everywhere = _everywhere(peaks.shape[0])
  scale = jnp.max(load(peaks, everywhere)) * (1 / 448)
  scale = jnp.where(scale < jnp.finfo(jnp.float32).tiny, 1.0, scale)
  codes = [
    divide(value, scale, layout).astype(_F8)
    for (_, layout), value in zip(parts, y)
  ]
  if eps is not None:
    channels = peaks.shape[0] * sum(part.size for part, _ in parts)
    mean = jnp.sum(load(sums, everywhere)) / channels
    scale *= lax.rsqrt(mean + eps)
  return codes, scale


def _float(x):
  return x.dtype in (jnp.bfloat16, jnp.float32)


def _warpgroups(channels):
  """How many share a row of so many channels; 0 if none can."""
  unit = _WARPS * _LANES
  for n in range(1, _MOST_WARPGROUPS + 1):
    if channels % (n * unit) == 0 and channels <= n * unit * _MOST_ELEMENTS:
      return n
  return 0


def row_parts(width: int) -> list:
  """Slices of a warp's share of a row, and how its lanes hold them."""
  start, parts = 0, []
  for vector in _VECTORS:
    unit = vector * _LANES
    size = (width - start) // unit * unit
    if size:
      layout = plgpu.Layout.TILED(
        plgpu.Tiling(((_WARPS, unit), (vector,))),
        warp_dims=(-3,),
        lane_dims=(-2,),
        vector_dim=-1,
      )
      parts.append((pl.ds(start, size), layout))
    start += size
  return parts


def _everywhere(size):
  """Layout of a vector that every thread holds."""
  return plgpu.Layout.TILED(
    plgpu.Tiling(((size,),)),
    warp_dims=(plgpu.Replicated(4),),
    lane_dims=(plgpu.Replicated(_LANES),),
    vector_dim=-1,
  )
