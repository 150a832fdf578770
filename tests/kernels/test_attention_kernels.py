"""Attention kernels on a GPU: error at most twice that of plain JAX.

Each row of a batch is a case of its own: another length, another number of
queries. References are NumPy in f64, and plain JAX in the same precision as the
kernels: the definition of decode, and for prefill `attention`, which rounds
probabilities to e4m3 with the best scale of each row.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fireq_jax.attention import attention
from fireq_jax.kv_cache import KeyValues
from fireq_jax.pallas import (
  decode_attention,
  kv_layout,
  prefill_attention,
  prefill_bf16,
  reference_attention,
)
from fireq_jax.qtensor import quantize_e4m3

pytestmark = pytest.mark.gpu
SLACK = 2e-3  # of the output's rounding to bf16


def exact(q, k, k_scale, v, v_scale, starts):
  """f64 attention of q [B, T, N, H] to codes [B, S, K, H]."""
  f64 = lambda x: np.asarray(x).astype(np.float64)
  q = f64(q)
  group = q.shape[2] // k.shape[2]
  k, v = (
    np.repeat(f64(codes) * f64(scale)[..., None], group, axis=2)
    for codes, scale in ((k, k_scale), (v, v_scale))
  )
  scores = np.einsum("btnh,bsnh->bnts", q, k) * q.shape[-1] ** -0.5
  last = np.asarray(starts)[:, None] + np.arange(q.shape[1])
  visible = np.arange(k.shape[1]) <= last[:, None, :, None]
  scores = np.where(visible, scores, -np.inf)
  p = np.exp(scores - scores.max(-1, keepdims=True))
  p /= p.sum(-1, keepdims=True)
  return np.einsum("bnts,bsnh->btnh", p, v)


def codes_and_scales(
  seed, batch, tokens, kv_heads, head_dim, dtype=jnp.bfloat16
):
  keys = jax.random.split(jax.random.key(seed), 4)
  shape = (batch, tokens, kv_heads)
  codes = [
    jax.random.randint(key, (*shape, head_dim), -8, 8).astype(jnp.int8)
    for key in keys[:2]
  ]
  scales = [
    jnp.exp(jax.random.normal(key, shape) * 0.5 - 2).astype(dtype)
    for key in keys[2:]
  ]
  return codes[0], scales[0], codes[1], scales[1]


def errors(got, plain, want):
  norm = np.linalg.norm(want.reshape(want.shape[0], -1), axis=1)
  return [
    np.linalg.norm(
      (np.asarray(x, np.float64) - want).reshape(len(norm), -1), axis=1
    )
    / np.maximum(norm, 1e-30)
    for x in (got, plain)
  ]


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (8, 2), (32, 2)], ids=str)
@pytest.mark.parametrize("queries", [1, 3, 8])
@pytest.mark.parametrize("query", ["e4m3", "bf16"])
@pytest.mark.parametrize("scale", [jnp.bfloat16, jnp.float8_e4m3fn])
def test_decode(head_dim, heads, queries, query, scale):
  capacity, kv_heads = 1040, heads[1]
  starts = np.array([0, 1, 2, 30, 31, 127, 128, 129, 500, 1040 - queries])
  k, k_scale, v, v_scale = codes_and_scales(
    queries, len(starts), capacity, kv_heads, head_dim, scale
  )
  counts = np.full(len(starts), queries)
  counts[[1, 3]] = 0, queries - 1
  shape = (len(starts), queries, heads[0], head_dim)
  q, q_scale = jax.random.normal(jax.random.key(9), shape, jnp.bfloat16), None
  value = q
  if query == "e4m3":
    q, q_scale = quantize_e4m3(q)
    value = np.asarray(q, np.float64) * np.asarray(q_scale)[..., None]
  by_head = lambda x: jnp.swapaxes(x, 1, 2)
  padded = jnp.pad(by_head(v), ((0, 0), (0, 0), (0, -capacity % 32), (0, 0)))
  operands = (
    q,
    q_scale,
    kv_layout.pack_words(by_head(k)),
    by_head(k_scale),
    kv_layout.pack_values(padded),
    by_head(v_scale),
    jnp.asarray(starts, jnp.int32),
    jnp.asarray(counts, jnp.int32),
  )
  want = exact(value, k, k_scale, v, v_scale, starts)
  padding = np.arange(queries) >= counts[:, None]
  want[padding] = 0
  plain = reference_attention.decode_attention(*operands)
  for tuning in (
    decode_attention.Tuning(),
    decode_attention.Tuning(splits=1, team=3),
    decode_attention.Tuning(splits=9),  # items of one block
    decode_attention.Tuning(splits=3, team=1),
    decode_attention.Tuning(splits=1, team=2, consumers=2),
  ):
    got = decode_attention.decode_attention(*operands, tuning=tuning)
    ours, theirs = errors(got, plain, want)
    assert (ours <= 2 * theirs + SLACK).all(), (ours, theirs)
    assert not np.asarray(got, np.float32)[padding].any()


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (4, 1)], ids=str)
@pytest.mark.parametrize("length", [1, 65, 129, 300])
def test_prefill(head_dim, heads, length):
  tokens = 512 if length < 129 else 1280  # for both sizes of tiles
  starts = np.array([0, 0, 0, 1, 63, 64, 127, 128, 200, tokens - length])
  counts = np.array([length, 1, 0, length, *[length] * 5, max(length // 2, 1)])
  k, k_scale, v, v_scale = codes_and_scales(
    length, len(starts), tokens, heads[1], head_dim
  )
  shape = (len(starts), length, heads[0], head_dim)
  q, q_scale = quantize_e4m3(jax.random.normal(jax.random.key(9), shape))
  value = np.asarray(q, np.float64) * np.asarray(q_scale)[..., None]
  positions = [jnp.asarray(x, jnp.int32) for x in (starts, counts)]
  want = exact(value, k, k_scale, v, v_scale, starts)
  want[np.arange(length) >= counts[:, None]] = 0
  got, plain = prefill_and_plain(q, q_scale, k, k_scale, v, v_scale, *positions)
  ours, theirs = errors(got, plain, want)
  assert (ours <= 2 * theirs + SLACK).all(), (ours, theirs)
  padding = np.arange(length) >= counts[:, None]
  assert not np.asarray(got, np.float32)[padding].any()


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("heads", [(4, 4), (8, 2)], ids=str)
@pytest.mark.parametrize("length", [1, 129, 300])
def test_prefill_bf16(head_dim, heads, length):
  tokens = 517 if length < 129 else 1285
  starts = np.array([0, 0, 0, 1, 63, 64, 127, 128, 200, tokens - length])
  counts = np.array([length, 1, 0, length, *[length] * 5, max(length // 2, 1)])
  keys = jax.random.split(jax.random.key(length), 3)
  shape = (len(starts), length, heads[0], head_dim)
  q = jax.random.normal(keys[0], shape, jnp.bfloat16)
  k, v = (
    jax.random.normal(key, (len(starts), tokens, heads[1], head_dim)).astype(
      jnp.bfloat16
    )
    for key in keys[1:]
  )
  positions = [jnp.asarray(x, jnp.int32) for x in (starts, counts)]
  ones = np.ones(k.shape[:3])
  want = exact(q, k, ones, v, ones, starts)
  padding = np.arange(length) >= counts[:, None]
  want[padding] = 0
  by_head = lambda x: jnp.swapaxes(x, 1, 2)
  got = prefill_bf16.prefill_attention(q, by_head(k), by_head(v), *positions)
  plain = attention(
    q,
    None,
    KeyValues(k=k, v=v),
    starts=positions[0],
    counts=positions[1],
    out_dtype=jnp.bfloat16,
  )
  ours, theirs = errors(got, plain, want)
  assert (ours <= 2 * theirs + SLACK).all(), (ours, theirs)
  assert not np.asarray(got, np.float32)[padding].any()


def prefill_and_plain(q, q_scale, k, k_scale, v, v_scale, starts, counts):
  operands = kv_layout.prefill_operands(k, k_scale, v, v_scale)
  got = prefill_attention.prefill_attention(
    q, q_scale, *operands, starts, counts
  )
  k_scale, v_scale = (x.astype(jnp.float32) for x in (k_scale, v_scale))
  plain = attention(
    q,
    q_scale,
    KeyValues(k=k, v=v, k_scale=k_scale, v_scale=v_scale),
    starts=starts,
    counts=counts,
    out_dtype=jnp.bfloat16,
  )
  return got, plain


def test_long_prefill():
  """Many small probabilities, and values that do not cancel in their sum."""
  tokens, length = 16384, 64
  k, k_scale, v, v_scale = codes_and_scales(length, 1, tokens, 1, 128)
  k_scale = (k_scale * 0.1).astype(jnp.bfloat16)
  v = jnp.clip(v + 2, -7, 7).astype(jnp.int8)
  q, q_scale = quantize_e4m3(
    jax.random.normal(jax.random.key(9), (1, length, 4, 128))
  )
  value = np.asarray(q, np.float64) * np.asarray(q_scale)[..., None]
  starts = jnp.array([tokens - length], jnp.int32)
  counts = jnp.array([length], jnp.int32)
  want = exact(value, k, k_scale, v, v_scale, starts)
  ours, theirs = errors(
    *prefill_and_plain(q, q_scale, k, k_scale, v, v_scale, starts, counts), want
  )
  assert (ours <= 2 * theirs + SLACK).all(), (ours, theirs)


def test_prefill_in_chunks_equals_prefill_at_once():
  head_dim, tokens = 128, 384
  k, k_scale, v, v_scale = codes_and_scales(3, 1, tokens, 2, head_dim)
  held = kv_layout.prefill_operands(k, k_scale, v, v_scale)
  shape = (1, tokens, 8, head_dim)
  q, q_scale = quantize_e4m3(jax.random.normal(jax.random.key(9), shape))
  attend = lambda first, last: prefill_attention.prefill_attention(
    q[:, first:last],
    q_scale[:, first:last],
    *held,
    jnp.array([first], jnp.int32),
    jnp.array([last - first], jnp.int32),
  )
  at_once = attend(0, tokens)
  chunks = [attend(0, 100), attend(100, 228), attend(228, tokens)]
  # Tiles and the unit of v differ, so P rounds otherwise.
  np.testing.assert_allclose(
    np.concatenate(chunks, axis=1).astype(np.float32),
    np.asarray(at_once, np.float32),
    atol=0.05 * float(jnp.abs(at_once).max()),
  )
