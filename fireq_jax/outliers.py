"""Outliers put into a model on purpose, without changing its function.

Large models have a few channels far above the rest, and quantisers fail on
them; small models have none. Injecting some changes no float result, so that
whatever a quantised model loses is the quantiser's fault.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fireq_jax import smooth
from fireq_jax.config import LlamaConfig, check


def inject(
  params: dict[str, Any],
  config: LlamaConfig,
  *,
  factor: float,
  fraction: float = 0.02,
  seed: int = 0,
) -> dict[str, Any]:
  """Returns float parameters with outlier channels in every layer.

  In each layer, `fraction` of the channels (at least one) at every site get
  larger by `factor`: the norms' gains against the weights they feed, key
  pairs against query pairs, value channels against rows of `o_proj`, and
  `up_proj` against rows of `down_proj`. A power of two changes no bit of the
  float results unless something overflows.

  Args:
    params: float parameter tree; not modified.
    config: its shape.
    factor: how much larger, above 0.
    fraction: of the channels of a site, or of each head; in (0, 1].
    seed: which ones.

  Raises:
    ConfigError: a number out of its range.
  """
  check(factor > 0, "factor must be positive", got=factor)
  check(0 < fraction <= 1, "fraction must be in (0, 1]", got=fraction)
  rng = np.random.default_rng(seed)

  def some(*shape: int) -> jax.Array:
    """f32 [shape]: `factor` at some of the last axis, 1 elsewhere."""
    count = max(1, round(fraction * shape[-1]))
    order = rng.random(shape).argsort(axis=-1)
    return jnp.where(jnp.asarray(order < count), jnp.float32(factor), 1.0)

  def change(layer: dict[str, Any]) -> dict[str, Any]:
    heads = (config.num_key_value_heads, config.head_dim)
    factors = smooth.Factors(
      qkv=1 / some(config.hidden_size),
      o=1 / some(*heads),
      gate_up=1 / some(config.hidden_size),
      down=1 / some(config.intermediate_size),
      key=jnp.tile(some(heads[0], heads[1] // 2), 2),
    )
    return smooth.fold(layer, factors)

  model = params["model"]
  layers = [change(layer) for layer in model["layers"]]
  return params | {"model": model | {"layers": layers}}
