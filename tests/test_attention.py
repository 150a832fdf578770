"""Attention against NumPy in float64, row by row."""

import jax
import jax.numpy as jnp
import numpy as np
import numpy_llama
import pytest

from fireq_jax import kv_cache, qtensor
from fireq_jax.attention import attention
from fireq_jax.config import KVFormat
from fireq_jax.kv_cache import KeyValues

attend = jax.jit(attention, static_argnames="out_dtype")
encode = jax.jit(kv_cache.encode, static_argnames="kv")
quantize_e4m3 = jax.jit(qtensor.quantize_e4m3)


def inputs(batch, length, cached, heads, kv_heads, head_dim):
  rng = np.random.default_rng(length + cached)
  draw = lambda t, n: jnp.asarray(
    2 * rng.normal(size=(batch, t, n, head_dim)), jnp.float32
  )
  return draw(length, heads), draw(cached, kv_heads), draw(cached, kv_heads)


def numpy_attention(q, k, v, starts, counts):
  out = np.zeros(q.shape)
  for b, (start, count) in enumerate(zip(starts, counts, strict=True)):
    out[b, :count] = numpy_llama.attend(
      *(np.asarray(x[b], np.float64) for x in (q[:, :count], k, v)), start
    )
  return out


SHAPES = [
  # length, cached, heads, kv_heads, head_dim
  (1, 1, 2, 2, 16),
  (1, 33, 4, 1, 64),
  (7, 7, 4, 2, 32),
  (5, 40, 6, 2, 128),
  (17, 19, 3, 3, 16),
]


@pytest.mark.parametrize("shape", SHAPES)
def test_float_ragged_and_right_aligned(shape):
  length, cached, *_ = shape
  q, k, v = inputs(3, *shape)
  counts = np.array([length, max(length - 2, 1), 0])
  starts = np.array([cached - length, (cached - length) // 2, 0])
  got = attend(
    q,
    None,
    KeyValues(k=k, v=v),
    starts=starts,
    counts=counts,
    out_dtype=jnp.float32,
  )
  want = numpy_attention(q, k, v, starts, counts)
  np.testing.assert_allclose(got, want, atol=1e-5)
  assert not got[2].any() and not got[1, counts[1] :].any()


@pytest.mark.parametrize("shape", SHAPES[1:4])
@pytest.mark.parametrize("cache", ["int4", "e4m3", "bf16"])
@pytest.mark.parametrize("query", ["e4m3", "bf16"])
def test_quantised_operands(shape, cache, query):
  """The FA3 rule: error at most twice that of the same precision in NumPy."""
  length, cached, *_ = shape
  q, k, v = inputs(1, *shape)
  kv = encode(k, v, KVFormat(cache=cache, scale="bf16", query=query))
  starts, counts = np.array([cached - length]), np.array([length])
  q_scale, operand, exact_q = None, q.astype(jnp.bfloat16), None
  if query == "e4m3":
    operand, q_scale = quantize_e4m3(q)
    exact_q = np.asarray(operand).astype(np.float64)
    exact_q = exact_q * np.asarray(q_scale, np.float64)[..., None]
  else:
    exact_q = np.asarray(operand).astype(np.float64)
  dequantised = [
    np.asarray(x).astype(np.float64)
    * (1 if scale is None else np.asarray(scale, np.float64)[..., None])
    for x, scale in ((kv.k, kv.k_scale), (kv.v, kv.v_scale))
  ]
  want = numpy_attention(exact_q, *dequantised, starts, counts)
  got = attend(
    operand, q_scale, kv, starts=starts, counts=counts, out_dtype=jnp.float32
  )
  # Relative rounding of probabilities: 2^-4 in e4m3, 2^-8 in bf16. Errors
  # average over the keys, but a single key carries them in full.
  e4m3_p = query == "e4m3" and cache != "bf16"
  relative = 2.0 ** (-4 if e4m3_p else -8)
  magnitude = numpy_attention(
    exact_q, dequantised[0], np.abs(dequantised[1]), starts, counts
  )
  assert (np.abs(got - want) <= relative * magnitude + 1e-5).all()
  rms = np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2))
  assert rms < relative


def test_probabilities_are_rounded_to_e4m3_only_between_codes():
  q, k, v = inputs(1, 4, 64, 2, 1, 32)
  starts, counts = np.array([60]), np.array([4])
  kv = encode(k, v, KVFormat(cache="int4", scale="f32"))
  q8, q_scale = quantize_e4m3(q)
  call = lambda q, scale: attend(
    q, scale, kv, starts=starts, counts=counts, out_dtype=jnp.float32
  )
  codes = call(q8, q_scale)
  same_q = q8.astype(jnp.float32) * q_scale[..., None]
  exact = call(same_q, None)
  error = jnp.linalg.norm(codes - exact) / jnp.linalg.norm(exact)
  assert 1e-3 < error < 4e-2


def test_value_scales_of_any_size():
  """Rounding of probabilities has no range of its own."""
  q, k, v = inputs(1, 1, 32, 2, 1, 32)
  q8, q_scale = quantize_e4m3(q)
  outs = []
  for factor in (2.0**-20, 1.0, 2.0**20):
    kv = encode(k, v * factor, KVFormat(cache="int4", scale="f32"))
    out = attend(
      q8,
      q_scale,
      kv,
      starts=np.array([31]),
      counts=np.array([1]),
      out_dtype=jnp.float32,
    )
    outs.append(out / factor)
  np.testing.assert_array_equal(outs[0], outs[1])
  np.testing.assert_array_equal(outs[2], outs[1])


def test_unused_capacity_changes_nothing():
  q, k, v = inputs(2, 3, 9, 4, 2, 16)
  starts, counts = np.array([6, 2]), np.array([3, 3])
  kv = encode(k, v, KVFormat(cache="int4"))
  q8, q_scale = quantize_e4m3(q)
  wide = jax.tree.map(
    lambda x: jnp.concatenate([x, jnp.ones_like(x)] * 2, axis=1)[:, :25], kv
  )
  got, want = (
    attend(q8, q_scale, c, starts=starts, counts=counts, out_dtype=jnp.bfloat16)
    for c in (wide, kv)
  )
  assert got.dtype == jnp.bfloat16
  np.testing.assert_allclose(
    got.astype(jnp.float32), want.astype(jnp.float32), rtol=1e-2, atol=1e-6
  )


def test_large_scores_do_not_overflow():
  q = jnp.full((1, 2, 1, 16), 1e4)
  k = jnp.full((1, 2, 1, 16), 1e4).at[:, 0].mul(-1)
  v = jnp.stack([jnp.zeros((1, 1, 16)), jnp.ones((1, 1, 16))], axis=1)
  got = attend(
    q,
    None,
    KeyValues(k=k, v=v),
    starts=np.array([0]),
    counts=np.array([2]),
    out_dtype=jnp.float32,
  )
  np.testing.assert_array_equal(got[0, :, 0, 0], [0, 1])
