"""Rotary position embedding in the Hugging Face (half-split) convention."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from fireq_jax.config import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> np.ndarray:
  """Returns the angle per position of each channel pair, f32 [H / 2]."""
  exponents = np.arange(0, head_dim, 2, dtype=np.float32) / head_dim
  frequencies = np.float32(1) / np.float32(rope.theta) ** exponents
  match rope.type:
    case "default":
      return frequencies
    case "linear":
      return frequencies / np.float32(rope.factor)
    case "llama3":
      turns = (
        rope.original_max_position_embeddings * frequencies / (2 * math.pi)
      )
      keep = (turns - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
      )
      keep = np.clip(keep, 0, 1)
      scaled = keep * frequencies + (1 - keep) * frequencies / rope.factor
      return scaled.astype(np.float32)


def cos_sin(
  positions: jax.Array, rope: RopeConfig, head_dim: int
) -> tuple[jax.Array, jax.Array]:
  """positions i32 [...] -> cosine and sine of the angles, f32 [..., H / 2]."""
  frequencies = jnp.asarray(inverse_frequencies(rope, head_dim))
  angles = positions.astype(jnp.float32)[..., None] * frequencies
  return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
  """Rotates channel i of every head with channel i + H / 2.

  Args:
    x: [B, T, N, H] of any float dtype.
    cos: f32 [B, T, H / 2], as from `cos_sin`.
    sin: f32 [B, T, H / 2].

  Returns:
    f32 [B, T, N, H].
  """
  cos, sin = cos[:, :, None], sin[:, :, None]
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate(
    [first * cos - second * sin, second * cos + first * sin], axis=-1
  )


def scale_keys(
  q: jax.Array,
  k: jax.Array,
  key_scale: jax.Array | None,
  key_shift: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
  """Makes rotated keys easier to round without changing attention.

  Args:
    q: f32 [B, T, N, H], divided by `key_scale`.
    k: f32 [B, T, K, H], multiplied by it; then `key_shift` is subtracted, which
      adds one number to all scores of a query.
    key_scale: f32 [K, H] or None.
    key_shift: f32 [K, H] or None.
  """
  if key_scale is not None:
    k = k * key_scale
    q = q / jnp.repeat(key_scale, q.shape[2] // k.shape[2], axis=0)
  if key_shift is not None:
    k = k - key_shift
  return q, k
