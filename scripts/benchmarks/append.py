"""Rotating, rounding and appending to an INT4 cache: one kernel.

`ratio` is to `floor_us`, what its bytes take at the copy bandwidth measured in
the same run. `xla_us` is the same in plain JAX.
"""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from benchmarks import decode
from benchmarks.common import (
  attention_shapes,
  cache_config,
  define_attention_flags,
  device_us,
  isolated,
)
from fireq_jax.config import KVFormat
from fireq_jax.kv_cache import init_cache
from fireq_jax.pallas import reference_attention
from fireq_jax.pallas.rope_append import rope_append

NEEDS_HOPPER = True


def define_flags(values: flags.FlagValues) -> None:
  define_attention_flags(
    values,
    ["1x1", "16x1", "128x1", "256x1", "1x4096", "16x1024", "16x4096"],
    "Batch x new tokens of the rows.",
  )


def run(values: flags.FlagValues) -> Iterable[dict]:
  copy = isolated(decode.copy_tbps, timeout_s=values.timeout)
  for shape in attention_shapes(values):
    for factors in (False, True):
      row = isolated(_measure, *shape, factors, timeout_s=values.timeout)
      row["floor_us"] = row["bytes"] / copy * 1e-6
      row["ratio"] = row["us"] / row["floor_us"]
      yield row


def _measure(batch, length, q_heads, kv_heads, head_dim, factors) -> dict:
  kv = KVFormat(cache="int4", query="e4m3")
  config = cache_config(q_heads, kv_heads, head_dim, max(length, 2048))

  def operands(seed):
    keys = jax.random.split(jax.random.key(seed), 2)
    width = (q_heads + 2 * kv_heads) * head_dim
    angles = 7 * jax.random.uniform(keys[1], (batch, length, head_dim // 2))
    cache = init_cache(config, batch, config.max_position_embeddings, kv)
    return (
      jax.random.normal(keys[0], (batch, length, width), jnp.bfloat16),
      jnp.cos(angles),
      jnp.sin(angles),
      cache.layers[0],
      jnp.zeros(batch, jnp.int32),
      jnp.full(batch, length, jnp.int32),
    )

  scale = jnp.linspace(0.5, 2, kv_heads * head_dim).reshape(kv_heads, -1)
  options: dict[str, Any] = {}
  if factors:
    options = {"key_scale": scale, "key_shift": scale}
  sets = [operands(seed) for seed in range(3)]
  code_bytes = 2 * kv_heads * (head_dim // 2 + 2) + q_heads * (head_dim + 4)
  read_bytes = 2 * (q_heads + 2 * kv_heads) * head_dim + 4 * head_dim
  return {
    "batch": batch,
    "tokens": length,
    "q_heads": q_heads,
    "kv_heads": kv_heads,
    "head_dim": head_dim,
    "key_factors": factors,
    "bytes": batch * length * (read_bytes + code_bytes),
    "us": device_us(lambda *args: rope_append(*args, **options), sets),
    "xla_us": device_us(
      lambda *args: reference_attention.rope_append(*args, **options), sets
    ),
  }
