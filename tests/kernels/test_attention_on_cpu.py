"""Attention kernels without a GPU: interpreted, lowered, compiled."""

import deviceless
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fireq_jax.attention import attention
from fireq_jax.errors import ConfigError
from fireq_jax.kv_cache import KeyValues
from fireq_jax.pallas import (
  decode_attention,
  kv_layout,
  prefill_attention,
  prefill_bf16,
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
    shape((batch,), jnp.int32),
  )


def prefill_operands(batch, length, q_heads, kv_heads, head_dim, tokens):
  shape = jax.ShapeDtypeStruct
  return (
    shape((batch, length, q_heads, head_dim), E4M3),
    shape((batch, length, q_heads), F32),
    shape((batch, kv_heads, tokens, head_dim), E4M3),
    shape((batch, kv_heads, head_dim, tokens), E4M3),
    shape((batch, kv_heads, 8, tokens), E4M3),
    shape((batch, kv_heads, tokens // 2, 4), F32),
    shape((batch, kv_heads), F32),
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
    ((2, 3, 6, 2, 128, 64), {"scale": E4M3}),
    ((2, 2, 32, 2, 64, 64), {}),
    ((2, 1, 32, 2, 128, 64), {}),
    ((1, 8, 4, 4, 128, 64), {}),
    ((1, 1, 6, 2, 64, 64), {}),
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


@pytest.mark.parametrize(
  "sizes", [(1, 512, 32, 8, 128, 1024), (2, 9, 4, 4, 64, 77)], ids=str
)
def test_prefill_bf16(sizes):
  operands = bf16_operands(*sizes)
  (out,) = lower(prefill_bf16.prefill_attention, *operands)
  assert (out.shape, out.dtype) == (operands[0].shape, BF16)


def bf16_operands(batch, length, q_heads, kv_heads, head_dim, tokens):
  shape = jax.ShapeDtypeStruct
  held = shape((batch, kv_heads, tokens, head_dim), BF16)
  rows = shape((batch,), jnp.int32)
  q = shape((batch, length, q_heads, head_dim), BF16)
  return q, held, held, rows, rows


def test_prefill_bf16_says_what_it_cannot_do():
  for wrong in (
    bf16_operands(1, 9, 4, 4, 96, 16),
    prefill_operands(1, 64, 8, 8, 64, 128)[:1]
    + bf16_operands(1, 64, 8, 8, 64, 128)[1:],
  ):
    with pytest.raises(NotImplementedError):
      jax.eval_shape(prefill_bf16.prefill_attention, *wrong)


def test_tuning_is_checked():
  for wrong in (
    {"block": 100},
    {"stages": 10},
    {"stages": 9, "consumers": 2},
    {"consumers": 4},
    {"team": 2},
  ):
    with pytest.raises(ConfigError):
      decode_attention.Tuning(**wrong)
  for wrong in ({"block_kv": 48}, {"stages": 1}):
    with pytest.raises(ConfigError):
      prefill_attention.Tuning(**wrong)


def test_plan_fills_the_card():
  def plan(items, blocks):
    tuning = decode_attention.plan(items, blocks, decode_attention.Tuning())
    assert tuning.stages % tuning.consumers == 0
    return tuning.splits, tuning.team

  assert plan(512, 64) == (1, 3)
  assert plan(128, 9) == (1, 2)
  assert plan(8, 9) == (9, 1)
  splits, team = plan(8, 512)
  assert 8 * splits in range(120, 133) and team == 2
  assert plan(1024, 9) == (1, 1)
  assert plan(1, 1)[0] == 1
  chosen = decode_attention.Tuning(splits=7, team=1, stages=6, consumers=3)
  assert decode_attention.plan(512, 64, chosen) == chosen


@pytest.mark.slow
@deviceless.needs_plugin
def test_kernels_compile_without_spills(tmp_path, monkeypatch):
  monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))
  decode, prefill = (
    decode_attention.decode_attention,
    prefill_attention.prefill_attention,
  )
  bf16 = prefill_bf16.prefill_attention
  reports = deviceless.compile_all(
    [
      (decode, decode_operands(64, 1, 32, 8, 128, 8192)),
      (decode, decode_operands(1, 4, 32, 8, 64, 65536, query=BF16)),
      (decode, decode_operands(16, 1, 32, 32, 128, 4096, scale=E4M3)),
      (decode, decode_operands(128, 1, 32, 8, 128, 1024)),
      (decode, decode_operands(16, 1, 32, 8, 128, 1024)),
      (prefill, prefill_operands(1, 4096, 32, 8, 128, 4096)),
      (prefill, prefill_operands(2, 300, 8, 8, 64, 512)),
      (bf16, bf16_operands(1, 4096, 32, 8, 128, 4096)),
      (bf16, bf16_operands(2, 300, 8, 8, 64, 500)),
    ],
    tmp_path,
  )
  assert len(reports) == 9
  for report in reports:
    assert report.spilled_bytes == 0 and not report.serialised_wgmma
  # The second splits sequences, with two parts to an item: were the compiler
  # to double an arrival, each copy would count for itself.
  assert (
    sum(x.read_text().count("arrived[") for x in tmp_path.glob("*.ptx")) == 2
  )


def interpreter():
  if jax.__version__ != "0.11.2":
    pytest.skip("interprets kernels with jax 0.11.2 only")
  import mosaic_interpreter

  return mosaic_interpreter


def random(shape, seed, low, high, dtype):
  values = np.random.default_rng(seed).uniform(low, high, shape)
  return jnp.asarray(values, F32).astype(dtype)


def close(got, want, tolerance):
  got, want = (np.asarray(x, np.float64) for x in (got, want))
  return np.linalg.norm(got - want) <= tolerance * np.linalg.norm(want)


@pytest.mark.parametrize(
  "heads, head_dim, starts, counts, scale, team",
  [
    (4, 128, [130], [1], BF16, 2),
    (4, 64, [5, 200], [3, 2], BF16, 1),
    (2, 64, [0, 140], [0, 1], E4M3, 2),
    (8, 128, [40, 200, 7], [1, 1, 1], F32, 1),
    (12, 128, [40], [2], F32, 2),
    (16, 128, [130], [1], BF16, 2),
  ],
)
def test_interpreted_decode(heads, head_dim, starts, counts, scale, team):
  mosaic_interpreter = interpreter()
  batch, queries = len(starts), max(counts)
  tokens = 272 if max(starts) > 100 else 112  # 3 blocks or 1
  bits = lambda seed, *shape: jnp.asarray(
    np.random.default_rng(seed).integers(0, 2**32, shape, np.uint32)
  )
  values = kv_layout.values_shape(tokens, head_dim)
  operands = (
    random((batch, queries, heads, head_dim), 0, -100, 100, E4M3),
    random((batch, queries, heads), 1, 0.02, 0.03, F32),
    bits(2, batch, 1, tokens, head_dim // 8),
    random((batch, 1, tokens), 3, 0.05, 0.15, scale),
    bits(4, batch, 1, *values),
    random((batch, 1, tokens), 5, 0.05, 0.15, scale),
    jnp.asarray(starts, jnp.int32),
    jnp.asarray(counts, jnp.int32),
  )
  tuning = decode_attention.Tuning(
    consumers=2, stages=2, splits=1, team=team, ctas=1
  )
  want = reference_attention.decode_attention(*operands)
  with mosaic_interpreter.interpret() as races:
    got = decode_attention.decode_attention(*operands, tuning=tuning)
    assert not races()
  assert close(got, want, 4e-3)
  padding = np.arange(queries) >= np.asarray(counts)[:, None]
  assert not np.asarray(got, np.float32)[padding].any()


def interpreted_prefill(operands, **tuning):
  mosaic_interpreter = interpreter()
  tuning = prefill_attention.Tuning(stages=2, **tuning)
  want = reference_attention.prefill_attention(*operands)
  with mosaic_interpreter.interpret() as races:
    got = prefill_attention.prefill_attention(*operands, tuning=tuning)
    assert not races()
  # Peaks, and so what P is rounded to, depend on the order of tiles.
  assert close(got, want, 4e-2)
  return np.asarray(got, np.float32)


def codes(*shape):
  return jnp.asarray(
    np.random.default_rng(0).integers(-8, 8, (2, *shape)), jnp.int8
  )


def test_interpreted_prefill():
  """Two ragged rows, one that continues a cache; padding gives zeros."""
  k, v = codes(2, 256, 1, 64)
  scale = lambda seed: random((2, 256, 1), seed, 0.05, 0.15, F32)
  got = interpreted_prefill(
    (
      random((2, 70, 2, 64), 2, -100, 100, E4M3),
      random((2, 70, 2), 3, 0.02, 0.03, F32),
      *kv_layout.prefill_operands(k, scale(4), v, scale(5)),
      jnp.array([130, 0], jnp.int32),
      jnp.array([70, 3], jnp.int32),
    ),
    ctas=1,
  )
  assert not got[1, 3:].any()


@pytest.mark.parametrize("chunk", [192, 1024])
def test_interpreted_prefill_moves_peaks(chunk, monkeypatch):
  """Keys grow, so later tiles outweigh earlier ones by far; a zero query."""
  monkeypatch.setattr(prefill_attention, "_CHUNK", chunk)
  k, v = codes(1, 512, 1, 128)
  growing = jnp.linspace(0.01, 0.6, 512, dtype=F32)[None, :, None]
  interpreted_prefill(
    (
      random((1, 140, 1, 128), 2, -100, 100, E4M3).at[0, 3].set(0),
      random((1, 140, 1), 3, 0.02, 0.03, F32).at[0, 3].set(0),
      *kv_layout.prefill_operands(
        k, growing, v, random((1, 512, 1), 5, 0.01, 0.15, F32)
      ),
      jnp.array([372], jnp.int32),
      jnp.array([140], jnp.int32),
    ),
    ctas=1,
  )


@pytest.mark.parametrize("start, count", [(136, 120), (0, 3), (250, 20)])
def test_interpreted_prefill_bf16(start, count):
  """One CTA: the interpreter takes accumulators of several for one."""
  mosaic_interpreter = interpreter()
  q = random((1, 120, 1, 64), 2, -3, 3, BF16)
  k, v = (random((1, 1, 276, 64), seed, -1, 1, BF16) for seed in (3, 4))
  rows = jnp.array([start], jnp.int32), jnp.array([count], jnp.int32)
  by_token = lambda x: jnp.swapaxes(x, 1, 2)
  want = attention(
    q,
    None,
    KeyValues(k=by_token(k), v=by_token(v)),
    starts=rows[0],
    counts=rows[1],
    out_dtype=BF16,
  )
  with mosaic_interpreter.interpret() as races:
    got = prefill_bf16.prefill_attention(q, k, v, *rows)
    assert not races()
  assert close(got, want, 1e-2)
  assert not np.asarray(got, np.float32)[0, count:].any()
