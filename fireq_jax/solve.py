"""One layer's weights to codes, on the inputs its projections really get.

The projections of a layer are quantised in the order data flows, each against
its inputs in the model as it is by then: every layer before it and every
projection before it in the layer quantised, keys and values in their format.
"""

import functools
from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp

from fireq_jax import offline
from fireq_jax.calibrate import outer_sum
from fireq_jax.config import KVFormat, LlamaConfig
from fireq_jax.models import llama, llama_layers
from fireq_jax.quantize import quantize_weight
from fireq_jax.recipe import PROJECTIONS, Solver, WeightFormat

Params = dict[str, Any]

# The projections that read each input, in the order data flows.
READERS = {
  "qkv": ("q_proj", "k_proj", "v_proj"),
  "o": ("o_proj",),
  "gate_up": ("gate_proj", "up_proj"),
  "down": ("down_proj",),
}


def quantize_in_order(
  layer: Params,
  formats: dict[str, WeightFormat | None],
  windows: Sequence[jax.Array],
  *,
  solver: Solver,
  config: LlamaConfig,
  kv: KVFormat,
) -> Params:
  """Quantises the projections of a layer one input after the other.

  Args:
    layer: float, smoothed; f32 or bf16 kernels.
    formats: of every projection.
    windows: the layer's inputs in the quantised model, bf16 [B, T, D] each.
    solver: how to choose scales and codes.
    config: the model.
    kv: format of keys and values.

  Returns:
    the layer, its other leaves bf16.
  """
  quantized = llama.cast_floats(layer, jnp.bfloat16)
  for site, names in READERS.items():
    names = [name for name in names if formats[name] is not None]
    if not names:
      continue
    inputs = layer[PROJECTIONS[names[0]]][names[0]]["kernel"].shape[0]
    moment = jnp.zeros((inputs, inputs), jnp.float32)
    for x in windows:
      moment = _add_moment(
        moment, quantized, x, site=site, config=config, kv=kv
      )
    for name in names:
      block = PROJECTIONS[name]
      weight = _quantize(
        layer[block][name]["kernel"], moment, formats[name], solver
      )
      quantized[block][name] = {"kernel": weight}
  return quantized


@functools.partial(offline.jit, static_argnames=("site", "config", "kv"))
def _add_moment(moment, layer, x, *, site, config, kv):
  """Adds the sum of c c^T over the inputs c of a site, f32 [C, C]."""
  _, captured = run_layer(layer, x, config=config, kv=kv)
  inputs = captured[f"{site}_in"]
  return moment + outer_sum(inputs.reshape(-1, inputs.shape[-1]))


@functools.partial(offline.jit, static_argnames=("weight_format", "solver"))
def _quantize(kernel, moment, weight_format, solver):
  return quantize_weight(kernel, weight_format, solver=solver, moment=moment)


def run_layer(
  layer: Params, x: jax.Array, *, config: LlamaConfig, kv: KVFormat | None
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Runs one layer on [B, T, D]; what it captures is free if unused."""
  batch, length, _ = x.shape
  span = llama_layers.make_span(
    config,
    jnp.zeros(batch, jnp.int32),
    jnp.full(batch, length, jnp.int32),
    length,
  )
  y, _, captured = llama_layers.decoder_layer(
    layer, x, span=span, config=config, kv=kv, capture=True
  )
  return y, cast(dict[str, jax.Array], captured)
