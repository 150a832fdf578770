"""The best codes and scales for given weights.

A group's codebook is the 16 values its codes stand for: with e4m3 scales they
are rounded products, unevenly spaced, so the nearest value is not always the
nearest multiple of the scale.
"""

import jax
import jax.numpy as jnp

from fireq_jax.config import check
from fireq_jax.qtensor import code_values, round_bf16


def nearest(
  weight: jax.Array, scale: jax.Array, *, lowest: int = -7
) -> tuple[jax.Array, jax.Array]:
  """Returns int8 codes, and their f32 values, nearest to `weight`; ties to the
  smaller.

  Rounding moves a product by less than half a scale, so the nearest is one of
  the two codes around weight / scale.

  Args:
    weight: f32 [...].
    scale: e4m3, bf16 or f32, broadcastable to `weight`.
    lowest: -7 or -8, the lowest code in use.
  """
  magnitude = jnp.abs(weight)
  top = jnp.where(weight < 0, -lowest, 7).astype(jnp.float32)
  below = jnp.floor(magnitude / scale.astype(jnp.float32))
  below = jnp.minimum(below, top - 1)
  low, high = code_values(below, scale), code_values(below + 1, scale)
  up = magnitude > (low + high) / 2
  code, value = below + up.astype(jnp.float32), jnp.where(up, high, low)
  sign = jnp.sign(weight)
  return (sign * code).astype(jnp.int8), sign * value


def nearest_codes(
  weight: jax.Array, scale: jax.Array, *, lowest: int = -7
) -> jax.Array:
  """The codes of `nearest`."""
  return nearest(weight, scale, lowest=lowest)[0]


def search_scales(
  weight: jax.Array,
  importance: jax.Array | None = None,
  *,
  group: int,
  scale_dtype: jax.typing.DTypeLike,
  lowest: int = -7,
) -> jax.Array:
  """Returns the scale [N, C / group] of each group with the least error.

  The error is sum_c importance[c] * (weight[c] - nearest value)^2 with the
  weights' own rounding and clipping in it. e4m3 scales are searched over the
  28 numbers around amax / 7 (every mantissa, down to about a tenth of it);
  others over 28 equal steps from 0.4 to 1.075 times amax / 7.

  Args:
    weight: f32 [N, C], the tensor scale already applied.
    importance: f32 [C], such as the mean square of each input; or f32
      [G, g, g], the second moment of each group's inputs, which counts the
      square of sum_c (weight[c] - nearest value) * input[c]; None = 1.
    group: input channels that share a scale.
    scale_dtype: e4m3, bf16 or f32.
    lowest: -7 or -8, the lowest code in use.
  """
  check(
    weight.shape[-1] % group == 0,
    "the group size must divide the input channels",
    expected=f"a divisor of {weight.shape[-1]}",
    got=group,
  )
  grouped = weight.reshape(weight.shape[0], -1, group)
  if importance is None:
    importance = jnp.ones(weight.shape[-1], jnp.float32)
  start = jnp.max(jnp.abs(grouped), axis=-1) / 7

  def candidate(i: jax.Array) -> jax.Array:
    if scale_dtype == jnp.float8_e4m3fn:
      # Positive e4m3 numbers are ordered like their bytes; 0x7e is 448.
      byte = jnp.clip(start, 2.0**-9, 448.0).astype(jnp.float8_e4m3fn)
      byte = jax.lax.bitcast_convert_type(byte, jnp.uint8).astype(jnp.int32)
      byte = jnp.clip(byte + 3 - i, 1, 0x7E).astype(jnp.uint8)
      return jax.lax.bitcast_convert_type(byte, jnp.float8_e4m3fn)
    ratio = 1.075 - 0.025 * i.astype(jnp.float32)
    scale = start * ratio
    if scale_dtype == jnp.bfloat16:
      scale = round_bf16(scale)  # a cast there and back may be dropped
    return scale.astype(scale_dtype)

  def error(scale: jax.Array) -> jax.Array:
    _, values = nearest(grouped, scale[..., None], lowest=lowest)
    difference = grouped - values
    if importance.ndim == 1:
      weighted = importance.reshape(-1, group) * difference
    else:
      weighted = jnp.einsum(
        "ngi,gij->ngj", difference, importance, precision="highest"
      )
    return jnp.sum(weighted * difference, axis=-1)

  def step(i, best):
    best_scale, best_error = best
    scale = candidate(i)
    now = error(scale)
    better = now < best_error
    return (
      jnp.where(better, scale, best_scale),
      jnp.where(better, now, best_error),
    )

  first = candidate(jnp.int32(3))
  scale, _ = jax.lax.fori_loop(0, 28, step, (first, error(first)))
  return jnp.where(start == 0, jnp.ones_like(scale), scale)
