"""bf16 attention of other libraries, for the attention benchmarks."""

import importlib.util
import statistics

import jax
import jax.numpy as jnp

from benchmarks.common import device_us, isolated
from fireq_jax.errors import ResourceError


def measure(
  batch: int,
  context: int,
  q_heads: int,
  kv_heads: int,
  head_dim: int,
  *,
  new_tokens: int,
  timeout_s: float,
) -> dict[str, float]:
  """Microseconds of the newest `new_tokens` attending to `context` tokens.

  A peer that is not installed, or cannot run the shape, has no entry.
  """
  peers = {"cudnn": _cudnn}
  if importlib.util.find_spec("torch"):
    peers["torch_sdpa"] = _torch
  shape = (batch, context, new_tokens, q_heads, kv_heads, head_dim)
  result = {}
  for name, peer in peers.items():
    try:
      result[name] = isolated(peer, *shape, timeout_s=timeout_s)
    except ResourceError:
      continue
  return result


def _cudnn(batch, context, new_tokens, q_heads, kv_heads, head_dim) -> float:
  tokens_and_heads = (
    (new_tokens, q_heads), (context, kv_heads), (context, kv_heads)
  )  # fmt: skip
  q, k, v = (
    jax.random.normal(key, (batch, *x, head_dim), jnp.bfloat16)
    for key, x in zip(jax.random.split(jax.random.key(0), 3), tokens_and_heads)
  )
  attend = lambda q, k, v: jax.nn.dot_product_attention(
    q, k, v, is_causal=new_tokens > 1, implementation="cudnn"
  )
  return device_us(attend, [(q, k, v)])


def _torch(batch, context, new_tokens, q_heads, kv_heads, head_dim) -> float:
  import torch  # pyrefly: ignore[missing-import]

  q, k, v = (
    torch.randn(batch, n, t, head_dim, device="cuda", dtype=torch.bfloat16)
    for n, t in (
      (q_heads, new_tokens), (kv_heads, context), (kv_heads, context)
    )
  )  # fmt: skip
  attend = lambda: torch.nn.functional.scaled_dot_product_attention(
    q, k, v, is_causal=new_tokens > 1, enable_gqa=True
  )
  for _ in range(3):
    attend()
  samples = []
  for _ in range(11):
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(20):
      attend()
    end.record()
    end.synchronize()
    samples.append(start.elapsed_time(end) / 20 * 1e3)
  return statistics.median(samples)
