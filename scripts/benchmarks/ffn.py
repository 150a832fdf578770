"""Device time of a feed-forward block: norm, gate and up, down, residual.

The sizes are those of FireQ's benchmark of the MLP, 1, 4, 16 and 64 times 1024
tokens, and those of decode. Codes and activations are random and weights
rotate through more than 200 MB. The baseline is the same block in bf16 by XLA.
"""

from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
from absl import flags

from benchmarks import common
from benchmarks.gemm import copies, weight
from fireq_jax.config import LlamaConfig
from fireq_jax.linear import RMSNorm, linear

NEEDS_HOPPER = True


def define_flags(values: flags.FlagValues) -> None:
  flags.DEFINE_list(
    "models",
    ["llama-3-8b", "llama-2-7b"],
    "Names of shapes.",
    flag_values=values,
  )
  flags.DEFINE_list(
    "tokens",
    "1 16 64 128 1024 4096 16384 65536".split(),
    "Rows of x.",
    flag_values=values,
  )
  flags.DEFINE_integer(
    "timeout", 150, "Seconds a row may take.", flag_values=values
  )


def run(values: flags.FlagValues) -> Iterable[dict]:
  for model in common.names(values.models, common.MODELS):
    for (tokens,) in common.sizes(values.tokens, "tokens"):
      yield common.isolated(measure, model, tokens, timeout_s=values.timeout)


def measure(model: str, tokens: int) -> dict:
  """One row."""
  config = common.MODELS[model]
  hidden, ffn = config.hidden_size, config.intermediate_size
  us = _time(config, tokens, quantised=True)
  return {
    "model": model,
    "tokens": tokens,
    "us": us,
    "tflops": 6 * hidden * ffn * tokens / us / 1e6,
    "baselines": {"xla_bf16": _time(config, tokens, quantised=False)},
  }


def _time(config: LlamaConfig, tokens: int, *, quantised: bool) -> float:
  hidden, ffn = config.hidden_size, config.intermediate_size
  norm = RMSNorm(jnp.ones(hidden, jnp.bfloat16), config.rms_norm_eps)
  x = jax.random.normal(jax.random.key(0), (tokens, hidden), jnp.bfloat16)

  def int4(seed):
    gate_up = weight(seed, 2 * ffn, hidden, jnp.float8_e4m3fn, "gated")
    return gate_up, weight(seed, hidden, ffn, jnp.float8_e4m3fn, "e4m3")

  def bf16(seed):
    keys = jax.random.split(jax.random.key(seed), 2)
    shapes = (hidden, 2 * ffn), (ffn, hidden)
    return tuple(
      0.02 * jax.random.normal(key, shape, jnp.bfloat16)
      for key, shape in zip(keys, shapes)
    )

  def block(x, gate_up, down):
    h = linear(x, gate_up, norm=norm)
    if not quantised:
      gate, up = jnp.split(h.astype(jnp.float32), 2, axis=1)
      h = (jax.nn.silu(gate) * up).astype(x.dtype)
    return linear(h, down, residual=x)

  size = 3 * hidden * ffn * (0.5 if quantised else 2)
  make = int4 if quantised else bf16
  sets = [(x, *make(seed)) for seed in range(copies(size))]
  return common.device_us(block, sets)


def plot(rows: Sequence[dict], axes) -> None:
  """How much faster than bf16, by tokens."""
  for model in dict.fromkeys(row["model"] for row in rows):
    mine = [row for row in rows if row["model"] == model]
    axes.plot(
      [row["tokens"] for row in mine],
      [row["baselines"]["xla_bf16"] / row["us"] for row in mine],
      marker="o",
      label=model,
    )
  axes.axhline(1, color="gray")
  axes.set(xscale="log", xlabel="tokens", ylabel="times faster than XLA bf16")
  axes.legend()
