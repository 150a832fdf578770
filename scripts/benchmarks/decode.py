"""Decode attention: one query token a sequence over a packed INT4 cache.

`bf16_floor_us` is what reading the same keys and values in bf16 would take at
the copy bandwidth measured in the same run: the ratio to it is the gain.
"""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
from absl import flags

from benchmarks import attention_peers
from benchmarks.common import (
  attention_shapes,
  define_attention_flags,
  device_us,
  isolated,
)
from fireq_jax.pallas import kv_layout
from fireq_jax.pallas.decode_attention import decode_attention
from fireq_jax.qtensor import quantize_e4m3

NEEDS_HOPPER = True


def define_flags(values: flags.FlagValues) -> None:
  define_attention_flags(
    values,
    ["64x8192", "64x32768", "16x8192", "1x8192", "1x65536", "1x131072"],
    "Batch x context of the rows.",
  )


def run(values: flags.FlagValues) -> Iterable[dict]:
  copy = isolated(copy_tbps, timeout_s=values.timeout)
  for shape in attention_shapes(values):
    row = isolated(_measure, *shape, timeout_s=values.timeout)
    bf16_bytes = 2 * 2 * shape[0] * shape[1] * shape[3] * shape[4]
    row["copy_tbps"] = copy
    row["bf16_floor_us"] = bf16_bytes / copy * 1e-6
    row["gain"] = row["bf16_floor_us"] / row["us"]
    row["baselines"] = attention_peers.measure(
      *shape, new_tokens=1, timeout_s=values.timeout
    )
    yield row


def copy_tbps() -> float:
  """Bytes read and written a second by the best of a plain copy."""
  size = 2**32
  x = jax.random.bits(jax.random.key(0), (size // 4,), jnp.uint32)
  return 2 * size / device_us(lambda x: x + 1, [(x,)], repeats=7) * 1e-6


def _measure(batch, context, q_heads, kv_heads, head_dim) -> dict:
  heads = (batch, kv_heads)
  words = lambda key, *shape: jax.random.bits(key, (*heads, *shape), jnp.uint32)
  scale = lambda key: jax.random.uniform(
    key, (*heads, context), jnp.bfloat16, 0.05, 0.15
  )

  def operands(seed):
    keys = jax.random.split(jax.random.key(seed), 5)
    q = jax.random.normal(keys[0], (batch, 1, q_heads, head_dim))
    values = kv_layout.values_shape(context, head_dim)
    return (
      *quantize_e4m3(q),
      words(keys[1], context, head_dim // 8),
      scale(keys[2]),
      words(keys[3], *values),
      scale(keys[4]),
      jnp.full(batch, context - 1, jnp.int32),
      jnp.ones(batch, jnp.int32),
    )

  size = batch * kv_heads * context * (head_dim + 2 * 2)
  # More bytes than the L2 holds.
  sets = [operands(seed) for seed in range(-(-(2**28) // size))]
  us = device_us(decode_attention, sets)
  return {
    "batch": batch,
    "context": context,
    "q_heads": q_heads,
    "kv_heads": kv_heads,
    "head_dim": head_dim,
    "us": us,
    "tbps": size / us * 1e-6,
  }


def plot(rows, axes) -> None:
  names = [f"{row['batch']} x {row['context']}" for row in rows]
  axes.bar(names, [row["gain"] for row in rows])
  axes.set(ylabel="times faster than bf16 at copy bandwidth")
