"""What the attention kernels compute, in plain JAX: their definition.

Each function has its kernel's signature, without the tuning.
"""

import math

import jax
import jax.numpy as jnp

from fireq_jax import kv_cache
from fireq_jax.attention import attention
from fireq_jax.kv_cache import KeyValues, LayerCache
from fireq_jax.pallas.kv_layout import KV_ORDER, unpack_values, unpack_words
from fireq_jax.pallas.prefill_fragments import CENTRE
from fireq_jax.qtensor import quantize_e4m3, round_e4m3
from fireq_jax.rope import apply_rope, scale_keys


def rope_append(
  qkv: jax.Array,
  cos: jax.Array,
  sin: jax.Array,
  cache: LayerCache,
  starts: jax.Array,
  counts: jax.Array,
  *,
  key_scale: jax.Array | None = None,
  key_shift: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array | None, LayerCache]:
  """Defines `pallas.rope_append.rope_append`."""
  kv_heads = cache.k.shape[1]
  rows = qkv.reshape(*qkv.shape[:2], -1, 2 * cos.shape[-1])
  heads = rows.shape[2] - 2 * kv_heads
  q, k, v = jnp.split(rows, [heads, heads + kv_heads], axis=2)
  q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
  q, k = scale_keys(q, k, key_scale, key_shift)
  cache = kv_cache.append(cache, k, v, starts, counts)
  if cache.format.query == "e4m3":
    return *quantize_e4m3(q), cache
  return q.astype(qkv.dtype), None, cache


def decode_attention(
  q: jax.Array,
  q_scale: jax.Array | None,
  k_words: jax.Array,
  k_scale: jax.Array,
  v_words: jax.Array,
  v_scale: jax.Array,
  starts: jax.Array,
  counts: jax.Array,
) -> jax.Array:
  """Defines `pallas.decode_attention.decode_attention`."""
  kv = KeyValues(
    k=jnp.swapaxes(unpack_words(k_words), 1, 2),
    v=jnp.swapaxes(unpack_values(v_words), 1, 2)[:, : k_words.shape[2]],
    k_scale=jnp.swapaxes(k_scale.astype(jnp.float32), 1, 2),
    v_scale=jnp.swapaxes(v_scale.astype(jnp.float32), 1, 2),
  )
  if q_scale is not None:  # P stays bf16, as with bf16 queries
    q = q.astype(jnp.float32) * q_scale[..., None]
  return attention(
    q, None, kv, starts=starts, counts=counts, out_dtype=jnp.bfloat16
  )


def prefill_attention(
  q: jax.Array,
  q_scale: jax.Array,
  k: jax.Array,
  v: jax.Array,
  weights: jax.Array,
  scales: jax.Array,
  unit: jax.Array,
  starts: jax.Array,
  counts: jax.Array,
) -> jax.Array:
  """Defines `pallas.prefill_attention.prefill_attention`."""
  batch, length, n, head_dim = q.shape
  tokens = k.shape[2]
  order = jnp.argsort(jnp.asarray(KV_ORDER))
  v = jnp.concatenate([v, weights], axis=2)
  v = jnp.take(v.reshape(*v.shape[:-1], -1, 16), order, axis=-1)
  group = n // k.shape[1]
  of_query = lambda x: jnp.repeat(x.astype(jnp.float32), group, axis=1)
  k, v = of_query(k), of_query(v.reshape(*v.shape[:-2], tokens))
  flat = lambda x: of_query(x.reshape(*x.shape[:2], tokens))
  k_scale, v_exponent = flat(scales[..., :2]), flat(scales[..., 2:])

  scores = jnp.einsum("btnh,bnsh->bnts", q.astype(jnp.float32), k)
  scores *= jnp.swapaxes(q_scale, 1, 2)[..., None] * head_dim**-0.5
  scores *= k_scale[:, :, None]
  token = jnp.arange(tokens, dtype=jnp.int32)
  query = jnp.arange(length, dtype=jnp.int32)
  visible = token <= starts[:, None, None] + query[:, None]
  visible &= (query < counts[:, None])[..., None]
  visible = visible[:, None]

  exponents = scores * math.log2(math.e) + v_exponent[:, :, None]
  peak = jnp.max(
    exponents, axis=-1, keepdims=True, where=visible, initial=-1e30
  )
  exponents -= peak - CENTRE
  p = jnp.where(visible, jnp.exp2(exponents), 0.0)
  out = jnp.einsum("bnts,bnhs->btnh", round_e4m3(p), v)
  values, weights = out[..., :head_dim], out[..., head_dim:]
  total = jnp.sum(weights, axis=-1, keepdims=True)
  factor = jnp.repeat(unit, group, axis=1)[:, None, :, None]
  return (values * factor / jnp.where(total > 0, total, 1.0)).astype(
    jnp.bfloat16
  )
