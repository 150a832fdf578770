"""Prefill attention: FP8 products over INT4 keys and values, causal.

`us` is the attention alone, with scales per token; `total_us` starts from the
QKV projection: it adds the rotation, rounding, appending keys and values to an
INT4 cache and reading it back. Queries, keys and values are normal, as those of
the peers.
"""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
from absl import flags

from benchmarks import attention_peers
from benchmarks.common import (
  attention_shapes,
  cache_config,
  define_attention_flags,
  device_us,
  isolated,
)
from fireq_jax import kv_cache
from fireq_jax.attention import attention
from fireq_jax.config import KVFormat
from fireq_jax.pallas import kv_layout
from fireq_jax.pallas import prefill_attention as prefill
from fireq_jax.pallas.rope_append import rope_append
from fireq_jax.qtensor import quantize_e4m3

NEEDS_HOPPER = True


def define_flags(values: flags.FlagValues) -> None:
  define_attention_flags(
    values,
    ["1x1024", "1x4096", "1x8192", "1x16384", "16x1024"],
    "Batch x tokens of the rows.",
  )


def run(values: flags.FlagValues) -> Iterable[dict]:
  for shape in attention_shapes(values):
    row = isolated(_measure, *shape, timeout_s=values.timeout)
    row["baselines"] = attention_peers.measure(
      *shape, new_tokens=shape[1], timeout_s=values.timeout
    )
    yield row


def _measure(batch, seq, q_heads, kv_heads, head_dim) -> dict:
  keys = jax.random.split(jax.random.key(0), 3)
  q, k, v = (
    jax.random.normal(key, (batch, seq, heads, head_dim), jnp.bfloat16)
    for key, heads in zip(keys, (q_heads, kv_heads, kv_heads))
  )
  starts = jnp.zeros(batch, jnp.int32)
  counts = jnp.full(batch, seq, jnp.int32)
  kv = KVFormat(cache="int4", query="e4m3")
  config = cache_config(q_heads, kv_heads, head_dim, seq)
  cache = kv_cache.init_cache(config, batch, seq, kv).layers[0]

  width = (q_heads + 2 * kv_heads) * head_dim
  qkv = jax.random.normal(keys[0], (batch, seq, width), jnp.bfloat16)
  angles = 7 * jax.random.uniform(keys[1], (batch, seq, head_dim // 2))

  def total(qkv, cos, sin, cache):
    q, q_scale, cache = rope_append(qkv, cos, sin, cache, starts, counts)
    out = attention(
      q,
      q_scale,
      cache,
      starts=starts,
      counts=counts,
      out_dtype=jnp.bfloat16,
      implementation="mosaic_gpu",
    )
    return out, cache

  @jax.jit
  def prepare(cache, q, k, v):
    held = kv_cache.read(kv_cache.append(cache, k, v, starts, counts))
    operands = kv_layout.prefill_operands(
      held.k,
      held.k_scale,  # pyrefly: ignore[bad-argument-type]
      held.v,
      held.v_scale,  # pyrefly: ignore[bad-argument-type]
    )
    return *quantize_e4m3(q), *operands

  operands = (*prepare(cache, q, k, v), starts, counts)
  us = device_us(prefill.prefill_attention, [operands])
  flops = 2 * batch * seq**2 * q_heads * head_dim  # half of 4: causal
  return {
    "batch": batch,
    "seq": seq,
    "q_heads": q_heads,
    "kv_heads": kv_heads,
    "head_dim": head_dim,
    "us": us,
    "tflops": flops / us * 1e-6,
    "total_us": device_us(
      total, [(qkv, jnp.cos(angles), jnp.sin(angles), cache)]
    ),
  }


def plot(rows, axes) -> None:
  rows = [row for row in rows if row["batch"] == 1]
  seq = [row["seq"] for row in rows]
  axes.plot(seq, [row["tflops"] for row in rows], "o-", label="INT4 keys, FP8")
  for name in sorted({name for row in rows for name in row["baselines"]}):
    speed = [
      row["tflops"] * row["us"] / row["baselines"].get(name, float("nan"))
      for row in rows
    ]
    axes.plot(seq, speed, "o--", label=name)
  axes.set(xscale="log", xlabel="tokens", ylabel="TFLOPS, causal")
  axes.legend()
