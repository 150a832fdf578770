"""Scales of keys against queries: what the INT4 cache of keys can hold best.

A key is rounded in steps of its largest channel, so channels should be of
equal size; but what a channel's error costs grows with its query.
"""

import jax
import jax.numpy as jnp
import numpy as np

from fireq_jax.calibrate import LayerStats
from fireq_jax.config import LlamaConfig
from fireq_jax.recipe import KeyScaling
from fireq_jax.rope import apply_rope, cos_sin

_SAMPLES = 4096
_CONTEXT = 8192
_STEPS = 100
_PEAK = 8.0


def published_scales(
  stats: LayerStats, keys: KeyScaling
) -> tuple[jax.Array, jax.Array | None]:
  """Returns `Factors.key` and `Factors.key_scale` (paper section 3).

  Before RoPE every pair of channels gets radius alpha. After RoPE the top_k
  largest channels of each kv head, and their partners, get magnitude beta;
  where both are on, those pairs keep their radius before RoPE.
  """
  radius, peak = stats.pair_radius, stats.key_max
  kv_heads, head_dim = peak.shape
  half = head_dim // 2
  outlier = jnp.zeros((kv_heads, half), bool)
  key_scale = None
  if keys.top_k:
    _, top = jax.lax.top_k(peak, keys.top_k)
    outlier = outlier.at[jnp.arange(kv_heads)[:, None], top % half].set(True)
    treated = jnp.tile(outlier, 2) & (peak > 0)
    key_scale = jnp.where(treated, keys.beta / jnp.where(treated, peak, 1), 1.0)
  key = jnp.ones((kv_heads, half), jnp.float32)
  if keys.alpha:
    treated = ~outlier & (radius > 0)
    key = jnp.where(treated, keys.alpha / jnp.where(treated, radius, 1), 1.0)
  return jnp.tile(key, 2), key_scale


def fit_scales(
  before_rope: jax.Array, query_power: jax.Array, config: LlamaConfig
) -> tuple[jax.Array, jax.Array]:
  """Returns `Factors.key_scale` and `Factors.key_shift`, both f32 [K, H].

  Rounding a key k - m, scaled by s, costs its scores an error proportional to
  mean over keys of max_c (s_c |k_c - m_c|)^2, times sum_c power_c / s_c^2. At
  the minimum every channel has the same share in both; the iteration moves s
  towards that, with a soft maximum. m is the mean key.

  Keys are put at positions spread over the context first (8192 tokens, or the
  model's limit), so that the result does not depend on where they were seen.

  Args:
    before_rope: keys of any float dtype [tokens, K, H].
    query_power: f32 [K, H], the mean square of the queries a channel meets,
      summed over the query heads; the same in both channels of a pair.
    config: the model.
  """
  step = -(-before_rope.shape[0] // _SAMPLES)
  samples = before_rope[::step].astype(jnp.float32)
  context = min(_CONTEXT, config.max_position_embeddings)
  # Multiples of the golden ratio fill an interval evenly.
  spread = np.arange(len(samples)) * ((5**0.5 - 1) / 2) % 1
  positions = jnp.asarray((spread * context).astype(np.int32))
  cos, sin = cos_sin(positions[None], config.rope, config.head_dim)
  keys = apply_rope(samples[None], cos, sin)[0]
  mean = keys.mean(axis=0)
  size = jnp.abs(keys - mean)
  live = size.max(axis=0) > 0

  def share(x: jax.Array) -> jax.Array:
    return x / jnp.maximum(x.sum(axis=-1, keepdims=True), 1e-30) + 1e-4

  def improve(_, scale):
    scaled = size * scale
    peak = jnp.maximum(scaled.max(axis=-1, keepdims=True), 1e-30)
    weight = share((scaled / peak) ** 8)
    cause = share((scaled**2 * weight).mean(axis=0))
    cost = share(query_power / scale**2)
    scale = scale * (cost / cause) ** 0.1
    return scale / scale.max(axis=-1, keepdims=True)

  start = 1 / jnp.where(live, size.max(axis=0), 1.0)
  scale = jax.lax.fori_loop(0, _STEPS, improve, start)
  peak = (size * scale).max(axis=-1).mean(axis=0)[:, None]
  scale = scale * _PEAK / jnp.maximum(peak, 1e-30)
  scale = jnp.where(live & (peak > 0), scale, 1.0)
  return scale, mean * scale


def query_power(
  q_kernel: jax.Array, moment: jax.Array, config: LlamaConfig
) -> jax.Array:
  """Mean square of queries, as `fit_scales` wants it.

  Args:
    q_kernel: [D, N * H].
    moment: f32 [D, D], the sum or mean of x x^T over attention inputs.
    config: the model.
  """
  kernel = q_kernel.astype(jnp.float32)
  spread = jnp.matmul(moment, kernel, precision="highest")
  power = (spread * kernel).sum(axis=0)
  power = power.reshape(config.num_key_value_heads, -1, config.head_dim)
  first, second = jnp.split(power.sum(axis=1), 2, axis=-1)
  return jnp.tile(first + second, 2)
