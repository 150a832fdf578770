"""Causal attention over float or quantised keys and values."""

import jax
import jax.numpy as jnp

from fireq_jax import kv_cache
from fireq_jax.config import Implementation, check_implementation
from fireq_jax.kv_cache import KeyValues, LayerCache
from fireq_jax.pallas import decode_attention as decode
from fireq_jax.pallas import kv_layout, prefill_bf16, prefill_operands
from fireq_jax.pallas import prefill_attention as prefill
from fireq_jax.pallas.device import require_hopper
from fireq_jax.qtensor import quantize_e4m3


def attention(
  q: jax.Array,
  q_scale: jax.Array | None,
  kv: KeyValues | LayerCache,
  *,
  starts: jax.Array,
  counts: jax.Array,
  out_dtype: jax.typing.DTypeLike,
  implementation: Implementation = "xla",
) -> jax.Array:
  """Attends each query to the keys up to and including its own position.

  Scores, maximum, exponent and sums are f32. The scales of queries and keys
  multiply scores; the scale of values multiplies the probabilities before
  they are rounded: to e4m3, with one scale per row, where queries and values
  are codes; else to the dtype of the products.

  Args:
    q: bf16 or f32 [B, T, N, H], or e4m3 codes.
    q_scale: f32 [B, T, N] of e4m3 codes, else None.
    kv: S keys and values, of which a row may use only the first; or a cache
      that holds them.
    starts: i32 [B], the position of each row's first query.
    counts: i32 [B], how many of the T queries are real; others give zeros.
    out_dtype: dtype of the result.
    implementation: "mosaic_gpu" for the Hopper kernels, "xla" for plain JAX,
      "auto" for a kernel where there is one.

  Returns:
    [B, T, N, H].

  Raises:
    NotImplementedError: the kernel asked for by name cannot run this.
  """
  check_implementation(implementation)
  if implementation != "xla":
    try:
      out = _mosaic_attention(q, q_scale, kv, starts, counts)
      return out.astype(out_dtype)
    except NotImplementedError:
      if implementation == "mosaic_gpu":
        raise
  if isinstance(kv, LayerCache):
    kv = kv_cache.read(kv)
  batch, length, heads, head_dim = q.shape
  kv_heads = kv.k.shape[2]
  # Codes are exact in bf16.
  exact = jnp.float32 if jnp.float32 in (q.dtype, kv.k.dtype) else jnp.bfloat16
  group = (batch, length, kv_heads, heads // kv_heads)
  scores = _einsum(
    "btkgh,bskh->bkgts",
    q.reshape(*group, head_dim).astype(exact),
    kv.k.astype(exact),
  )
  scores *= head_dim**-0.5
  if q_scale is not None:
    scores *= jnp.einsum("btkg->bkgt", q_scale.reshape(group))[..., None]
  if kv.k_scale is not None:
    scores *= _over_tokens(kv.k_scale)

  queries = jnp.arange(length, dtype=jnp.int32)[:, None]
  keys = jnp.arange(kv.k.shape[1], dtype=jnp.int32)
  visible = keys <= starts[:, None, None] + queries
  visible &= queries < counts[:, None, None]
  visible = visible[:, None, None]
  peak = jnp.max(scores, axis=-1, keepdims=True, where=visible, initial=-1e30)
  p = jnp.where(visible, jnp.exp(scores - peak), 0.0)
  total = jnp.sum(p, axis=-1)

  p_scale = None
  if kv.v_scale is not None:
    p *= _over_tokens(kv.v_scale)
    if q_scale is not None:
      p, p_scale = quantize_e4m3(p, exact)
  out = _einsum("bkgts,bskh->bkgth", p.astype(exact), kv.v.astype(exact))
  if p_scale is not None:
    out *= p_scale[..., None]
  out /= jnp.where(total == 0, 1.0, total)[..., None]
  out = jnp.moveaxis(out, 3, 1)
  return out.reshape(batch, length, heads, head_dim).astype(out_dtype)


def _mosaic_attention(q, q_scale, kv, starts, counts):
  require_hopper()
  k_scale, v_scale = kv.k_scale, kv.v_scale
  in_cache = isinstance(kv, LayerCache)
  many = q.shape[1] > decode.MAX_QUERIES
  if kv.k.dtype == jnp.bfloat16 and many:
    k, v = (x if in_cache else jnp.swapaxes(x, 1, 2) for x in (kv.k, kv.v))
    return prefill_bf16.prefill_attention(q, k, v, starts, counts)
  if k_scale is None or v_scale is None or kv.k.dtype == jnp.float8_e4m3fn:
    raise NotImplementedError(f"no kernel for {kv.k.dtype} keys here")
  if in_cache and not many:
    return decode.decode_attention(
      q, q_scale, kv.k, k_scale, kv.v, v_scale, starts, counts
    )
  if q_scale is None:
    raise NotImplementedError("prefill of INT4 keys needs e4m3 queries")
  make = (prefill_operands if in_cache else kv_layout).prefill_operands
  operands = make(kv.k, k_scale, kv.v, v_scale)
  return prefill.prefill_attention(q, q_scale, *operands, starts, counts)


def _over_tokens(scale: jax.Array) -> jax.Array:
  """[B, S, K] -> [B, K, 1, 1, S], to multiply scores or probabilities."""
  return jnp.moveaxis(scale, 1, -1)[:, :, None, None]


def _einsum(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
  return jnp.einsum(
    spec,
    a,
    b,
    precision=jax.lax.Precision.HIGHEST,
    preferred_element_type=jnp.float32,
  )
