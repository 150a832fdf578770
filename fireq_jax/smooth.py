"""Diagonal factors that quantise better and leave the float model unchanged.

A linear layer's input channel may be multiplied by any number if what feeds
it is divided by the same (paper: matrices Lambda); a key channel, if the
query channel is divided (N before RoPE, S after). `Factors` holds all such
numbers of a layer, `fold` absorbs them in its weights.
"""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from fireq_jax.calibrate import LayerStats
from fireq_jax.config import LlamaConfig
from fireq_jax.recipe import ChannelScaling

Layer = dict[str, Any]


@flax.struct.dataclass
class Factors:
  """Positive f32 factors of one layer; ones change nothing.

  Attributes:
    qkv: [D], on input channels of q, k and v, against the norm before.
    o: [K, H], on input channels of `o_proj`, against `v_proj`: one for all
      query heads that read the same value channel.
    gate_up: [D], on input channels of gate and up, against the norm before.
    down: [F], on input channels of `down_proj`, against `up_proj`.
    key: [K, H], on keys before RoPE, against queries; equal in both members
      of a pair c, c + H / 2, or it would not commute with RoPE.
    key_scale: [K, H], on keys after RoPE, against queries; applied while
      running, so None (not ones) where it is not used.
    key_shift: [K, H], taken off the keys after that, which changes all scores
      of a query alike and so nothing; None where it is not used.
  """

  qkv: jax.Array
  o: jax.Array
  gate_up: jax.Array
  down: jax.Array
  key: jax.Array
  key_scale: jax.Array | None = None
  key_shift: jax.Array | None = None


def identity(config: LlamaConfig) -> Factors:
  """Returns factors that change nothing."""
  ones = lambda *shape: jnp.ones(shape, jnp.float32)
  return Factors(
    qkv=ones(config.hidden_size),
    o=ones(config.num_key_value_heads, config.head_dim),
    gate_up=ones(config.hidden_size),
    down=ones(config.intermediate_size),
    key=ones(config.num_key_value_heads, config.head_dim),
  )


def channel_factors(
  layer: Layer, scaling: ChannelScaling, config: LlamaConfig
) -> Factors:
  """Returns the factors a recipe sets from the weights alone.

  A factor is the site's constant over the mean or largest magnitude of the
  weights its channel meets, or the constant itself; a channel that meets only
  zeros keeps 1.
  """
  attn, mlp = layer["self_attn"], layer["mlp"]
  unit = identity(config)

  def factors(constant: float, *kernels: jax.Array) -> jax.Array:
    weights = jnp.concatenate([jnp.abs(_f32(k)) for k in kernels], axis=-1)
    if scaling.statistic == "constant":
      return jnp.full(weights.shape[:-1], constant, jnp.float32)
    reduce = jnp.mean if scaling.statistic == "abs_mean" else jnp.max
    size = reduce(weights, axis=-1)
    return jnp.where(size > 0, constant / jnp.where(size > 0, size, 1.0), 1.0)

  qkv = [attn[name]["kernel"] for name in ("q_proj", "k_proj", "v_proj")]
  gate_up = [mlp[name]["kernel"] for name in ("gate_proj", "up_proj")]
  # Everything that reads a value channel, over the query heads of its head.
  o = attn["o_proj"]["kernel"]
  o = o.reshape(unit.o.shape[0], -1, unit.o.shape[1], o.shape[-1])
  o = jnp.moveaxis(o, 2, 1).reshape(*unit.o.shape, -1) / scaling.v_mul
  factors_o = factors(scaling.o, o) if scaling.o else unit.o
  return dataclasses.replace(
    unit,
    qkv=factors(scaling.qkv, *qkv) if scaling.qkv else unit.qkv,
    o=factors_o / scaling.v_mul,
    gate_up=(
      factors(scaling.gate_up, *gate_up) if scaling.gate_up else unit.gate_up
    ),
    down=(
      factors(scaling.down, mlp["down_proj"]["kernel"])
      if scaling.down
      else unit.down
    ),
  )


def activation_factors(
  stats: LayerStats, site: str, exponent: float
) -> jax.Array:
  """Returns mean |x| ** exponent, around 1, of each channel (AWQ).

  Args:
    stats: of the layer.
    site: qkv, gate_up or down.
    exponent: in [0, 1]; 0 gives ones.
  """
  mean = jnp.maximum(stats.abs_sum[site] / stats.tokens, 1e-6)
  log = exponent * jnp.log(mean)
  return jnp.exp(log - log.mean())


def fold(layer: Layer, factors: Factors) -> Layer:
  """Returns the layer with `factors` absorbed: the same float function.

  Products are taken in f32 and rounded once, to each weight's dtype. What a
  norm's gain loses in rounding is made up for in the weights that follow.
  """
  attn, mlp = layer["self_attn"], layer["mlp"]
  qkv_gain, qkv = _divide_gain(layer["input_layernorm"], factors.qkv)
  gate_up_gain, gate_up = _divide_gain(
    layer["post_attention_layernorm"], factors.gate_up
  )
  groups = attn["q_proj"]["kernel"].shape[1] // factors.key.size
  per_query = lambda f: jnp.repeat(f, groups, axis=0).reshape(-1)
  key, o = factors.key.reshape(-1), factors.o.reshape(-1)
  attention: dict[str, Any] = {
    "q_proj": _scaled(attn["q_proj"], qkv, 1 / per_query(factors.key)),
    "k_proj": _scaled(attn["k_proj"], qkv, key),
    "v_proj": _scaled(attn["v_proj"], qkv, 1 / o),
    "o_proj": _scaled(attn["o_proj"], per_query(factors.o), None),
  }
  for name in ("key_scale", "key_shift"):
    if getattr(factors, name) is not None:
      attention[name] = getattr(factors, name)
  return {
    "input_layernorm": qkv_gain,
    "self_attn": attention,
    "post_attention_layernorm": gate_up_gain,
    "mlp": {
      "gate_proj": _scaled(mlp["gate_proj"], gate_up, None),
      "up_proj": _scaled(mlp["up_proj"], gate_up, 1 / factors.down),
      "down_proj": _scaled(mlp["down_proj"], factors.down, None),
    },
  }


def _divide_gain(
  norm: dict[str, jax.Array], factors: jax.Array
) -> tuple[dict[str, jax.Array], jax.Array]:
  """Returns norm / factors, rounded, and what it was really divided by."""
  gain = norm["weight"]
  divided = (_f32(gain) / factors).astype(gain.dtype)
  live = divided != 0
  exact = _f32(gain) / jnp.where(live, _f32(divided), 1.0)
  return {"weight": divided}, jnp.where(live, exact, factors)


def _scaled(
  projection: dict[str, jax.Array],
  inputs: jax.Array,
  outputs: jax.Array | None,
) -> dict[str, jax.Array]:
  """Multiplies a kernel's rows by `inputs` and its columns by `outputs`."""
  kernel = projection["kernel"]
  scaled = _f32(kernel) * inputs[:, None]
  if outputs is not None:
    scaled = scaled * outputs
  return {"kernel": scaled.astype(kernel.dtype)}


def _f32(x: jax.Array) -> jax.Array:
  return x.astype(jnp.float32)
