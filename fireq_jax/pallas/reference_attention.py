"""What the attention kernels compute, in plain JAX: their definition.

Each function has its kernel's signature, without the tuning.
"""

import jax
import jax.numpy as jnp

from fireq_jax.attention import attention
from fireq_jax.kv_cache import KeyValues
from fireq_jax.pallas.kv_layout import unpack_values, unpack_words
from fireq_jax.pallas.prefill_attention import KV_ORDER


def decode_attention(
  q: jax.Array,
  q_scale: jax.Array | None,
  k_words: jax.Array,
  k_scale: jax.Array,
  v_words: jax.Array,
  v_scale: jax.Array,
  starts: jax.Array,
) -> jax.Array:
  """Defines `pallas.decode_attention.decode_attention`."""
  kv = KeyValues(
    k=jnp.swapaxes(unpack_words(k_words), 1, 2),
    v=jnp.swapaxes(unpack_values(v_words), 1, 2)[:, : k_words.shape[2]],
    k_scale=jnp.swapaxes(k_scale.astype(jnp.float32), 1, 2),
    v_scale=jnp.swapaxes(v_scale.astype(jnp.float32), 1, 2),
  )
  counts = jnp.full(q.shape[0], q.shape[1], jnp.int32)
  if q_scale is not None:  # P stays bf16, as with bf16 queries
    q = q.astype(jnp.float32) * q_scale[..., None]
  return attention(
    q, None, kv, starts=starts, counts=counts, out_dtype=jnp.bfloat16
  )


def prefill_attention(
  q: jax.Array,
  q_scale: jax.Array,
  k: jax.Array,
  k_scale: jax.Array,
  v: jax.Array,
  v_scale: jax.Array,
  starts: jax.Array,
  counts: jax.Array,
) -> jax.Array:
  """Defines `pallas.prefill_attention.prefill_attention`."""
  order = jnp.argsort(jnp.asarray(KV_ORDER))
  blocks = v.reshape(*v.shape[:-1], -1, 16)
  v = jnp.take(blocks, order, axis=-1).reshape(v.shape)
  kv = KeyValues(
    k=jnp.swapaxes(k, 1, 2),
    v=jnp.moveaxis(v, 3, 1),
    k_scale=jnp.swapaxes(k_scale, 1, 2),
    v_scale=jnp.swapaxes(v_scale, 1, 2),
  )
  return attention(
    q, q_scale, kv, starts=starts, counts=counts, out_dtype=jnp.bfloat16
  )
