"""Attention kernels lower for CUDA without a GPU: shapes, layouts, memory."""

import jax
import jax.numpy as jnp
import pytest

from fireq_jax.errors import ConfigError
from fireq_jax.pallas import (
  decode_attention,
  kv_layout,
  prefill_attention,
  reference_attention,
)

E4M3, BF16, F32 = jnp.float8_e4m3fn, jnp.bfloat16, jnp.float32


def lower(function, *operands):
  check = jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")
  exported = jax.export.export(
    jax.jit(function), platforms=["cuda"], disabled_checks=[check]
  )(*operands)
  assert "mosaic_gpu" in exported.mlir_module()
  return exported.out_avals


def decode_operands(batch, queries, q_heads, kv_heads, head_dim, tokens, **how):
  shape = jax.ShapeDtypeStruct
  query = how.get("query", E4M3)
  scale = shape((batch, kv_heads, tokens), how.get("scale", BF16))
  scales = shape((batch, queries, q_heads), F32)
  values = kv_layout.values_shape(tokens, head_dim)
  return (
    shape((batch, queries, q_heads, head_dim), query),
    scales if query == E4M3 else None,
    shape((batch, kv_heads, tokens, head_dim // 8), jnp.uint32),
    scale,
    shape((batch, kv_heads, *values), jnp.uint32),
    scale,
    shape((batch,), jnp.int32),
  )


def prefill_operands(batch, length, q_heads, kv_heads, head_dim, tokens):
  shape = jax.ShapeDtypeStruct
  scale = shape((batch, kv_heads, tokens), F32)
  return (
    shape((batch, length, q_heads, head_dim), E4M3),
    shape((batch, length, q_heads), F32),
    shape((batch, kv_heads, tokens, head_dim), E4M3),
    scale,
    shape((batch, kv_heads, head_dim, tokens), E4M3),
    scale,
    shape((batch,), jnp.int32),
    shape((batch,), jnp.int32),
  )


@pytest.mark.parametrize(
  "sizes, how",
  [
    ((64, 1, 32, 8, 128, 8192), {}),
    ((1, 1, 32, 8, 64, 65536), {"query": BF16}),
    ((2, 8, 32, 8, 128, 1040), {"scale": F32}),
    ((3, 5, 4, 4, 64, 16), {}),
  ],
)
def test_decode(sizes, how):
  operands = decode_operands(*sizes, **how)
  (out,) = lower(decode_attention.decode_attention, *operands)
  want = jax.eval_shape(reference_attention.decode_attention, *operands)
  assert (out.shape, out.dtype) == (want.shape, want.dtype)


@pytest.mark.parametrize(
  "sizes",
  [
    (1, 4096, 32, 8, 128, 4096),
    (2, 300, 8, 8, 64, 512),
    (1, 9, 4, 1, 128, 128),
  ],
)
def test_prefill(sizes):
  operands = prefill_operands(*sizes)
  (out,) = lower(prefill_attention.prefill_attention, *operands)
  want = jax.eval_shape(reference_attention.prefill_attention, *operands)
  assert (out.shape, out.dtype) == (want.shape, want.dtype)


@pytest.mark.parametrize(
  "sizes, how",
  [
    ((1, 1, 4, 2, 80, 64), {}),
    ((1, 9, 4, 2, 64, 64), {}),
    ((1, 1, 4, 2, 64, 72), {}),
    ((1, 1, 4, 2, 64, 64), {"query": F32}),
    ((1, 1, 4, 2, 64, 64), {"scale": E4M3}),
  ],
)
def test_decode_says_what_it_cannot_do(sizes, how):
  operands = decode_operands(*sizes, **how)
  with pytest.raises(NotImplementedError):
    jax.eval_shape(decode_attention.decode_attention, *operands)


def test_prefill_says_what_it_cannot_do():
  for sizes in ((1, 8, 4, 2, 80, 128), (1, 8, 4, 2, 64, 100)):
    with pytest.raises(NotImplementedError):
      jax.eval_shape(
        prefill_attention.prefill_attention, *prefill_operands(*sizes)
      )


def test_tuning_is_checked():
  for wrong in ({"block": 100}, {"stages": 10}, {"consumers": 4}):
    with pytest.raises(ConfigError):
      decode_attention.Tuning(**wrong)
  for wrong in ({"block_kv": 48}, {"stages": 1}):
    with pytest.raises(ConfigError):
      prefill_attention.Tuning(**wrong)


def test_best_splits_fills_the_card():
  assert decode_attention.best_splits(512, 64, 132) == 1
  assert 8 * decode_attention.best_splits(8, 512, 132) in range(120, 133)
  assert decode_attention.best_splits(1, 1, 132) == 1
