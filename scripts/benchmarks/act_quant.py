"""Device time of quantising activations, against the same by plain XLA.

Inputs of few tokens stay in the L2 cache, as they do behind the kernel that
wrote them; those of many rotate through more than 200 MB.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
from absl import flags

from benchmarks import common, gemm
from fireq_jax.pallas import act_quant, reference

_EPS = 1e-5

NEEDS_HOPPER = True


def define_flags(values: flags.FlagValues) -> None:
  flags.DEFINE_list(
    "tokens", "1 16 256 1024 4096 16384".split(), "Rows.", flag_values=values
  )
  flags.DEFINE_list(
    "channels", ["4096", "14336"], "Columns.", flag_values=values
  )


def run(values: flags.FlagValues) -> Iterator[common.Row]:
  tokens = [t for (t,) in common.sizes(values.tokens, "tokens")]
  for (c,) in common.sizes(values.channels, "channels"):
    for norm in (True, False):
      yield from common.isolated(
        measure,
        c,
        norm=norm,
        tokens=tokens,
        timeout_s=60,
      )


def measure(c: int, *, norm: bool, tokens: list[int]) -> list[common.Row]:
  """Rows of one number of channels."""
  weight = (jnp.ones(c, jnp.bfloat16),) if norm else ()
  rows = []
  for t in tokens:
    size = 3 * t * c
    count = gemm.copies(size) if t > 256 else 2
    sets = [
      (jax.random.normal(jax.random.key(i), (t, c), jnp.bfloat16), *weight)
      for i in range(count)
    ]
    us, xla_us = (
      common.device_us(lambda *a, f=f: f(*a, eps=_EPS), sets)
      for f in (act_quant.act_quant, reference.act_quant)
    )
    row = {"tokens": t, "channels": c, "norm": norm, "us": us}
    rows.append(row | {"tbps": size / us / 1e6, "baselines": {"xla": xla_us}})
  return rows
